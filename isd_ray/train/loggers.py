"""Metrics also to Weights & Biases or MLflow, where a team looks at them (the extra `loggers` installs both)."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from isd_ray.errors import UserError

Send = Callable[[int, Mapping[str, float]], None]


def open_loggers(names: Sequence[str], run: str, options: Mapping[str, Any]) -> list[Send]:
    """Return a function (step, numbers) for each of "wandb" and "mlflow" in `names`.

    Where they send to is their own business: WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI ... A continued run is
    continued there too (W&B by its name; MLflow begins another run of the same name). Raises UserError where a
    package is not installed.
    """
    return [{"wandb": _wandb, "mlflow": _mlflow}[name](_load(name), run, options) for name in names]


def _load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"--train.loggers {name}: it is not installed; pip install 'isd-ray[loggers]'"
        ) from None


def _wandb(wandb: Any, run: str, options: Mapping[str, Any]) -> Send:
    session = wandb.init(name=run, id=run, resume="allow", config=dict(options))
    return lambda step, numbers: session.log(dict(numbers), step=step)


def _mlflow(mlflow: Any, run: str, options: Mapping[str, Any]) -> Send:
    mlflow.start_run(run_name=run)
    mlflow.log_params(dict(options))
    return lambda step, numbers: mlflow.log_metrics(dict(numbers), step=step)
