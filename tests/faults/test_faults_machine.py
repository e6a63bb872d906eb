"""A disk that is full for a while, a store that is away for a while, and two commands that want one folder."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faulty import Job, ends_well, last_checkpoint, same_bits
from faulty_store import BUCKET, Proxy, faulty_store

from isd_ray.train.folder import RunFolder, checkpoint_names

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 24 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_loses_nothing(options, home, untouched, small_disk):
    options |= {"output": str(small_disk)}
    job = Job(options, home)
    job.at(10)
    with (small_disk / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(2**16)):
                pass
        except OSError:
            pass
    ends_well(job, 3)
    assert "the disk is full" in job.complaints()[0]
    (small_disk / "filler").unlink()
    job = Job(options, home)
    ends_well(job, 0)
    assert same_bits(last_checkpoint(job.folder), untouched)


@pytest.fixture
def store(tiny_shards) -> Iterator[Proxy]:
    """An S3 server on the loopback device, behind a proxy that can fail."""
    with faulty_store(tiny_shards / "train") as proxy:
        yield proxy


class StoredJob(Job):
    """A job whose run lies in a store."""

    def steps(self) -> int:
        names = checkpoint_names(RunFolder(self.uri))
        return int(names[-1][5:13]) if names else 0


@pytest.fixture
def stored(options, home, store) -> Callable[..., StoredJob]:
    """Start a job whose data and output are in the store, which is named with its parameters."""
    place = f"endpoint_override=127.0.0.1:{store.server_port}&scheme=http&region=us-east-1"
    options |= {"data.shards": f"s3://{BUCKET}/set?{place}", "output": f"s3://{BUCKET}/runs?{place}"}
    options |= {"train.checkpoint_seconds": 1, "train.log_every": 5}

    def job(workers: int) -> StoredJob:
        started = StoredJob(options | {"train.workers": workers}, home)
        started.uri = f"s3://{BUCKET}/runs/run?{place}"
        return started

    return job


def is_whole(job: StoredJob, untouched: bytes) -> None:
    """What a run leaves in the store, and nothing of Ray's."""
    folder = RunFolder(job.uri)
    assert same_bits(folder.read(f"checkpoints/{checkpoint_names(folder)[-1]}"), untouched)
    assert folder.exists("result.json")
    assert not [name for name in folder.names(files=False) if name.startswith(".ray-")]


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 1])
def test_a_store_that_is_away_loses_nothing(stored, untouched, store, workers):
    job = stored(workers)
    job.at(5)
    store.broken = True
    ends_well(job, 3)
    assert "store" in job.complaints()[0]
    store.broken = False
    again = stored(workers)
    ends_well(again, 0)
    is_whole(again, untouched)


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 1])
def test_a_store_that_comes_back_in_time_is_not_noticed(stored, untouched, store, workers):
    job = stored(workers)
    job.at(5)
    store.counts.clear()
    store.broken = True
    job.until(lambda: sum(store.counts.values()) >= 3, "requests that failed")
    store.broken = False
    ends_well(job, 0)
    is_whole(job, untouched)


@pytest.mark.long
def test_two_commands_of_one_name(options, home):
    options |= {"train.epochs": 100_000}
    first = Job(options, home)
    first.until(lambda: (first.folder / "config.yaml").exists(), "the run's folder")
    second = Job(options, home)
    ends_well(second, 2)
    assert "another process" in second.complaints()[0]
    first.hurt("driver", signal.SIGTERM)
    ends_well(first, 143)


@pytest.mark.long
@pytest.mark.parametrize("script", ["sweep", "compare"])
def test_two_sweeps_or_studies_of_one_name(tiny_shards, home, tmp_path, script):
    import yaml
    from tiny_run import tiny_space

    path = tmp_path / "file.yaml"
    space = tiny_space(tiny_shards)
    study = {
        "methods": {"isd_plus": {}, "moco_v2": {}},
        "baseline": "moco_v2",
        "config": space["config"] | {"train.epochs": 2},
        "seeds": [0],
    }
    path.write_text(yaml.safe_dump(space if script == "sweep" else study))
    given = {"sweep": {"space": str(path)}, "compare": {"study": str(path)}}[script]
    options = given | {"output": str(tmp_path / "runs"), "name": "both"}
    first = Job(options, home, script)
    first.until(lambda: (first.folder / ".isd_ray.json").exists(), "the folder")
    time.sleep(1)
    second = Job(options, home, script)
    ends_well(second, 2)
    ends_well(first, 0)
