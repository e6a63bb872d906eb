"""The index is read from headers, agrees with the webdataset package, and bad tars are reported, not fatal."""

import io
import json
import tarfile

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from pyarrow import fs as pafs
from webdataset.writer import TarWriter

from isd_ray.data import index
from isd_ray.data import scan as scanner
from isd_ray.errors import UserError

LOCAL = pafs.LocalFileSystem()


def picture(width=7, height=5, kind="PNG", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def write(path, members):
    """Write (name, content) members into a tar."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def good(n, start=0):
    return [
        m
        for i in range(start, start + n)
        for m in ((f"a/{i:03d}.png", picture(i + 1, 4)), (f"a/{i:03d}.cls", b"%d" % (i % 3)))
    ]


def scan(path):
    return index.index_shard(LOCAL, str(path))


def test_rows_give_the_bytes_and_sizes_of_the_images(tmp_path):
    write(tmp_path / "s.tar", good(5))
    table, bad = scan(tmp_path / "s.tar")
    assert not bad
    assert table.schema.equals(index.SCHEMA)
    content = (tmp_path / "s.tar").read_bytes()
    for i, row in enumerate(table.to_pylist()):
        assert content[row["offset"] : row["offset"] + row["size"]] == picture(i + 1, 4)
        assert (row["key"], row["label"], row["width"], row["height"]) == (f"a/{i:03d}", i % 3, i + 1, 4)


def test_a_picture_stored_on_its_side_is_indexed_upright(tmp_path):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(np.zeros((4, 9, 3), np.uint8)).save(buffer, "JPEG", exif=exif)
    write(tmp_path / "a.tar", [("x.jpg", buffer.getvalue())])
    table, bad = scan(tmp_path / "a.tar")
    assert bad == []
    assert (table["width"][0].as_py(), table["height"][0].as_py()) == (4, 9)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["png", "jpg", "JPEG", "webp", "bmp"]), st.integers(0, 9)),
        min_size=1,
        max_size=6,
    )
)
def test_it_sees_what_the_webdataset_package_sees(tmp_path_factory, samples):
    path = tmp_path_factory.mktemp("wds") / "s.tar"
    kinds = {"png": "PNG", "jpg": "JPEG", "JPEG": "JPEG", "webp": "WEBP", "bmp": "BMP"}
    with open(path, "wb") as file, TarWriter(file, encoder=False) as tar:
        for i, (extension, label) in enumerate(samples):
            image = picture(3, 3, kinds[extension], i)
            tar.write({"__key__": f"d.x/k{i}", extension: image, "cls": str(label).encode()})
    table, bad = scan(path)
    assert not bad
    content = path.read_bytes()
    ours = [
        (r["key"], content[r["offset"] : r["offset"] + r["size"]], str(r["label"]).encode())
        for r in table.to_pylist()
    ]
    theirs = [
        (s["__key__"], next(s[e.lower()] for e in kinds if e.lower() in s), s["cls"])
        for s in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    assert ours == theirs


def test_labels_come_from_cls_or_json_and_may_be_missing(tmp_path):
    image = picture()
    write(
        tmp_path / "s.tar",
        [
            ("a.jpg", image), ("a.json", b'{"label": 4, "x": 1}'),
            ("b.png", image), ("b.cls", b" 2\n"),
            ("c.png", image),
            ("d.png", image), ("d.json", b'{"caption": "no label"}'),
            ("e.cls", b"-1"), ("e.PNG", image),
            ("__meta__", b"ignored"),
        ],
    )  # fmt: skip
    table, bad = scan(tmp_path / "s.tar")
    assert not bad
    assert table["label"].to_pylist() == [4, 2, None, None, None]
    assert index.labels(table).tolist() == [4, 2, -1, -1, -1]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("x.cls", b"1")], "no image member, only cls"),
        ([("x.png", b""), ("x.cls", b"1")], "zero bytes"),
        ([("x.png", b"this is text"), ("x.cls", b"1")], "no image of a known format: it begins with"),
        ([("x.png", picture()), ("x.cls", b"cat")], "label 'cat' in .cls is not an integer"),
        ([("x.png", picture()), ("x.json", b'{"label": [1]}')], "in .json is not an integer"),
        ([("x.png", picture()), ("x.json", b"{broken")], ""),
        ([("x.png", picture()), ("x.cls", b"99999999999")], "larger than 1048575"),
    ],
)
def test_a_bad_sample_is_named_and_left_out(tmp_path, members, reason):
    write(tmp_path / "s.tar", [*good(2), *members, *good(2, start=5)])
    table, bad = scan(tmp_path / "s.tar")
    assert table["key"].to_pylist() == ["a/000", "a/001", "a/005", "a/006"]
    assert len(bad) == 1
    assert (bad[0]["shard"], bad[0]["key"]) == ("s.tar", "x")
    assert reason in bad[0]["reason"]


def test_every_truncation_is_noticed(tmp_path):
    write(tmp_path / "whole.tar", good(4))
    content = (tmp_path / "whole.tar").read_bytes()
    end = max(i for i, b in enumerate(content) if b) + 1
    end = -(-end // 512) * 512  # where the end-of-archive mark begins
    whole, _ = scan(tmp_path / "whole.tar")
    for cut in [0, 100, 512, *range(700, end + 1, 333), end]:
        (tmp_path / "cut.tar").write_bytes(content[:cut])
        table, bad = scan(tmp_path / "cut.tar")
        assert bad[-1]["key"] is None, cut
        assert bad[-1]["rows"] == len(table)
        kept = whole.slice(0, len(table)).select(["key", "offset", "size", "width"])
        assert table.select(kept.column_names).equals(kept)


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000, b"\0" * 700, b"\x89PNG" + b"x" * 5000])
def test_garbage_is_reported_as_a_broken_shard(tmp_path, content):
    (tmp_path / "s.tar").write_bytes(content)
    table, bad = scan(tmp_path / "s.tar")
    assert len(table) == 0
    assert len(bad) == 1
    assert all(b["key"] is None for b in bad)


def test_damage_in_the_middle_is_noticed(tmp_path):
    write(tmp_path / "s.tar", good(4))
    content = bytearray((tmp_path / "s.tar").read_bytes())
    second = index.index_shard(LOCAL, str(tmp_path / "s.tar"))[0]["offset"][2].as_py() - 512
    content[second : second + 512] = b"\xff" * 512
    (tmp_path / "s.tar").write_bytes(content)
    table, bad = scan(tmp_path / "s.tar")
    assert len(table) == 2
    assert bad[-1]["key"] is None


def test_bodies_are_not_read(tmp_path, monkeypatch):
    image = picture(1500, 1500)
    assert len(image) > 5_000_000
    write(tmp_path / "s.tar", [("a.png", image), ("b.png", image)])
    read = 0

    class Counting(io.BufferedReader):
        def __init__(self, raw, size):
            super().__init__(CountingRaw(raw), size)

    class CountingRaw(io.RawIOBase):
        def __init__(self, raw):
            self.raw = raw

        def readinto(self, buffer):
            nonlocal read
            got = self.raw.readinto(buffer)
            read += got
            return got

        def readable(self):
            return True

        def seekable(self):
            return True

        def seek(self, *place):
            return self.raw.seek(*place)

        def tell(self):
            return self.raw.tell()

    monkeypatch.setattr(scanner.io, "BufferedReader", Counting)
    table, bad = scan(tmp_path / "s.tar")
    assert (len(table), bad) == (2, [])
    assert 0 < read < 1_500_000


def folder(tmp_path, shards=4, each=25):
    for s in range(shards):
        write(tmp_path / f"s-{s}.tar", good(each))
    return tmp_path


def test_index_of_a_folder_round_trips_and_moves(tmp_path):
    here = folder(tmp_path / "a") if (tmp_path / "a").mkdir() is None else None
    table, bad = index.index_shards(str(here), classes=["x", "y", "z"], workers=0)
    assert (len(table), bad) == (100, [])
    index.write_index(table, str(here))
    assert not list(here.glob(".*"))
    assert index.read_index(str(here)).equals(table, check_metadata=True)
    here.rename(tmp_path / "b")
    moved = index.read_index(str(tmp_path / "b" / "index.parquet"))
    assert moved.equals(table)
    assert index.root(moved) == str(tmp_path / "b")
    assert index.classes(moved) == ["x", "y", "z"]
    assert index.class_counts(moved.take([0, 1, 3])).tolist() == [2, 1, 0]


def test_a_file_uri_is_a_root(tmp_path):
    folder(tmp_path)
    table, _ = index.index_shards(f"file://{tmp_path}", workers=0)
    index.write_index(table, f"file://{tmp_path}")
    assert index.root(index.read_index(f"file://{tmp_path}")) == f"file://{tmp_path}"


def test_few_bad_samples_are_reported_many_stop(tmp_path):
    folder(tmp_path)
    write(tmp_path / "s-9.tar", [*good(2), ("x.cls", b"1")])
    table, bad = index.index_shards(str(tmp_path), workers=0)
    assert (len(table), [b["key"] for b in bad]) == (102, ["x"])
    (tmp_path / "s-2.tar").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"about 26 of 103 .* \(1 broken shards\), more than the limit of 1.0%"
    ):
        index.index_shards(str(tmp_path), workers=0)
    table, bad = index.index_shards(str(tmp_path), workers=0, max_bad=0.3)
    assert len(table) == 77


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no .tar file"),
        (lambda p: (p / "s.tar").write_bytes(b""), "more than the limit"),
        (lambda p: write(p / "s.tar", good(3)), "label 2 has no name"),
    ],
)
def test_index_shards_refuses(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        index.index_shards(str(tmp_path), classes=["a", "b"], workers=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing", None, "no index at"),
        ("index.parquet", b"text", "not a readable index"),
    ],
)
def test_read_index_refuses(tmp_path, name, content, message):
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        index.read_index(str(tmp_path))
    with pytest.raises(UserError, match="cannot open"):
        index.read_index("nosuchscheme://bucket/x")


def test_a_foreign_parquet_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"x": [1]}), tmp_path / "index.parquet")
    with pytest.raises(UserError, match="not an isd_ray index"):
        index.read_index(str(tmp_path))


def test_metadata_is_plain_json(tmp_path):
    folder(tmp_path, 1, 3)
    table, _ = index.index_shards(str(tmp_path), workers=0)
    meta = json.loads(table.schema.metadata[b"isd_ray"])
    assert meta == {"format": 1, "root": str(tmp_path), "classes": ["0", "1", "2"]}
