"""Shared by all tests: one thread a process (the machine's cores are shared by workers) and the place of real data."""

import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tiny_run import gratings, options_of_tiny_run

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault(
    "RAY_worker_niceness", "0"
)  # Ray's 15 lets tests starve beside other work on the machine
for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
    os.environ[name] = "test"  # the stores of the tests on loopback take any, and no other may be sent
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--long` (make faults, make fuzz) runs what takes longer than the suite should."""
    parser.addoption("--long", action="store_true", help="also tests marked long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:  # what one process runs (`-n 2 --dist loadgroup`): a file, or all of the fuzz suite
        item.add_marker(
            pytest.mark.xdist_group("fuzz" if item.path.parent.name == "fuzz" else str(item.path))
        )
    skip = pytest.mark.skip(reason="a long form: give --long")
    for item in items if not config.getoption("--long") else []:
        if "long" in item.keywords:
            item.add_marker(skip)


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


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory) -> Path:
    """Four classes of noisy gratings, 16 px: 40 training and 12 test images a class, in several shards."""
    from isd_ray.data.shards import make_shards

    folder = tmp_path_factory.mktemp("tiny")
    for split, count in (("train", 40), ("test", 12)):
        pq.write_table(gratings(count, seed=len(split)), folder / f"{split}.parquet")
        make_shards(
            str(folder / f"{split}.parquet"), str(folder / "shards"), split=split, shard_size=50, workers=0
        )
    return folder / "shards"


@pytest.fixture
def tiny_options(tiny_shards, tmp_path) -> dict[str, Any]:
    """Options of a run of seconds, in a folder of the test's own."""
    return options_of_tiny_run(tiny_shards, tmp_path)
