"""What a trial leaves behind when it fails, and what is said of a process that died."""

from typing import Any

import pytest

from isd_ray import room as rooms
from isd_ray.errors import UserError
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


def test_room_is_what_whole_trials_find_on_single_nodes(monkeypatch):
    """Four CPUs on two nodes of two hold no trial of three; Ray would wait for one for ever."""

    def room(workers: int, nodes: list[dict[str, float]], **resources: float) -> tuple[int, float]:
        total = {unit: sum(node.get(unit, 0.0) for node in nodes) for unit in ("CPU", "GPU")}
        monkeypatch.setattr(rooms.ray, "cluster_resources", lambda: total)
        monkeypatch.setattr(rooms.ray, "nodes", lambda: [{"Alive": True, "Resources": n} for n in nodes])
        return rooms.room("trial", workers=workers, **resources)  # type: ignore[arg-type]

    two, graphics = [{"CPU": 2.0}, {"CPU": 2.0}], [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0}]
    assert room(0, two, cpus=1) == (3, 0.0)  # one CPU reads images
    assert room(0, two, cpus=2) == (1, 0.0)
    assert room(2, two, cpus=1) == (1, 0.0)
    assert room(0, graphics, cpus=1, gpus=0.5) == (2, 0.5)
    assert room(0, graphics, cpus=1) == (1, 1.0)
    for workers, nodes, resources in (
        (0, two, {"cpus": 3}),
        (0, [{"CPU": 1.0, "GPU": 1.0}, {"CPU": 8.0}], {"cpus": 2, "gpus": 1.0}),
        (3, [{"CPU": 3.0}, {"CPU": 3.0}, {"CPU": 1.0}, {"CPU": 1.0}], {"cpus": 2}),
    ):
        with pytest.raises(UserError, match="more than the nodes of this cluster hold"):
            room(workers, nodes, **resources)
    with pytest.raises(UserError, match="a trial takes 4 CPUs and this cluster has 4, 1 of which"):
        room(0, [{"CPU": 4.0}], cpus=4)
