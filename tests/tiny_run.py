"""The tiny set, options of a run on it that takes seconds, and a sweep of such runs."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

SIDE = 16  # pixels
CLASSES = 4
GOAL = "student.knn20"
OWN = ("name", "output", "train.epochs", "train.threads", "evaluate.enabled")  # a sweep sets them itself


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


def tiny_space(shards: Path, **change: Any) -> dict[str, Any]:
    """A space of seconds a trial, on the tiny set."""
    config = {k: v for k, v in options_of_tiny_run(shards, Path("unused")).items() if k not in OWN}
    return {
        "config": config,
        "space": {
            "method.temperature": {"loguniform": [0.02, 0.5]},
            "train.lr": {"loguniform": [0.005, 0.5]},
        },
        "goals": [GOAL],
        "validation": {"per_class": 10, "every": 1},
        "budget": {"trials": 5, "epochs": 4},
        "scheduler": {"name": "asha", "grace": 1, "factor": 2},
        "sampler": {"startup": 3},
        "confirm": {"best": 1, "seeds": 1},
        "resources": {"cpus": 1, "concurrent": 1},
    } | change


def gratings(count: int, seed: int) -> pa.Table:
    """Return `count` images of each class with their labels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    rows = []
    for label in range(CLASSES):
        for i in range(count):
            wave = np.sin((x * (label + 1) + y * (CLASSES - label)) / 3 + rng.uniform(0, 6))
            image = np.clip(128 + 60 * wave[..., None] + rng.normal(0, 20, (SIDE, SIDE, 3)), 0, 255)
            buffer = io.BytesIO()
            Image.fromarray(image.astype(np.uint8)).save(buffer, "PNG")
            rows.append({"key": f"{label}/{i}", "label": label, "image": buffer.getvalue()})
    return pa.Table.from_pylist(rows)
