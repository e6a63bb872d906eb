"""The options of the runs that are hurt, and a run that is left alone."""

from pathlib import Path
from typing import Any

import pytest
from faulty import Job, ends_well, last_checkpoint
from tiny_run import options_of_tiny_run


@pytest.fixture
def home(tmp_path) -> Path:
    """An empty home, which is also the working folder."""
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def options(tiny_shards, tmp_path) -> dict[str, Any]:
    """Options of a run of 60 steps, slow enough to be hurt in the middle; beside it lies somebody else's folder."""
    (tmp_path / "runs" / "other" / "ray").mkdir(parents=True)
    (tmp_path / "runs" / "other" / "ray" / "precious.txt").write_text("x")
    return options_of_tiny_run(tiny_shards, tmp_path) | {"train.epochs": 6, "train.log_every": 1}


@pytest.fixture(scope="session")
def untouched(tiny_shards, tmp_path_factory) -> bytes:
    """The last checkpoint of a run that was left alone."""
    folder = tmp_path_factory.mktemp("untouched")
    given = options_of_tiny_run(tiny_shards, folder) | {"train.epochs": 6, "train.log_every": 1}
    job = Job(given, folder)
    ends_well(job, 0)
    return last_checkpoint(job.folder)
