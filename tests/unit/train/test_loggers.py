"""The loggers are given name, options and numbers; a missing package is one line."""

import sys
from types import SimpleNamespace

import pytest

from isd_ray.errors import UserError
from isd_ray.train.loggers import open_loggers


def test_both_get_the_numbers(monkeypatch):
    seen = []
    session = SimpleNamespace(log=lambda numbers, step: seen.append(("wandb", step, numbers)))
    wandb = SimpleNamespace(init=lambda **given: seen.append(given["id"]) or session)
    mlflow = SimpleNamespace(
        start_run=lambda run_name: seen.append(run_name),
        log_params=lambda options: seen.append(options),
        log_metrics=lambda numbers, step: seen.append(("mlflow", step, numbers)),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for send in open_loggers(["wandb", "mlflow"], "run", {"train.lr": 0.1}):
        send(3, {"loss": 0.5})
    numbers = [("wandb", 3, {"loss": 0.5}), ("mlflow", 3, {"loss": 0.5})]
    assert seen == ["run", "run", {"train.lr": 0.1}, *numbers]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"--train.loggers wandb.*isd-ray\[loggers\]"):
        open_loggers(["wandb"], "run", {})
