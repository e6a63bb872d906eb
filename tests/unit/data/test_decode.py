"""Decoding: Pillow's meaning of every colour mode, and an error with a reason for bytes that are no image."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from isd_ray.data import decode as module
from isd_ray.data.decode import BrokenImage, decode

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
