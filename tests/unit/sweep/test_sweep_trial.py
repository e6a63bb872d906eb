"""What a trial leaves behind when it fails, and what is said of a process that died."""

from typing import Any

import pytest

from isd_ray.sweep import trial
from isd_ray.sweep.search import FAILURE
from isd_ray.train.cluster import WorkerDied, why_it_died
from isd_ray.train.folder import RunFolder

DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: RayTrainWorker
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: End of file.
"""


def failing(monkeypatch, error: Exception, tmp_path) -> list[Any]:
    """Run a job of one run that fails with this error; returns what it returned."""

    class Config:
        output, name = str(tmp_path), "seed-0"

    def fail(*_: Any) -> bool:
        raise error

    monkeypatch.setattr(trial, "train_to_the_end", fail)
    return [trial.run_job([Config()], None, lambda *_: False)]


def test_an_error_is_returned_and_a_death_is_raised_for_tune_to_count(monkeypatch, tmp_path):
    folder = RunFolder(str(tmp_path / "seed-0"))
    assert failing(monkeypatch, ValueError("no\nsense"), tmp_path) == ["ValueError: no"]
    assert folder.read_json(FAILURE)["reason"] == "ValueError: no"
    with pytest.raises(WorkerDied):
        failing(monkeypatch, WorkerDied("its process ended: x"), tmp_path)
    assert folder.read_json(FAILURE)["reason"] == "its process ended: x"


def test_a_death_is_told_in_one_line():
    assert why_it_died(DIED) == "its process ended: The actor is dead because its worker process has died"
    assert why_it_died("Killed by somebody.\n") == "its process ended: Killed by somebody"
    assert why_it_died("") == "its process ended: no reason was given"
