"""What can be wrong with the bytes of an image, one row a kind: named in one line, the rest used, memory bounded.

Every row goes both ways: through the index of its shard, and through the stream with an index that names it all the
same (as when the file was damaged after it was indexed).
"""

import io
import pickle
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import broken as b
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageOps

from isd_ray.data import blocks, index, scan
from isd_ray.data.decode import decode
from isd_ray.data.shards import image_extension
from isd_ray.data.stream import Stream

JPEG = b.file(kind="JPEG")
PNG = b.file()
SIXTEEN = Image.fromarray((np.arange(96, dtype=np.uint16) * 600).reshape(8, 12))
FRAMES = dict(save_all=True, append_images=[b.pixels(1), b.pixels(2)])
UNKNOWN = "no image of a known format: it begins with"
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"

# kind -> (name of the member, bytes, reason in the index or None where its header is whole, reason in the stream)
BAD = {
    "zero bytes": ("x.jpg", b"", "image member of zero bytes", "no valid range: offset .*, size 0"),
    "a web page named .jpg": ("x.jpg", b"<html>404</html>", UNKNOWN, f"{UNKNOWN}.*<html>"),
    "a JPEG cut in its pixels": ("x.jpg", JPEG[:-40], None, "truncated"),
    "half a JPEG": ("x.jpg", JPEG[: len(JPEG) // 2], "Truncated File Read", "Truncated File Read"),
    "half a PNG": ("x.png", PNG[: len(PNG) // 2], None, "truncated"),
    "the head of a JPEG": ("x.jpg", JPEG[:20], UNKNOWN, UNKNOWN),
    "dimensions of a bomb": ("x.png", b.png(2**31 - 1, 2**31 - 1), "DecompressionBomb", "DecompressionBomb"),
    "more pixels than allowed": ("x.png", b.png(10_001, 10_000), "more than 100,000,000", "more than 100,000,000"),
    "no pixel": ("x.png", b.png(0, 8), UNKNOWN, UNKNOWN),
    "a comment that unpacks to 256 MB": ("x.png", b.text_bomb(), "too large", "too large"),
    "SVG": ("x.png", b'<svg xmlns="http://www.w3.org/2000/svg"/>', UNKNOWN, UNKNOWN),
    "PostScript, a program": ("x.jpg", POSTSCRIPT, UNKNOWN, UNKNOWN),
    "half a JPEG 2000": ("x.jp2", b.file(kind="JPEG2000")[:200], None, "."),
    "half a GIF": ("x.gif", b.file(b.pixels().convert("P"), "GIF")[:200], UNKNOWN, UNKNOWN),
    "an image kind that is not read": ("x.jpg", b.file(kind="ICO", sizes=[(8, 8)]), UNKNOWN, UNKNOWN),
    "zeros": ("x.jpg", b"\0" * 3000, UNKNOWN, UNKNOWN),
    "a pickle named .jpg": ("x.jpg", pickle.dumps(b.Trap("never")), UNKNOWN, UNKNOWN),
}  # fmt: skip
GOOD = {
    "PNG named .jpg": ("x.jpg", PNG),
    "JPEG named .png": ("x.png", JPEG),
    "suffix in capitals": ("x.JPEG", JPEG),
    "16 bit": ("x.png", b.file(SIXTEEN)),
    "CMYK": ("x.jpg", b.file(b.pixels().convert("CMYK"), "JPEG")),
    "grey": ("x.png", b.file(b.pixels().convert("L"))),
    "bilevel": ("x.png", b.file(b.pixels().convert("1"))),
    "palette with alpha": ("x.png", b.file(b.pixels().convert("P"), transparency=3)),
    "grey with alpha": ("x.png", b.file(b.pixels().convert("LA"))),
    "EXIF cut short": ("x.jpg", b.file(kind="JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")),
    "EXIF that is none": ("x.jpg", b.file(kind="JPEG", exif=b"Exif\0\0" + b"<html>" * 9)),
    "EXIF with an absurd orientation": ("x.jpg", b.file(kind="JPEG", exif=b.exif(77))),
    "animated WebP": ("x.webp", b.file(kind="WEBP", lossless=True, **FRAMES)),
    "animated PNG": ("x.png", b.file(kind="PNG", **FRAMES)),
    "several pictures in a JPEG": ("x.jpg", b.file(kind="MPO", **FRAMES)),
    "TIFF": ("x.tif", b.file(kind="TIFF")),
    "TIFF, spelt out": ("x.tiff", b.file(kind="TIFF")),
    "GIF": ("x.gif", b.file(b.pixels().convert("P"), "GIF")),
    "animated GIF": ("x.gif", b.file(b.pixels().convert("P"), "GIF", **FRAMES)),
    "JPEG 2000": ("x.jp2", b.file(kind="JPEG2000")),
}


@pytest.fixture(autouse=True)
def no_ray(request, monkeypatch):
    """Without Ray but in the tests that ask for it."""
    if "ray_session" not in request.fixturenames:
        monkeypatch.setattr(blocks.ray, "is_initialized", lambda: False)


def write_shard(path: Path, name: str, content: bytes) -> None:
    """Write a good sample, the one in question and another good one."""
    path.write_bytes(b.tar(*b.sample("a"), (name, content), ("x.cls", b"1"), *b.sample("z", 2)))


def trusting_index(folder: Path) -> pa.Table:
    """An index that names every image member and takes each for 12 x 8 pixels, whatever it holds."""
    rows = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            images = [m for m in tar if not m.name.endswith(".cls")]
        rows += [
            (path.name, m.name.split(".")[0], m.offset_data, m.size, 0, b.WIDTH, b.HEIGHT) for m in images
        ]
    columns = zip(*rows, strict=True)
    arrays = [pa.array(c, kind) for c, kind in zip(columns, scan.SCHEMA.types, strict=True)]
    return index.with_metadata(pa.Table.from_arrays(arrays, schema=scan.SCHEMA), str(folder), ["0"])


def one_line(reason: str) -> bool:
    return 0 < len(reason) < 300 and "\n" not in reason


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_named_in_the_index_or_has_a_whole_header(tmp_path, kind):
    name, content, reason, _ = BAD[kind]
    write_shard(tmp_path / "s.tar", name, content)
    table, bad = index.index_shards(str(tmp_path), workers=0, max_bad=1.0)
    assert table["key"].to_pylist() == (["a", "z"] if reason else ["a", "x", "z"])
    assert [(e["shard"], e["key"]) for e in bad] == ([("s.tar", "x")] if reason else [])
    assert all(one_line(e["reason"]) and re.search(reason, e["reason"]) for e in bad)


@pytest.mark.parametrize("cache", ["none", "memory"])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_named_in_the_stream(tmp_path, kind, cache):
    name, content, _, reason = BAD[kind]
    write_shard(tmp_path / "s.tar", name, content)
    images, bad = b.streamed(trusting_index(tmp_path), cache)
    assert sorted(images) == ["a", "z"]
    assert list(bad) == ["x"]
    assert one_line(bad["x"])
    assert re.search(reason, bad["x"])


@pytest.mark.parametrize("kind", GOOD)
def test_an_odd_image_is_used_as_pillow_shows_it(tmp_path, kind):
    name, content = GOOD[kind]
    write_shard(tmp_path / "s.tar", name, content)
    table, bad = index.index_shards(str(tmp_path), workers=0)
    assert (table["key"].to_pylist(), bad) == (["a", "x", "z"], [])
    assert image_extension(content) in scan.IMAGE_EXTENSIONS
    images, bad = b.streamed(table)
    assert bad == {}
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))  # of an animation, the first frame
    assert np.array_equal(images["x"][0].transpose(1, 2, 0), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_index_and_stream_agree_on_what_is_upright(tmp_path, kind, turn):
    content = b.file(b.pixels(), kind, exif=b.exif(turn))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert np.array_equal(decode(content).pixels, np.asarray(expected))
    (tmp_path / "s.tar").write_bytes(b.tar(*b.sample("x", content=content)))
    table, bad = index.index_shards(str(tmp_path), workers=0)
    assert bad == []
    assert (table["width"][0].as_py(), table["height"][0].as_py()) == expected.size
    images, bad = b.streamed(table)
    assert np.array_equal(images["x"][0].transpose(1, 2, 0), np.asarray(expected))


def test_ray_tasks_say_the_same(ray_session, tmp_path):
    """All rows at once, each in its own shard, read by Ray tasks."""
    both = {kind: row[:2] for kind, row in (BAD | GOOD).items()}
    for i, (name, content) in enumerate(both.values()):
        (tmp_path / f"{i:02d}.tar").write_bytes(b.tar((f"{i:02d}.{name.split('.')[1]}", content)))
    images, bad = b.streamed(trusting_index(tmp_path))
    kinds = dict(zip([f"{i:02d}" for i in range(len(both))], both, strict=True))
    assert {kinds[key] for key in images} == set(GOOD)
    assert {kinds[key] for key in bad} == set(BAD)
    assert all(re.search(BAD[kinds[key]][3], reason) for key, reason in bad.items())


def test_too_many_end_the_run_in_one_line(tmp_path):
    write_shard(tmp_path / "s.tar", "x.jpg", b"\x1b[2J\n<html>")
    stream = Stream(trusting_index(tmp_path), seed=0, global_batch=3, size=8, views=["weak"], max_bad=0.1)
    with pytest.raises(index.UserError, match=r"1 of 3 images are broken, .*x in s.tar") as error:
        next(stream.epoch(0))
    assert str(error.value).isprintable()


MEMORY = """
import resource, sys, tarfile
from pyarrow import fs
from isd_ray.data.decode import BrokenImage, decode
from isd_ray.data.scan import index_shard
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
for path in sys.argv[1:]:
    index_shard(fs.LocalFileSystem(), path)
    with tarfile.open(path) as tar:
        for member in tar:
            try:
                decode(tar.extractfile(member).read())
            except BrokenImage:
                pass
print(peak() - before)
"""


def test_bombs_take_no_memory(tmp_path):
    bombs = [
        content
        for kind, (_, content, _, _) in BAD.items()
        if "bomb" in kind or "more" in kind or "256" in kind
    ]
    assert len(bombs) == 3
    for i, content in enumerate(bombs):
        write_shard(tmp_path / f"{i}.tar", "x.png", content)
    command = [sys.executable, "-c", MEMORY, *map(str, sorted(tmp_path.glob("*.tar")))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64  # MiB; the smallest of them would take 300
