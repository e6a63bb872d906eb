"""What can be wrong with tars and indices, one row a kind: named in one line, the rest used, nothing executed.

Each broken shard lies beside a whole one; both are indexed, and what the index then holds is streamed.
"""

import bz2
import gzip
import io
import json
import lzma
import pickle
import re
import tarfile
import tracemalloc

import broken as b
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs as pafs

from isd_ray.data import blocks, index, scan
from isd_ray.data.stream import Stream
from isd_ray.errors import UserError

A, Z = b.sample("a"), b.sample("z", 2)
LOCAL = pafs.LocalFileSystem()
USED = ["a", "z"]
WHOLE = b.tar(*A, *Z)
END = "truncated or damaged tar: it does not end"
NO_IMAGE = "no image member, only"
LONG = "/".join(["long" * 20] * 20) + "/x"


X = ("x.png", b.file())


def around(*members: b.Member) -> bytes:
    """A tar in which members stand between two good samples."""
    return b.tar(*A, *members, *Z)


def behind(blocks: bytes) -> bytes:
    """A tar in which raw blocks follow a good sample."""
    return b.before_end(b.tar(*A), blocks)


def damaged_header() -> bytes:
    content = bytearray(b.tar(*A, *b.sample("m"), *Z))
    at = content.index(b"m.png")
    content[at : at + 512] = b"\xff" * 512
    return bytes(content)


def pax(records: dict[str, str], name: str = "x.png") -> bytes:
    """A tar whose member `name` carries pax records."""
    member = b.info(name, pax_headers=records, size=len(b.file()))
    tarfile.TarFile(fileobj=(out := io.BytesIO()), mode="w", format=tarfile.PAX_FORMAT).addfile(
        member, io.BytesIO(b.file())
    )
    return behind(out.getvalue()[: out.tell()])


# kind -> (bytes of the shard, keys that are used, [(key or None for the shard, reason)])
SHARDS = {
    # the archive
    "zero bytes": (b"", [], [(None, "not a tar: empty file")]),
    "no member": (b.tar(), [], [(None, "no sample in the tar")]),
    "a web page": (b"<html>404</html>" * 99, [], [(None, "not a tar: .*<html>")]),
    "cut in an image": (WHOLE[: WHOLE.index(b"z.png") + 600], ["a"], [(None, END)]),
    "cut behind an image": (WHOLE[: WHOLE.index(b"z.cls") - 9], ["a"], [(None, "damaged tar: unexpected end of data")]),
    "cut before the end mark": (WHOLE[: WHOLE.index(b"z.cls") + 1024], USED, [(None, END)]),
    "a damaged header": (damaged_header(), ["a"], [(None, END)]),
    "gzip named .tar": (gzip.compress(WHOLE), [], [(None, r"compressed tar \(gzip\): name it")]),
    "zstd named .tar": (b"\x28\xb5\x2f\xfd" + b"\0" * 600, [], [(None, r"compressed tar \(zstd\)")]),
    "a negative size": (behind(b.header("x.png", -1536)), ["a"], [(None, "claims -1536 bytes")]),
    "a size beyond the file": (behind(b.header("x.png", 2**60)), ["a"], [(None, END)]),
    "a long name of 1 TB": (behind(b.header("x", 2**40, b"L")), ["a"], [(None, "claims 1099511627776")]),
    "pax records of 1 TB": (behind(b.header("x", 2**40, b"x")), ["a"], [(None, "claims 1099511627776")]),
    "a negative pax size": (pax({"size": "-4096"}), ["a"], [(None, "member of -4096 bytes")]),
    "3000 long names in a row": (
        behind((b.header("x", 1, b"L") + b"y" + b"\0" * 511) * 3000), ["a"], [(None, "RecursionError")]
    ),
    # names
    "a path out of the folder": (around(*b.sample("../../x")), ["a", "../../x", "z"], []),
    "an absolute path": (around(*b.sample("/etc/x")), ["a", "/etc/x", "z"], []),
    "names that are no UTF-8": (b.tar(*A, *b.sample("\xe9"), *Z, encoding="latin-1"), ["a", "\\xe9", "z"], []),
    "names of the whole world": (around(*b.sample("фото/猫")), ["a", "фото/猫", "z"], []),
    "long GNU names": (around(*b.sample(LONG)), ["a", LONG, "z"], []),
    "long pax names": (b.tar(*A, *b.sample(LONG), *Z, format=tarfile.PAX_FORMAT), ["a", LONG, "z"], []),
    "control characters in a name": (
        around(*b.sample("\x1b[2J\n")), ["a", "\x1b[2J\n", "z"], []
    ),
    "folders and hidden files": (
        b.tar(b.info("d", tarfile.DIRTYPE), *A, ("._a.png", b"resource fork"), *Z), USED, []
    ),
    # members
    "a symbolic link": (
        around(b.info("x.png", tarfile.SYMTYPE, linkname="/etc/passwd")), USED, [("x", "symbolic link")]
    ),
    "a hard link": (around(b.info("x.png", tarfile.LNKTYPE, linkname="a.png")), USED, [("x", "hard link")]),
    "a link as label": (
        around(X, b.info("x.cls", tarfile.SYMTYPE, linkname="a.cls")), USED, [("x", "symbolic")]
    ),
    "a device": (around(b.info("x.png", tarfile.CHRTYPE, devmajor=1, devminor=5)), USED, [("x", "device")]),
    "a pipe": (around(b.info("x.png", tarfile.FIFOTYPE)), USED, [("x", "device or the like")]),
    "a sparse file": (pax({"GNU.sparse.major": "0", "GNU.sparse.size": "4096", "GNU.sparse.map": "0,64"}),
                      ["a"], [("x", "sparse file")]),
    "a tar in the tar": (around(("x.tar", WHOLE)), USED, [("x", f"{NO_IMAGE} tar")]),
    "no image member": (around(("x.cls", b"1"), ("x.txt", b"cat")), USED, [("x", f"{NO_IMAGE} cls, txt")]),
    "no suffix": (around(("README", b"hello")), USED, [("README", f"{NO_IMAGE} a member without ext")]),
    "an unknown image kind": (around(*b.sample("x", 1, "heic", b"ftypheic")), USED, [("x", f"{NO_IMAGE} cls, heic")]),
    # keys
    "members apart": (b.tar(A[0], Z[0], A[1], Z[1]), USED, []),
    "labels before images": (b.tar(A[1], Z[1], A[0], Z[0]), USED, []),
    "the same key later": (b.tar(*A, *Z, *b.sample("a", 0)), USED, [("a", "the key comes again in this shard")]),
    "the same key at once": (around(*A), USED, [("a", "png, cls comes again in this sample")]),
    "two labels": (b.tar(*A, *b.sample("x", 1), *Z, ("x.cls", b"2")), USED, [("x", "two labels, 1 and 2")]),
    # labels
    "a label in words": (around(X, ("x.cls", b"cat")), USED, [("x", "'cat' in .cls is not an int")]),
    "a label that is no text": (around(X, ("x.cls", b"\xff\xfe")), USED, [("x", "UnicodeDecode")]),
    "a label of a billion classes": (around(*b.sample("x", 10**9)), USED, [("x", "1000000000 in .cls is larger than")]),
    "a label of a thousand digits": (around(*b.sample("x", 10**999)), USED, [("x", "is larger than 1048575")]),
    "a label of 2 MB": (around(X, ("x.cls", b"1" * 2**21)), USED, [("x", "2097152 bytes, more than")]),
    "JSON nested without end": (
        around(X, ("x.json", b"[" * 10**5)), USED, [("x", "RecursionError")]
    ),
    "JSON that says true": (
        around(X, ("x.json", b'{"label": true}')), USED, [("x", "'True' in .json is not an int")]
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    """Keep these tests in this process, also where another test has started Ray."""
    monkeypatch.setattr(blocks.ray, "is_initialized", lambda: False)


def indexed(folder, max_bad: float = 1.0) -> tuple[pa.Table, list[dict]]:
    return index.index_shards(str(folder), workers=0, max_bad=max_bad)


@pytest.mark.parametrize("kind", SHARDS)
def test_a_broken_shard_is_named_and_the_rest_is_used(tmp_path, kind):
    content, used, expected = SHARDS[kind]
    (tmp_path / "broken.tar").write_bytes(content)
    (tmp_path / "whole.tar").write_bytes(b.tar(*b.sample("w0"), *b.sample("w1", 2)))
    table, bad = indexed(tmp_path)
    assert sorted(table["key"].to_pylist()) == sorted([*used, "w0", "w1"])
    assert [(e["shard"], e["key"]) for e in bad] == [("broken.tar", key) for key, _ in expected]
    for entry, (_, reason) in zip(bad, expected, strict=True):
        assert re.search(reason, entry["reason"])
        assert entry["reason"].isprintable()
    labels = dict(zip(table["key"].to_pylist(), index.labels(table).tolist(), strict=True))
    assert all(
        labels[key] == expected for key, expected in {"a": 0, "z": 2, "w1": 2}.items() if key in labels
    )
    images, in_stream = b.streamed(table)
    assert (sorted(images), in_stream) == (sorted([*used, "w0", "w1"]), {})
    assert all(np.array_equal(i[0].transpose(1, 2, 0), np.asarray(b.pixels())) for i in images.values())


@pytest.mark.parametrize("kind", [k for k, (_, _, expected) in SHARDS.items() if expected])
def test_past_the_limit_one_line_names_the_first(tmp_path, kind):
    (tmp_path / "broken.tar").write_bytes(SHARDS[kind][0])
    with pytest.raises(UserError, match=r"more than the limit of 1.0%; first: broken\.tar") as error:
        indexed(tmp_path, max_bad=0.01)
    assert str(error.value).isprintable()


def test_nothing_is_unpickled_or_executed(tmp_path):
    trap = tmp_path / "sprung"
    code = f"open({str(trap)!r}, 'w')".encode()
    bait = [
        (f"x.{e}", pickle.dumps(b.Trap(str(trap))))
        for e in ("pkl", "pickle", "pth", "pt", "npy", "cls", "json")
    ]
    bait += [(f"x.{e}", code) for e in ("py", "pyd", "so", "sh")]
    (tmp_path / "s.tar").write_bytes(
        b.tar(*A, *bait, *b.sample("y"), ("y.pkl", bait[0][1]), ("y.py", code), *Z)
    )
    table, bad = indexed(tmp_path)
    assert (table["key"].to_pylist(), [e["key"] for e in bad]) == (["a", "y", "z"], ["x"])
    assert sorted(b.streamed(table)[0]) == ["a", "y", "z"]
    assert not trap.exists()
    pickle.loads(bait[0][1])
    assert trap.exists(), "the trap works"


def test_claims_take_no_memory(tmp_path):
    """Tars of 2 GiB on a sparse disk, whose headers claim all of it as a name."""
    for i, kind in enumerate((b"L", b"K", b"x", b"g")):
        with open(tmp_path / f"{i}.tar", "wb") as file:
            file.write(b.tar(*A)[: b.tar(*A).index(b"a.cls") + 1024] + b.header("x", 2**31 - 8192, kind))
            file.truncate(2**31)
    tracemalloc.start()
    table, bad = indexed(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(table), len(bad)) == (4, 4)
    assert peak < 8 * 2**20


PACKERS = {
    ".tar.gz": gzip.compress,
    ".tgz": gzip.compress,
    ".tar.bz2": bz2.compress,
    ".tar.xz": lzma.compress,
}


@pytest.mark.parametrize("extension", PACKERS)
def test_a_compressed_tar_gives_the_same_images(tmp_path, extension):
    (tmp_path / "a.tar").write_bytes(WHOLE)
    plain, _ = indexed(tmp_path)
    expected = first_batch(plain)
    (tmp_path / "a.tar").unlink()
    (tmp_path / f"a{extension}").write_bytes(PACKERS[extension](WHOLE))
    table, bad = indexed(tmp_path)
    assert bad == []
    assert index.packed_shards(table) == 1
    assert table.drop_columns(["shard"]).equals(plain.drop_columns(["shard"]))
    assert torch.equal(first_batch(table), expected)
    (tmp_path / "a.tar").write_bytes(WHOLE)  # unpacked beside it: that one counts
    assert indexed(tmp_path)[0].equals(plain)


def first_batch(table: pa.Table) -> torch.Tensor:
    stream = Stream(table, seed=0, global_batch=len(table), size=8, views=["weak"], cache="none")
    return next(iter(stream.epoch(0))).image


@pytest.mark.parametrize("extension", PACKERS)
@pytest.mark.parametrize("damage", ["cut", "bytes", "no archive"])
def test_a_damaged_compressed_tar_is_named_and_the_rest_is_used(tmp_path, extension, damage):
    packed = bytearray(PACKERS[extension](WHOLE))
    if damage == "bytes":
        packed[len(packed) // 2 :: 3] = bytes(len(packed[len(packed) // 2 :: 3]))
    content = {"cut": packed[: len(packed) // 2], "bytes": packed, "no archive": b"<html>"}[damage]
    (tmp_path / f"x{extension}").write_bytes(content)
    (tmp_path / "y.tar").write_bytes(WHOLE)
    table, bad = indexed(tmp_path)
    assert len(table) == 2
    assert [(e["shard"], e["key"]) for e in bad] == [(f"x{extension}", None)]
    assert bad[0]["reason"].isprintable()


def test_a_compressed_tar_that_breaks_after_it_was_indexed_costs_its_images(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(WHOLE))
    (tmp_path / "y.tar").write_bytes(WHOLE)
    table, _ = indexed(tmp_path)
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(WHOLE)[:-200])
    stream = Stream(table, seed=0, global_batch=4, size=8, views=["weak"], cache="none", max_bad=0.5)
    assert len(next(iter(stream.epoch(0))).index) >= 2
    assert all("cut short" in entry["reason"] for entry in stream.bad)


def test_a_kind_of_compression_that_nothing_reads_is_named(tmp_path):
    (tmp_path / "x.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + b"\0" * 600)
    (tmp_path / "y.tar").write_bytes(WHOLE)
    table, bad = indexed(tmp_path)
    assert (len(table), [(e["shard"], e["key"]) for e in bad]) == (2, [("x.tar.zst", None)])
    assert "unpack it" in bad[0]["reason"]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_tar_of_any_damage_is_a_report(tmp_path_factory, data):
    content = bytearray(b.tar(*A, *b.sample("m", 1), *b.sample(LONG), *Z, format=tarfile.PAX_FORMAT))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "s.tar"
    path.write_bytes(content)
    table, bad = scan.index_shard(LOCAL, str(path))  # any error, or an endless loop, fails the test
    assert len(table) + len(bad) >= 1
    assert all(e["reason"].isprintable() for e in bad)


# -- the index -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name in "pq":
        (tmp_path / f"{name}.tar").write_bytes(
            b.tar(*[m for i in range(4) for m in b.sample(f"{name}{i}", i)])
        )
    index.write_index(indexed(tmp_path)[0], str(tmp_path))
    return tmp_path


def change(table: pa.Table, column: str, values: list, kind: pa.DataType | None = None) -> pa.Table:
    place = table.schema.get_field_index(column)
    return table.set_column(place, column, pa.array(values, kind or table.schema.field(column).type))


BROKEN_INDEX = {
    "a shard out of the folder": (lambda t: change(t, "shard", ["../p.tar"] * 8), "no place in its folder"),
    "an absolute shard": (lambda t: change(t, "shard", ["/etc/passwd"] * 8), "no place in its folder"),
    "a shard elsewhere": (lambda t: change(t, "shard", ["s3://b/p.tar"] * 8), "no place in its folder"),
    "no offset": (lambda t: change(t, "offset", [None] * 8), "lacks 8 values of 'offset'"),
    "a label without a name": (lambda t: change(t, "label", [9] * 8), "label 9 and 4 class names"),
    "offsets in words": (lambda t: change(t, "offset", ["x"] * 8, pa.string()), "not a readable index"),
    "a column missing": (lambda t: t.drop_columns("size"), "not a readable index"),
    "metadata that is no JSON": (lambda t: t.replace_schema_metadata({"isd_ray": "{"}), "not a readable index"),
    "metadata without classes": (lambda t: t.replace_schema_metadata({"isd_ray": '{"format": 1}'}), "not a readable"),
    "metadata that is a list": (lambda t: t.replace_schema_metadata({"isd_ray": "[1]"}), "not a readable index"),
    "a format to come": (
        lambda t: t.replace_schema_metadata({"isd_ray": json.dumps({"format": 2})}), "format 2, this version reads 1"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN_INDEX)
def test_a_broken_index_is_refused_in_one_line(folder, kind):
    make, reason = BROKEN_INDEX[kind]
    pq.write_table(make(index.read_index(str(folder))), folder / "index.parquet")
    with pytest.raises(UserError, match=reason) as error:
        index.read_index(str(folder))
    assert str(error.value).isprintable()
    assert str(folder) in str(error.value)


def test_a_label_without_a_name_is_named(folder):
    with pytest.raises(UserError, match=r"label 3 has no name: 2 class names were given \(of p3 in p.tar\)"):
        index.index_shards(str(folder), classes=["a", "b"], workers=0)


def test_an_index_of_another_set_ends_the_run_in_one_line(folder):
    table = index.read_index(str(folder))
    other = change(table, "shard", ["elsewhere.tar"] * 8)
    with pytest.raises(UserError, match=r"8 of 8 .*p\d in elsewhere.tar \(the shard is missing\)"):
        next(Stream(other, seed=0, global_batch=8, size=8, views=["weak"]).epoch(0))


@pytest.mark.parametrize("damage", ["vanished", "cut", "emptied", "rewritten", "a folder"])
def test_a_shard_that_changes_between_epochs_is_named(folder, damage):
    table, path = index.read_index(str(folder)), folder / "q.tar"
    stream = Stream(table, seed=0, global_batch=8, size=8, views=["weak"], cache="none", max_bad=0.5)
    assert len(next(stream.epoch(0)).index) == 8
    content = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "vanished":
        new = {
            "cut": content[: content.index(b"q2.png") + 520],
            "emptied": b"",
            "rewritten": b.tar(("x.txt", b"x" * 999), *A) * 3,
        }
        path.write_bytes(new[damage])
    (batch,) = stream.epoch(1)
    lost = 2 if damage == "cut" else 4
    assert len(batch.index) == 8 - lost
    assert sorted({e["shard"] for e in stream.bad}) == ["q.tar"]
    expected = {
        "vanished": "the shard is missing",
        "cut": "the shard ends .* bytes before the image does",
        "emptied": "the shard ends",
        "rewritten": "the index does not fit the shard",
        "a folder": "the shard cannot be read",
    }
    assert all(re.search(expected[damage], e["reason"]) for e in stream.bad)
    assert all(e["reason"].isprintable() for e in stream.bad)
