"""ISD on Ray: self-supervised learning for unbalanced, unlabelled images."""

from collections.abc import Mapping
from typing import Any

__version__ = "0.1.0"


def pretrain(options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Train and evaluate one run from Python, as jobs/pretrain.py does; returns what it writes to result.json.

    options: dotted or nested names, e.g. `{"data.dataset": "cifar10_lt", "train.epochs": 40}`, or a
    `isd_ray.config.Config`. Raises `isd_ray.errors.UserError` for options or data that cannot work.
    """
    from isd_ray.config import Config, resolve
    from isd_ray.train.trainer import pretrain as run

    return run(options if isinstance(options, Config) else resolve(options or {}))
