"""A check of shards finds what is wrong with them, names it, and finds nothing where nothing is wrong."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from isd_ray.data import index
from isd_ray.data.verify import verify_shards

ROOT = Path(__file__).parents[3]


def image(side: int = 8, colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (colour, 90, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def sample(key: str, label: int = 0, content: bytes | None = None) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", image() if content is None else content), (f"{key}.cls", str(label).encode())]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two shards of three samples, with their index."""
    for shard in "ab":
        write_tar(tmp_path / f"{shard}.tar", [m for i in range(3) for m in sample(f"{shard}{i}", i)])
    table, _ = index.index_shards(str(tmp_path), workers=0)
    index.write_index(table, str(tmp_path))
    return tmp_path


def reasons(folder: Path) -> list[tuple[str, str | None, str]]:
    return [(f["shard"], f["key"], f["reason"]) for f in verify_shards(str(folder), workers=0).findings]


def test_whole_shards_are_whole(folder):
    report = verify_shards(str(folder), workers=0)
    assert (report.shards, report.images, report.decoded, report.findings) == (2, 6, 6, [])


def test_shards_and_index_name_the_same_files(folder):
    (folder / "b.tar").rename(folder / "c.tar")
    assert reasons(folder) == [
        ("b.tar", None, "the shard is missing"),
        ("c.tar", None, "the shard is not in the index"),
    ]


def test_a_truncated_shard_loses_what_lies_behind_the_cut(folder):
    content = (folder / "b.tar").read_bytes()
    table = index.read_index(str(folder))
    (last,) = (r for r in table.to_pylist() if r["key"] == "b2")
    (folder / "b.tar").write_bytes(content[: last["offset"] + 10])
    found = reasons(folder)
    assert ("b.tar", "b2", "in the index, not in the shard") in found
    assert any(key is None and "truncated" in reason for _, key, reason in found)
    assert any(key == "b2" and "bytes before the image does" in reason for _, key, reason in found)
    assert all(shard == "b.tar" for shard, _, _ in found)


def test_a_shard_that_changed_behind_the_index_is_noticed(folder):
    write_tar(folder / "b.tar", [*sample("b0"), *sample("b1", 7), *sample("b2", 2, image(9)), *sample("b3")])
    found = reasons(folder)
    assert ("b.tar", "b3", "in the shard, not in the index") in found
    assert ("b.tar", "b1", "label 7, the index says 1") in found
    assert any(key == "b2" and "width 9, the index says 8" in reason for _, key, reason in found)


def test_bytes_that_do_not_decode_are_named(folder):
    path = folder / "a.tar"
    content = bytearray(path.read_bytes())
    (row,) = (r for r in index.read_index(str(folder)).to_pylist() if r["key"] == "a1")
    middle = row["offset"] + row["size"] // 2
    content[middle : middle + 12] = b"\xff" * 12  # the header stays as it is: only decoding shows it
    path.write_bytes(content)
    ((shard, key, reason),) = reasons(folder)
    assert (shard, key) == ("a.tar", "a1")
    assert reason


def test_keys_that_repeat_are_named(folder):
    write_tar(folder / "b.tar", [*sample("a0"), *sample("b1", 1), ("a0.txt", b"later"), *sample("b2", 2)])
    table = index.index_shards(str(folder), workers=0, max_bad=0.5)[0]
    index.write_index(table, str(folder))
    found = reasons(folder)
    assert ("a.tar", "a0", "the key comes 2 times: in a.tar, b.tar") in found


def test_an_index_of_another_place_is_noticed(folder):
    table = index.read_index(str(folder))
    moved = table.set_column(2, "offset", pa.array([r + 512 for r in table["offset"].to_pylist()]))
    index.write_index(moved.replace_schema_metadata(table.schema.metadata), str(folder))
    assert sum("offset" in reason for _, _, reason in reasons(folder)) == 6


@pytest.mark.parametrize(("damage", "code"), [(False, 0), (True, 1)])
def test_the_job_says_so_and_exits_accordingly(folder, damage, code):
    if damage:
        (folder / "b.tar").unlink()
    command = [sys.executable, str(ROOT / "jobs/make_shards.py"), "--verify", str(folder), "--workers", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert ("nothing wrong" in done.stdout) == (not damage)
    assert ("b.tar: the shard is missing" in done.stdout) == damage
