"""ISD on Ray: self-supervised learning for unbalanced, unlabelled images."""

import os
from collections.abc import Mapping
from typing import Any

from isd_ray.version import __version__

__all__ = ["__version__", "pretrain"]

RAY_SETTINGS = {  # Ray reads them when it is imported, hence here; what the user has set stays
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else each line of a worker appears twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the controller's poll; the default of 2 s delays start and end
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # hundreds of lines in a job's log
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune then says nothing where it is asked to: the sweep has a table of its own
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the run folders hold what its CSV, JSON and TensorBoard would
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends a sweep at once; the same command goes on
}
for _name, _value in RAY_SETTINGS.items():
    os.environ.setdefault(_name, _value)


def pretrain(options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Train and evaluate one run from Python, as jobs/pretrain.py does; returns what it writes to result.json.

    options: dotted or nested names, e.g. `{"data.dataset": "cifar10_lt", "train.epochs": 40}`, or a
    `isd_ray.config.Config`. Raises `isd_ray.errors.UserError` for options or data that cannot work.
    """
    from isd_ray.config import Config, resolve
    from isd_ray.train.trainer import pretrain as run

    return run(options if isinstance(options, Config) else resolve(options or {}))
