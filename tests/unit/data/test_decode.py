"""Decoding: Pillow's meaning of every colour mode, and an error with a reason for bytes that are no image."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from isd_ray.data import decode as module
from isd_ray.data import read
from isd_ray.data.decode import BrokenImage, decode
from isd_ray.data.views import VIEWS

RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    """Return the file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated() -> bytes:
    """A JPEG whose EXIF data say: turn me."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(RGB, "JPEG", exif=exif)


FILES = {
    "rgb": encode(RGB, "PNG"),
    "jpeg": encode(RGB, "JPEG"),
    "webp": encode(RGB, "WEBP", lossless=True),
    "grey": encode(RGB.convert("L"), "PNG"),
    "bilevel": encode(RGB.convert("1"), "PNG"),
    "palette": encode(RGB.convert("P"), "PNG"),
    "palette with transparency": encode(RGB.convert("P"), "PNG", transparency=3),
    "alpha": encode(RGB.convert("RGBA"), "PNG"),
    "grey with alpha": encode(RGB.convert("LA"), "PNG"),
    "cmyk": encode(RGB.convert("CMYK"), "JPEG"),
    "16 bit": encode(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100), "PNG"),
    "gif": encode(RGB.convert("P"), "GIF"),
    "tiff": encode(RGB, "TIFF"),
    "exif": rotated(),
}


@pytest.mark.parametrize("name", FILES)
def test_equals_pillow(name):
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(FILES[name]))).convert("RGB")
    found = decode(FILES[name]).pixels
    assert found.dtype == np.uint8
    assert np.array_equal(found, np.asarray(expected))


JPEGS = st.fixed_dictionaries(
    {
        "subsampling": st.sampled_from([0, 1, 2]),
        "quality": st.integers(5, 100),
        "progressive": st.booleans(),
        "optimize": st.booleans(),
    }
)


@given(JPEGS, st.integers(1, 70), st.integers(1, 70), st.sampled_from(["RGB", "L"]), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_every_kind_of_jpeg_equals_pillow_and_a_fraction_equals_its_draft(options, width, height, mode, turn):
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encode(Image.fromarray(noise).convert(mode), "JPEG", exif=exif, **options)
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
        assert np.array_equal(decode(data).pixels, np.asarray(upright.convert("RGB")))
        assert decode(data)[1:] == upright.size
    for factor in (2, 4, 8):
        if width % factor or height % factor:  # Pillow rounds what it is asked for
            continue
        with Image.open(io.BytesIO(data)) as image:
            image.draft(mode, (width // factor, height // factor))
            expected = ImageOps.exif_transpose(image).convert("RGB")
        found = decode(data, shrink=lambda *_: factor)  # noqa: B023
        assert found[1:] == upright.size
        assert np.array_equal(found.pixels, np.asarray(expected))


def test_large_jpegs_are_decoded_smaller_and_give_nearly_the_same_views():
    """The smallest crop keeps twice the pixels of the view on a side."""
    rough = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    data = encode(Image.fromarray(rough).resize((1600, 1200), Image.Resampling.BICUBIC), "JPEG", quality=90)
    views = (VIEWS["weak"], VIEWS["weak"])
    position = np.arange(32)
    for size, factors in ((64, {1, 2, 4, 8}), (400, {1})):
        cutters = read._cutters(position, read.Shape((size, size), views))
        found = set()
        for i in range(32):
            shrink = read._shrink(cutters, i)
            assert shrink is not None
            factor = shrink(1600, 1200)
            sides = [side for cutter in cutters for side in cutter.box(i, 1600, 1200)[2:]]
            assert factor == 1 or min(sides) / factor >= 2 * size
            assert factor == 8 or min(sides) / factor < 4 * size
            found.add(factor)
        assert found <= factors
    assert found == {1}
    shape = read.Shape((64, 64), views)
    small, _, _ = read._decode([(data, 0.0)] * 4, position[:4], shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "_shrink", lambda *_: None)
        whole, _, _ = read._decode([(data, 0.0)] * 4, position[:4], shape)
    difference = np.abs(small.astype(int) - whole)
    assert difference.max() > 0  # it was decoded smaller
    assert difference.mean() < 1  # grey level


def test_exif_orientation_turns_the_image():
    assert decode(FILES["exif"])[1:] == (20, 30)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html><body>404 Not Found</body></html>", "no image of a known format.*<html>"),
        (FILES["jpeg"][: len(FILES["jpeg"]) // 2], "OSError"),
        (FILES["rgb"][: len(FILES["rgb"]) // 2], "."),
        (FILES["webp"][: len(FILES["webp"]) // 2], "."),
        (b"\0" * 500, "no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no image"),
    ],
)
def test_broken_bytes_give_a_reason(data, reason):
    with pytest.raises(BrokenImage, match=reason):
        decode(data)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(module, "MAX_PIXELS", 599)
    with pytest.raises(BrokenImage, match="30 x 20 pixels are more than 599"):
        decode(FILES["rgb"])
    bomb = FILES["rgb"].replace((30).to_bytes(4, "big") + (20).to_bytes(4, "big"), b"\0\1\xff\xff" * 2, 1)
    with pytest.raises(BrokenImage):
        decode(bomb)


@given(st.sampled_from(sorted(FILES)), st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_files_are_an_image_or_a_broken_image(name, data):
    damaged = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        picture = decode(bytes(damaged))
    except BrokenImage:  # any other error, or a crash, fails the test
        return
    assert picture.pixels.shape == (picture.height, picture.width, 3)
