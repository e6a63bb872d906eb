"""Every image is read where a file of its name begins, whatever the format of the tar; another file is no image."""

import io
import tarfile
import time

import broken as b
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs as pafs

from isd_ray.data import index, read, scan
from isd_ray.data.decode import BrokenImage
from isd_ray.data.headers import has_key, split_key, stated_size

LOCAL = pafs.LocalFileSystem()
IMAGE = b.file()
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def read_all(folder, table) -> list:
    return read.read_bytes(LOCAL, str(folder), table)


def scanned(path):
    table, bad = scan.index_shard(LOCAL, str(path))
    assert bad == []
    return table


NAMES = {
    "short": "a/x",
    "as long as the field": "d/" + "x" * 93,
    "cut in its extension": "d/" + "x" * 96,
    "one longer": "d/" + "x" * 97,
    "in two parts": "d" * 90 + "/" + "x" * 60,
    "long": "/".join(["long" * 20] * 20) + "/x",
    "longer than what is read before": "/".join(["long" * 20] * 99) + "/x",
    "of the whole world": "фото/猫",
    "long, of the whole world": "猫" * 80 + "/猫",
    "with slashes to spare": "a//b///x",
    "a dot in the folder": "v1.2/x",
}


USTAR = ("short", "in two parts", "with slashes to spare", "a dot in the folder")  # what it can name


@pytest.mark.parametrize(
    ("kind", "name"), [(k, n) for k in FORMATS for n in NAMES if k != "ustar" or n in USTAR]
)
def test_names_of_every_kind_are_found_before_their_image(tmp_path, kind, name):
    key = NAMES[name]
    members = [m for i in range(3) for m in b.sample(f"{key}{i}", i)]
    (tmp_path / "s.tar").write_bytes(b.tar(*members, format=FORMATS[kind]))
    table = scanned(tmp_path / "s.tar")
    assert read_all(tmp_path, table) == [IMAGE] * 3
    for row in range(3):  # alone, none of the others before it
        assert read_all(tmp_path, table.slice(row, 1)) == [IMAGE]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_characters="\0\n.", codec="utf-8"), min_size=1, max_size=120),
        min_size=1,
        max_size=6,
        unique_by=lambda name: split_key(f"{name}.png"),
    ),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_what_was_indexed_is_read(tmp_path_factory, names, kind):
    folder = tmp_path_factory.mktemp("names")
    content = b.tar(*((f"{n}.png", b.file(b.pixels(i))) for i, n in enumerate(names)), format=kind)
    (folder / "s.tar").write_bytes(content)
    table, _ = scan.index_shard(LOCAL, str(folder / "s.tar"))
    found = read_all(folder, table)
    for row, image in zip(table.to_pylist(), found, strict=True):
        assert image == content[row["offset"] : row["offset"] + row["size"]]


def test_names_that_are_no_utf8_and_records_of_many_kilobytes(tmp_path):
    (tmp_path / "latin.tar").write_bytes(b.tar(*b.sample("caf\xe9"), encoding="latin-1"))
    assert read_all(tmp_path, scanned(tmp_path / "latin.tar")) == [IMAGE]
    records = {"SCHILY.xattr.user": "x" * 50_000, "path": "猫/x.png"}
    member = b.info("ignored.png", pax_headers=records, size=len(IMAGE))
    with tarfile.open(tmp_path / "pax.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(b.info("first.txt", size=9), io.BytesIO(b"x" * 9))
        tar.addfile(member, io.BytesIO(IMAGE))
    table = index.index_shards(str(tmp_path), workers=0, max_bad=1.0)[0]
    assert table["key"].to_pylist() == ["caf\\xe9", "猫/x"]
    assert read_all(tmp_path, table) == [IMAGE] * 2


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("stem", ["k", "x" * 96 + "/"])
def test_another_file_of_the_same_size_at_the_same_place_is_no_image(tmp_path, kind, stem):
    """What a shard that was replaced looks like, where all files have one size."""

    def write(name: str) -> None:
        (tmp_path / "s.tar").write_bytes(b.tar(*b.sample(f"{stem}{name}"), format=FORMATS[kind]))

    write("1")
    table = scanned(tmp_path / "s.tar")
    write("2")
    assert scanned(tmp_path / "s.tar").drop_columns("key").equals(table.drop_columns("key"))
    (found,) = read_all(tmp_path, table)
    assert isinstance(found, BrokenImage)
    assert "a file of another name begins there; index it again" in str(found)


def test_a_size_in_base_256_is_a_size(tmp_path):
    content = b.header("x.png", len(IMAGE)) + IMAGE.ljust(-(-len(IMAGE) // 512) * 512, b"\0")
    (tmp_path / "s.tar").write_bytes(b.before_end(b.tar(*b.sample("a")), content))
    assert read_all(tmp_path, scanned(tmp_path / "s.tar")) == [IMAGE, IMAGE]
    assert stated_size(b.header("x", -9)) == -9
    assert stated_size(b"x" * 512) == -1


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_bytes_before_an_image_give_an_answer(data):
    content = bytearray(b.tar(*b.sample("猫" * 40), format=tarfile.PAX_FORMAT)[: 4 * 512])
    for _ in range(data.draw(st.integers(0, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    assert has_key(bytes(content), len(content), data.draw(st.sampled_from(["x", "猫" * 40, ""]))) in (0, 1)


def test_a_megabyte_of_headers_in_a_row_takes_no_time():
    chain = (b.header("x", 1, b"L") + b"y" + b"\0" * 511) * 1100 + b.header("z.png", 9)
    started = time.perf_counter()
    assert not has_key(chain, len(chain), "x")
    assert time.perf_counter() - started < 1
    noise = np.random.default_rng(0).integers(0, 256, 2**21, np.uint8).tobytes() + b.header("z.png", 9)
    assert not has_key(noise, len(noise), "x")
    assert has_key(noise, len(noise), "z")
