"""Rows of a run, what is measured on the way, and how it ends reach files and trackers."""

import io
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_loggers import WandB, scalars

from isd_ray.config import resolve
from isd_ray.train.folder import RunFolder
from isd_ray.train.log import Log
from isd_ray.train.parts import STAGES, Clock
from isd_ray.train.state import Worker

MEASURED = {"step": 2, "epoch": 1, "time": 1e9, "student.knn20": 40.0, "student.knn20.few": 5.0}


def run(folder: RunFolder, fails: bool = False, *loggers: str) -> None:
    """Two steps of one epoch, measured at its end."""
    config = resolve({"train.loggers": list(loggers), "train.log_every": 1, "train.epochs": 1})
    stream: Any = SimpleNamespace(steps=2, take_stages=lambda: dict.fromkeys(STAGES, 0.0))
    cpu = torch.device("cpu")
    with Log(config, folder, Worker(0, 1, cpu, io.StringIO()), stream, 0, Clock(cpu)) as log:
        for step in (1, 2):
            log.add(torch.tensor(1.0 / step))
            log.reduce(step, 0.1, {})
        log.measured(MEASURED)
        log.was_saved()
        if fails:
            raise RuntimeError("the machine breaks")


def test_rows_and_what_is_measured_reach_files_and_tensorboard(tmp_path):
    run(RunFolder(str(tmp_path)))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 0.5)]
    shown = scalars(tmp_path)
    assert shown["loss"] == [(1, 1.0), (2, 0.5)]
    assert shown["validation/student.knn20"] == [(2, 40.0)]
    assert shown["validation/student.knn20.few"] == [(2, 5.0)]
    assert not {"validation/time", "validation/step", "validation/epoch"} & set(shown)


def test_trackers_are_told_how_a_run_ends(tmp_path, monkeypatch):
    ends, measured = [], {n: x for n, x in MEASURED.items() if "." in n}
    for fails in (False, True):
        wandb = WandB()
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        folder = RunFolder(str(tmp_path / str(fails)))
        if fails:
            with pytest.raises(RuntimeError, match="the machine breaks"):
                run(folder, True, "wandb")
        else:
            run(folder, False, "wandb")
        ends.append(wandb.told[-1])
        assert (2, {f"validation/{name}": x for name, x in measured.items()}) in wandb.told
    assert ends == [0, 1]
