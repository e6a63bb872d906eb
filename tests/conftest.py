"""Shared by all tests: one thread a process (the machine's cores are shared by workers) and the place of real data."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault(
    "RAY_worker_niceness", "0"
)  # Ray's 15 lets tests starve beside other work on the machine
torch.set_num_threads(1)

REAL_DATA = Path(os.environ.get("ISD_RAY_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real images as Parquet; tests that need it skip where it is missing."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real images at {REAL_DATA}; set ISD_RAY_TEST_DATA to their folder")
    return REAL_DATA


@pytest.fixture(scope="session")
def ray_session():
    """One local Ray for the whole suite: starting it is the dominating cost."""
    import ray

    ray.init(
        "local", num_cpus=4, include_dashboard=False, object_store_memory=512 * 2**20, logging_level="warning"
    )
    yield ray
    ray.shutdown()
