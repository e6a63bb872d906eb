"""From the bytes of a file to RGB pixels, whatever the bytes are: a hostile file is an error, not a crash.

Pillow decodes, in a closed list of raster formats (so that no file can start an interpreter, as EPS does),
and its `convert("RGB")` after the EXIF orientation defines what grey, palette, alpha, CMYK and 16-bit images
mean. JPEG goes through simplejpeg (libjpeg-turbo straight into an array), which gives the same pixels in less
time and can decode at a half, a quarter or an eighth; whatever it does not take as it is, Pillow decides about.
`python -m benchmarks.decoders` has the figures of these and of torchvision's and OpenCV's decoders.
"""

import io
from collections.abc import Callable
from typing import IO, NamedTuple

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
MAX_PIXELS = 100_000_000  # 300 MB as RGB; a larger claim is taken for a decompression bomb
MAX_BYTES = 2**29  # of an encoded image; a larger file is read by nobody


_Turn = Image.Transpose
TURNS: dict[
    int, Image.Transpose
] = {  # EXIF orientation -> what sets the image upright (EXIF 2.32, tag 0x0112)
    2: _Turn.FLIP_LEFT_RIGHT,
    3: _Turn.ROTATE_180,
    4: _Turn.FLIP_TOP_BOTTOM,
    5: _Turn.TRANSPOSE,
    6: _Turn.ROTATE_270,
    7: _Turn.TRANSVERSE,
    8: _Turn.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height
JPEG_START = b"\xff\xd8\xff"


class BrokenImage(ValueError):
    """Bytes that give no image; the message is the reason."""


class Picture(NamedTuple):
    """A decoded image.

    pixels: uint8 [h, w, 3], upright; width, height: the image's own, upright [pixels], those of `pixels` too unless it
    was decoded at a fraction of its size.
    """

    pixels: np.ndarray
    width: int
    height: int


Shrink = Callable[[int, int], int]  # (width, height) of an upright image -> 1, 2, 4 or 8


def decode(data: bytes, shrink: Shrink | None = None) -> Picture:
    """Decode one image file to upright RGB pixels; of an animation, the first frame.

    shrink: by what factor the image may be smaller; only JPEG makes use of it (scaled inverse DCT).

    Raises BrokenImage with the reason when the bytes are no image of a known format, are cut short, or claim
    no pixel or more than MAX_PIXELS.
    """
    if not data:
        raise BrokenImage("the file is empty")
    try:
        picture = _decode_jpeg(data, shrink) if data[:3] == JPEG_START else None
        return picture or _decode_any(data)
    except BrokenImage:
        raise
    except Exception as error:  # decoders raise nearly anything on hostile bytes
        raise BrokenImage(describe(error)) from error


def _decode_jpeg(data: bytes, shrink: Shrink | None) -> Picture | None:
    """Decode a JPEG; None where it is damaged or of four channels, on which Pillow decides."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)
        if space not in ("YCbCr", "Gray", "RGB"):
            return None
        turn = _stated_turn(data)
        upright = (height, width) if turn in SIDEWAYS else (width, height)
        factor = shrink(*upright) if shrink else 1
        least = {"min_height": -(-height // factor), "min_width": -(-width // factor)} if factor > 1 else {}
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_factor=factor, **least)
    except ValueError:  # also what libjpeg calls a warning, which Pillow may read over
        return None
    if turn in TURNS:
        pixels = np.asarray(Image.fromarray(pixels).transpose(TURNS[turn]))
    return Picture(pixels, *upright)


def _decode_any(data: bytes) -> Picture:
    with open_header(io.BytesIO(data)) as image:
        turn = orientation(image)
        upright = image.transpose(TURNS[turn]) if turn in TURNS else image
        upright.load()
        # Converting what is RGB already would copy it.
        rgb = upright if upright.mode == "RGB" else upright.convert("RGB")
        return Picture(np.asarray(rgb), *rgb.size)


def _stated_turn(data: bytes) -> int:
    """Return the EXIF orientation of a JPEG; Pillow parses only those that may state one."""
    if b"Exif\0\0" not in data and b"http://ns.adobe.com/xap/" not in data:
        return 1
    with open_header(io.BytesIO(data), ("JPEG",)) as image:
        return orientation(image)


def open_header(file: IO[bytes], formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Open an image of one of `formats` without decoding it.

    Raises BrokenImage when it is no such image, or claims no pixel or more than MAX_PIXELS; what else Pillow raises on
    hostile bytes passes through.
    """
    first = file.read(12)
    file.seek(0)
    try:
        image = Image.open(file, formats=formats)
    except Image.UnidentifiedImageError:
        raise BrokenImage(f"no image of a known format: it begins with {first!r}") from None
    _check_size(image.width, image.height)
    return image


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BrokenImage(f"{width} x {height} pixels are more than {MAX_PIXELS:,}")
    if width * height < 1:
        raise BrokenImage(f"no pixel: {width} x {height}")


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, that an opened file states before its pixels; 1 where it is unreadable.

    A damaged EXIF block costs no image. Pillow itself turns TIFF. A PNG that states it behind its pixels counts as
    upright: an index would have to read the whole file.
    """
    stated = image.info.keys() & ({"exif"} if image.format == "PNG" else {"exif", "xmp"})
    if not stated or image.format == "TIFF":
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the parser of TIFF tags raises nearly anything on hostile bytes
        return 1
    return value if value in TURNS else 1


def describe(error: BaseException) -> str:
    """Say in one line what a parser of foreign bytes raised."""
    line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}".rstrip(": ")[:200]
