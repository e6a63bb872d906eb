"""A tiny labelled data set as shards, and the options of a run on it that takes seconds."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_run import SIDE, options_of_tiny_run

from isd_ray.data.shards import make_shards

CLASSES = 4


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory) -> Path:
    """Four classes of noisy gratings, 16 px: 40 training and 12 test images a class, in several shards."""
    folder = tmp_path_factory.mktemp("tiny")
    for split, count in (("train", 40), ("test", 12)):
        pq.write_table(gratings(count, seed=len(split)), folder / f"{split}.parquet")
        make_shards(
            str(folder / f"{split}.parquet"), str(folder / "shards"), split=split, shard_size=50, workers=0
        )
    return folder / "shards"


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


@pytest.fixture
def tiny_options(tiny_shards, tmp_path) -> dict[str, Any]:
    """Options of a run of seconds, in a folder of the test's own."""
    return options_of_tiny_run(tiny_shards, tmp_path)
