"""Parallel Ray tasks write what one process writes, and errors keep their one line."""

import hashlib
from pathlib import Path

import pytest

from isd_ray.data import index
from isd_ray.data.files import AbsentError, list_files
from isd_ray.data.parallel import run_tasks
from isd_ray.data.shards import make_shards
from isd_ray.errors import UserError


def content(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.tar")}


def test_tasks_write_the_same_bytes_as_one_process(ray_session, tmp_path):
    source = "sklearn:digits"
    one = make_shards(source, str(tmp_path / "one"), split="test", shard_size=100, workers=0)
    two = make_shards(source, str(tmp_path / "two"), split="test", shard_size=100, workers=2)
    assert two.equals(one)
    assert len(content(tmp_path / "one" / "test")) == 4
    assert content(tmp_path / "one" / "test") == content(tmp_path / "two" / "test")
    again, bad = index.index_shards(str(tmp_path / "two" / "test"), workers=2)
    assert again.equals(one)
    assert bad == []


def test_a_user_error_in_a_task_stays_one(ray_session, tmp_path):
    (tmp_path / "s.tar").write_bytes(b"garbage")
    with pytest.raises(UserError, match="more than the limit"):
        index.index_shards(str(tmp_path), workers=1)


def test_errors_of_tasks_are_not_wrapped(ray_session):
    with pytest.raises(AbsentError, match="no folder at '/nothing'"):
        run_tasks(list_files, [("/nothing", [".tar"])], workers=1)


def test_results_keep_the_order_of_the_items(ray_session):
    squares = run_tasks(lambda i: i * i, [(i,) for i in range(9)], workers=2)
    assert squares == [i * i for i in range(9)]
