"""Options of a run on the tiny set that takes seconds."""

from pathlib import Path
from typing import Any

SIDE = 16  # pixels


def options_of_tiny_run(shards: Path, folder: Path) -> dict[str, Any]:
    """Options of a run of 3 epochs of 10 steps on the tiny set, in `folder`."""
    return {
        "output": str(folder / "runs"),
        "name": "run",
        "data.dataset": "shards",
        "data.shards": str(shards),
        "data.image_size": SIDE,
        "model.backbone": "resnet8",
        "model.stem": "stride2",
        "method.name": "isd_plus",
        "queue.size": 32,
        "train.epochs": 3,
        "train.batch_size": 16,
        "train.threads": 1,
        "train.workers": 0,
        "train.log_every": 2,
        "train.checkpoint_seconds": 0.0,
        "evaluate.enabled": False,
    }
