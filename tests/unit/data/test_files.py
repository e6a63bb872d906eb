"""Files appear whole or not at all, on local disks and elsewhere."""

import os

import pytest
from pyarrow import fs as pafs

from isd_ray.data import files, index
from isd_ray.data.shards import make_shards
from isd_ray.errors import MachineError, UserError


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A file system that is not local to the code: what bucket://x names lies under tmp_path/bucket."""
    (tmp_path / "bucket").mkdir()
    remote = pafs.SubTreeFileSystem(str(tmp_path / "bucket"), pafs.LocalFileSystem())
    local = files.open_filesystem

    def open_filesystem(uri):
        text = str(uri)
        return (remote, text.removeprefix("bucket://")) if text.startswith("bucket://") else local(text)

    monkeypatch.setattr(files, "open_filesystem", open_filesystem)
    monkeypatch.setattr(index, "open_filesystem", open_filesystem)
    return tmp_path / "bucket"


@pytest.mark.parametrize("place", ["bucket://a/b", "local"])
def test_a_failed_write_leaves_nothing(tmp_path, bucket, place):
    def fail(path):
        with open(path, "w") as file:
            file.write("half")
        raise OSError("disk full")

    folder = place if place != "local" else str(tmp_path / "out")
    with pytest.raises(MachineError, match="disk full"):
        files.write_whole(f"{folder}/x", fail)
    assert files.list_files(folder, [""]) == []
    assert not [n for _, _, names in os.walk(tmp_path) for n in names]
    files.write_text(f"{folder}/x", "whole")
    files.write_text(f"{folder}/x", "new")
    assert files.read_bytes(f"{folder}/x") == b"new"
    assert files.list_files(folder, [""]) == ["x"]


def test_shards_in_a_bucket_are_those_on_disk(tmp_path, bucket):
    there = make_shards("sklearn:digits", "bucket://set", split="test", shard_size=150, workers=0)
    here = make_shards("sklearn:digits", str(tmp_path / "here"), split="test", shard_size=150, workers=0)
    assert there.equals(here)
    assert index.root(index.read_index("bucket://set/test")) == "bucket://set/test"
    for path in (tmp_path / "here" / "test").iterdir():
        if path.suffix == ".tar":
            assert (bucket / "set" / "test" / path.name).read_bytes() == path.read_bytes()
    assert make_shards("sklearn:digits", "bucket://set", split="test", shard_size=150, workers=0).equals(
        there
    )


def test_old_parts_of_killed_runs_are_removed_fresh_ones_stay(tmp_path):
    for name, age in ((".a.tar.00000001.part", 9999), (".b.tar.00000002.part", 0), (".c.part", 9999)):
        (tmp_path / name).write_bytes(b"x")
        stat = (tmp_path / name).stat()
        os.utime(tmp_path / name, (stat.st_atime - age, stat.st_mtime - age))
    files.remove_stale_parts(str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".b.tar.00000002.part", ".c.part"]


def test_expand_folder_glob_and_file(tmp_path):
    for name in ("x_a.parquet", "x_b.parquet", "y.parquet", "z.txt", ".h.parquet"):
        (tmp_path / name).write_bytes(b"")
    assert files.expand(str(tmp_path / "x_*.parquet"), ".parquet") == [
        f"{tmp_path}/x_{c}.parquet" for c in "ab"
    ]
    assert len(files.expand(str(tmp_path), ".parquet")) == 3
    assert files.expand(f"file://{tmp_path}/y.parquet", ".parquet") == [f"file://{tmp_path}/y.parquet"]
    with pytest.raises(UserError, match=r"no \.parquet file at"):
        files.expand(str(tmp_path / "q*.parquet"), ".parquet")
