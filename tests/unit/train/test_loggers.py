"""Trackers get the log, what is measured on the way and the result; none ends a training."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from isd_ray.config import Config, flatten, resolve
from isd_ray.errors import UserError
from isd_ray.train.folder import RunFolder
from isd_ray.train.loggers import open_loggers, run_id, run_name, send_result

TRIAL = "/runs/sweep-isd/trials/0003/seed-0"


class WandB(SimpleNamespace):
    """Stands for the package: keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(told=[], broken=False)

    def init(self, **given: Any) -> "WandB":
        if self.broken:
            raise RuntimeError("api_key not configured\n(no-tty)")
        self.told.append(given)
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        if self.broken:
            raise ConnectionError("no route")
        self.told.append((step, numbers))

    def finish(self, exit_code: int) -> None:
        self.told.append(exit_code)


class MLflow(SimpleNamespace):
    """Stands for the package: one experiment, whose runs have ids of MLflow's own."""

    def __init__(self) -> None:
        super().__init__(runs={}, active=None)

    def search_runs(self, filter_string: str, max_results: int, output_format: str) -> list[Any]:
        found = [r for r in self.runs.values() if repr(r.tags["isd_ray.run"]) in filter_string]
        return found[:max_results]

    def start_run(self, run_id: str = "", run_name: str = "", tags: Any = None) -> None:
        assert self.active is None, "MLflow refuses a second run at once"
        if not run_id:
            run_id = f"own-{len(self.runs)}"
            info, own = SimpleNamespace(run_id=run_id), {"name": run_name, "tags": tags}
            self.runs[run_id] = SimpleNamespace(info=info, rows=[], params=[], **own)
        self.active = self.runs[run_id]

    def log_params(self, options: dict[str, Any]) -> None:
        self.active.params.append(options)

    def log_metrics(self, numbers: dict[str, float], step: int) -> None:
        self.active.rows.append((step, numbers))

    def end_run(self, status: str) -> None:
        self.active.status, self.active = status, None


@pytest.fixture
def trackers(monkeypatch: pytest.MonkeyPatch) -> tuple[WandB, MLflow]:
    wandb, mlflow = WandB(), MLflow()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    return wandb, mlflow


def config(*loggers: str) -> Config:
    return resolve({"train.loggers": list(loggers)})


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {n: [(e.step, e.value) for e in board.Scalars(n)] for n in board.Tags()["scalars"]}


def test_all_get_the_log_what_is_measured_and_the_result(tmp_path, trackers):
    wandb, mlflow = trackers
    given, folder, out = config("wandb", "mlflow"), RunFolder(str(tmp_path / "run")), io.StringIO()
    for start in (0, 4):  # stopped and continued
        loggers = open_loggers(given, folder, out, start)
        no_numbers = {"nan": float("nan"), "note": "text", "on": True}
        loggers.row(start + 4, {"loss": 0.5, "epoch": 1, **no_numbers})
        loggers.row(start + 4, {"student.knn20": 40.0, "student.knn5": None}, "validation/")
        loggers.finish(failed=start == 0)
        loggers.finish()
    folder.write("checkpoints/step-00000008.pt", b"")
    result = {
        "metrics": {"student": {"knn20": 60.0, "linear": None}},
        "groups": {"student": {"knn20": {"few": 10.0}, "linear": None}},
    }
    send_result(given, folder, result, out)
    rows = []
    for step in (4, 8):
        rows += [(step, {"loss": 0.5, "epoch": 1.0}), (step, {"validation/student.knn20": 40.0})]
    last = (8, {"result/student.knn20": 60.0, "result/student.knn20.few": 10.0})
    begun = {"name": run_name(folder.uri), "id": run_id(folder.uri), "resume": "allow"}
    begun |= {"config": flatten(given.model_dump())}
    assert wandb.told == [begun, *rows[:2], 1, begun, *rows[2:], 0, begun, last, 0]
    (run,) = mlflow.runs.values()  # one run there, however often it was continued
    assert (run.name, run.status) == (run_name(folder.uri), "FINISHED")
    assert run.rows == [*rows, last]
    assert run.params == [flatten(given.model_dump())]
    assert scalars(tmp_path / "run") == {
        "loss": [(4, 0.5), (8, 0.5)],
        "epoch": [(4, 1.0), (8, 1.0)],
        "validation/student.knn20": [(4, 40.0), (8, 40.0)],
        "result/student.knn20": [(8, 60.0)],
        "result/student.knn20.few": [(8, 10.0)],
    }
    assert out.getvalue() == ""


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    folder = RunFolder(str(tmp_path))
    for start, value in ((0, 1.0), (2, 5.0)):
        loggers = open_loggers(config(), folder, io.StringIO(), start)
        for step in range(start + 1, start + 4):
            loggers.row(step, {"loss": value})
        loggers.finish()
    assert scalars(tmp_path) == {"loss": [(1, 1), (2, 1), (3, 5), (4, 5), (5, 5)]}


def test_a_remote_folder_has_no_tensorboard_and_that_is_said(tmp_path):
    out, folder = io.StringIO(), SimpleNamespace(local=False, uri="s3://bucket/runs/x")
    loggers = open_loggers(config(), folder, out)
    assert loggers.places == {}
    assert out.getvalue().startswith("note: TensorBoard's files are for local folders alone")
    assert len(out.getvalue().splitlines()) == 1
    again = io.StringIO()
    open_loggers(config(), folder, again, step=5)
    assert again.getvalue() == ""


def test_runs_of_sweeps_and_studies_have_ids_of_their_own():
    places = [TRIAL, TRIAL.replace("0003", "0004"), TRIAL.replace("sweep-isd", "sweep-moco")]
    places += ["/runs/study-a/cells/x-seed0", "/runs/study-b/cells/x-seed0", "s3://b/runs/x"]
    places += [f"/{user}{TRIAL}" for user in "ab"]
    assert len({run_id(place) for place in places}) == len(places)
    assert run_id(TRIAL) == run_id(TRIAL)
    assert run_name(TRIAL) == "sweep-isd/trials/0003/seed-0"
    assert run_id(TRIAL).startswith("sweep-isd-trials-0003-seed-0-")


@given(st.text(min_size=1))
def test_an_id_is_one_that_trackers_take(place):
    assert set(run_id(place)).isdisjoint("/\\#?%:' ")
    assert run_id(place).isascii()
    assert len(run_id(place)) <= 128


def test_a_missing_package_is_named_with_one_that_is_published(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"--train.loggers wandb: .*pip install wandb "):
        open_loggers(config("wandb"), RunFolder(str(tmp_path)), io.StringIO())


def test_a_tracker_that_does_not_start_is_one_line(tmp_path, trackers):
    trackers[0].broken = True
    with pytest.raises(UserError, match=r"--train.loggers wandb: .*not configured \(no-tty\)"):
        open_loggers(config("wandb"), RunFolder(str(tmp_path)), io.StringIO())


def test_a_result_that_cannot_be_sent_is_a_line(tmp_path, trackers):
    wandb, _ = trackers
    wandb.broken, out, folder = True, io.StringIO(), RunFolder(str(tmp_path))
    folder.write("checkpoints/step-00000008.pt", b"")
    result = {"metrics": {"student": {"knn20": 60.0}}}
    send_result(config("wandb"), folder, result, out)
    assert out.getvalue().startswith("note: the result is not sent: --train.loggers wandb: ")
    send_result(config("wandb"), folder, {"metrics": {}, "note": "no test set"}, out)
    assert len(out.getvalue().splitlines()) == 1


def test_a_tracker_that_fails_on_the_way_is_left_out_with_a_line(tmp_path, trackers):
    wandb, mlflow = trackers
    out = io.StringIO()
    loggers = open_loggers(config("wandb", "mlflow"), RunFolder(str(tmp_path)), out)
    wandb.broken = True
    for step in (1, 2):
        loggers.row(step, {"loss": 1.0})
    loggers.finish()
    assert out.getvalue() == "note: wandb fails and gets nothing more (no route)\n"
    assert [step for step, _ in next(iter(mlflow.runs.values())).rows] == [1, 2]
