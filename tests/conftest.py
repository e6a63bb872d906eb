"""Shared by all tests: one thread a process (the machine's cores are shared by workers) and the place of real data."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

REAL_DATA = Path(os.environ.get("ISD_RAY_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real images as Parquet; tests that need it skip where it is missing."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real images at {REAL_DATA}; set ISD_RAY_TEST_DATA to their folder")
    return REAL_DATA
