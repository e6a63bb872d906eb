"""Shards that are deleted, cut or exchanged while a run reads them."""

import shutil
from pathlib import Path

import pytest
from faulty import Job, ends_well, last_checkpoint, same_bits

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def own_shards(tiny_shards, tmp_path) -> Path:
    """A copy of the tiny set, to be damaged."""
    return Path(shutil.copytree(tiny_shards, tmp_path / "shards"))


def delete(shards: list[Path]) -> None:
    shards[0].unlink()


def cut(shards: list[Path]) -> None:
    with shards[0].open("r+b") as file:
        file.truncate(shards[0].stat().st_size // 2)


def exchange(shards: list[Path]) -> None:
    content = [shard.read_bytes() for shard in shards[:2]]
    for shard, other in zip(shards[:2], reversed(content), strict=True):
        shard.write_bytes(other)


@pytest.mark.parametrize(
    ("damage", "workers"),
    [
        pytest.param(exchange, 0, marks=pytest.mark.long),
        pytest.param(delete, 0, marks=pytest.mark.long),
        pytest.param(cut, 0, marks=pytest.mark.long),
        pytest.param(delete, 1, marks=pytest.mark.long),
        pytest.param(cut, 1, marks=pytest.mark.long),
        pytest.param(exchange, 1, marks=pytest.mark.long),
    ],
    ids=lambda x: x if isinstance(x, int) else x.__name__,
)
def test_shards_that_change_are_named_and_once_mended_nothing_is_lost(
    options, home, untouched, own_shards, tiny_shards, damage, workers
):
    """Read anew in every epoch, and no broken image is allowed."""
    options |= {"data.shards": str(own_shards), "data.cache": "none", "data.max_bad": 0.0}
    options |= {"train.workers": workers}
    shards = sorted(own_shards.rglob("train*.tar"))
    job = Job(options, home)
    job.at(12)
    damage(shards)
    ends_well(job, 2)
    assert any(shard.name in job.complaints()[0] for shard in shards)
    shutil.copytree(tiny_shards, own_shards, dirs_exist_ok=True)
    job = Job(options, home)
    ends_well(job, 0)
    assert same_bits(last_checkpoint(job.folder), untouched)
