"""A trial whose process is killed goes on from its checkpoint, or is recorded with its reason; no other is lost."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_space

from isd_ray.sweep import tune
from isd_ray.sweep.run import sweep
from isd_ray.sweep.search import Job
from isd_ray.sweep.space import Space

Kill = Callable[[Job, dict[str, Any], int], None]  # (job, its row, process of the trial)


@pytest.fixture
def at_every_row(monkeypatch) -> Callable[[Kill], None]:
    """Let a function act at every row of a trial, while the trial's process waits for the search."""

    def install(act: Kill) -> None:
        real = tune._Stop.on_trial_result

        def listening(self: Any, controller: Any, trial: Any, result: dict[str, Any]) -> str:
            decision = real(self, controller, trial, result)
            if "row/epoch" in result and not result.get("done"):
                row = {"epoch": result["row/epoch"], "seed": result["row/seed"]}
                act(self.jobs.by_trial[trial.trial_id], row, result["pid"])
            return decision

        monkeypatch.setattr(tune._Stop, "on_trial_result", listening)

    return install


def worker_of(trial: int) -> int:
    """Process of the one Ray Train worker that stems from the same Ray as a trial's process."""
    raylet = subprocess.run(["ps", "-o", "ppid=", str(trial)], capture_output=True, text=True).stdout.strip()
    found = subprocess.run(["pgrep", "-P", raylet, "-f", "RayTrainWorker"], capture_output=True, text=True)
    (worker,) = found.stdout.split()
    return int(worker)


def space_of_two(shards: Path, **change: Any) -> Space:
    """The default and one more, two epochs each, one at a time."""
    content = tiny_space(
        shards,
        space={"train.lr": {"choice": [0.05, 0.02]}},
        start=[{"train.lr": 0.02}],
        budget={"trials": 2, "epochs": 2},
        scheduler={"name": "none"},
        confirm={"best": 0, "seeds": 0},
    )
    return Space(**content | change)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_trial_goes_on_or_is_recorded(ray_session, tiny_shards, tmp_path, at_every_row):
    """Trial 0 is killed once and may start once more; trial 1 is killed every time."""
    seen: list[tuple[int, int]] = []

    def kill(job: Job, row: dict[str, Any], process: int) -> None:
        seen.append((job.number, row["epoch"]))
        if row["epoch"] == 2 and (job.number == 1 or seen.count((0, 2)) == 1):
            os.kill(process, signal.SIGKILL)

    at_every_row(kill)
    resources = {"cpus": 1, "concurrent": 2, "retries": 1}
    outcome = sweep(space_of_two(tiny_shards, resources=resources), "killed", str(tmp_path))
    assert [t.state for t in outcome.trials] == ["finished", "failed"]
    assert (
        outcome.trials[1].reason == "its process ended: The actor is dead because its worker process has died"
    )
    for number in (0, 1):
        told = [epoch for n, epoch in seen if n == number]
        assert told == [1, 2, 1, 2], (
            "a trial goes on from its checkpoint, and its search hears what was before"
        )
    assert [epoch for epoch, _ in outcome.trials[0].curves[0]] == [1, 2]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_trial_on_workers_that_dies_leaves_room_for_the_next(
    ray_session, tiny_shards, tmp_path, at_every_row
):
    """Trial 0 loses its own process, trial 1 its worker. No two workers fit at once: what a dead one leaves reserved
    would stop the sweep for ever."""
    space = space_of_two(tiny_shards, resources={"cpus": 2, "concurrent": 1, "retries": 0})
    space.space["train.lr"]["choice"].append(0.01)
    space.budget.trials, space.budget.epochs = 3, 1
    space.config["train.workers"] = 1

    def kill(job: Job, row: dict[str, Any], process: int) -> None:
        if job.number < 2:
            os.kill(worker_of(process) if job.number else process, signal.SIGKILL)

    at_every_row(kill)
    outcome = sweep(space, "workers", str(tmp_path))
    assert [t.state for t in outcome.trials] == ["failed", "failed", "finished"]
    died = "its process ended: The actor is dead because its worker process has died"
    of_worker = f"a worker: {died}; the same command goes on"
    assert [t.reason for t in outcome.trials] == [died, of_worker, None]
