"""The stream through Ray Data gives what the same operator gives without Ray, and survives what tasks can do."""

import io
import json
import os
import tarfile
import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from isd_ray.data import blocks
from isd_ray.data.stream import Stream, ordered
from isd_ray.errors import UserError


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> pa.Table:
    """An index of 200 images in 4 shards, of two sizes."""
    folder = tmp_path_factory.mktemp("shards")
    columns: dict[str, list] = {
        name: [] for name in ("shard", "key", "offset", "size", "label", "width", "height")
    }
    generator = np.random.default_rng(0)
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(50 * shard, 50 * shard + 50):
                side = 24 + i % 2
                buffer = io.BytesIO()
                Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(
                    buffer, "PNG"
                )
                member = tarfile.TarInfo(f"{i}.png")
                member.size = len(buffer.getvalue())
                row = (f"{shard}.tar", str(i), tar.offset + 512, member.size, i % 5, side, side)
                tar.addfile(member, io.BytesIO(buffer.getvalue()))
                for name, value in zip(columns, row, strict=True):
                    columns[name].append(value)
    metadata = {"isd_ray": json.dumps({"format": 1, "root": str(folder), "classes": list("abcde")})}
    return pa.table(columns).replace_schema_metadata(metadata)


def one_size(table: pa.Table) -> pa.Table:
    return table.take(pa.array(range(0, 200, 2)))


def epoch(table: pa.Table, start: int = 0, **options) -> list:
    defaults = dict(seed=1, global_batch=24, size=16, views=["weak", "strong"])
    return list(Stream(table, **{**defaults, **options}).epoch(3, start))


def without_ray(monkeypatch, table: pa.Table, **options) -> list:
    with monkeypatch.context() as patch:
        patch.setattr(blocks.ray, "is_initialized", lambda: False)
        return epoch(table, **options)


def assert_equal(found: list, expected: list) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        for field in ("image", "index", "label", "position"):
            assert torch.equal(getattr(a, field), getattr(b, field))
        assert a.cropped == b.cropped


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_ray_and_this_process_give_the_same_batches(ray_session, monkeypatch, table, cache):
    table = one_size(table)
    assert_equal(epoch(table, cache=cache), without_ray(monkeypatch, table, cache="none"))


@pytest.mark.parametrize("task_images", [1024, 48])
def test_crops_and_resume_and_ranks(ray_session, monkeypatch, table, task_images):
    monkeypatch.setattr("isd_ray.data.stream.TASK_IMAGES", task_images)
    whole = without_ray(monkeypatch, table)
    assert_equal(epoch(table, start=5), whole[5:])
    parts = [epoch(table, rank=r, world=3, global_batch=25) for r in range(3)]
    alone = without_ray(monkeypatch, table, global_batch=25)
    for step, batch in enumerate(alone):
        assert torch.equal(torch.cat([part[step].image for part in parts]), batch.image)
        assert torch.equal(torch.cat([part[step].index for part in parts]), batch.index)


def test_an_epoch_left_early_does_not_disturb_the_next(ray_session, monkeypatch, table):
    one = Stream(table, seed=1, global_batch=24, size=16, views=["weak", "strong"])
    next(one.epoch(0))
    assert_equal(list(one.epoch(3)), without_ray(monkeypatch, table))


def test_settings_stay_with_the_dataset(ray_session, table):
    before = repr(ray_session.data.DataContext.get_current())
    epoch(table)
    assert repr(ray_session.data.DataContext.get_current()) == before


def test_bad_images_come_back_with_their_reason(ray_session, table):
    sizes = table.column("size").to_numpy().copy()
    sizes[10] = 20
    broken = table.set_column(3, "size", pa.array(sizes))
    one = Stream(broken, seed=1, global_batch=200, size=16, views=["weak"])
    (batch,) = one.epoch(0)
    assert len(batch.index) == 199
    assert [(b["index"], b["key"]) for b in one.bad] == [(10, "10")]
    with pytest.raises(UserError, match=r"max_bad = 0\.001"):
        list(Stream(broken, seed=1, global_batch=200, size=16, views=["weak"], max_bad=0.001).epoch(0))


def test_a_task_that_dies_ends_the_epoch_with_an_error(ray_session, monkeypatch, table):
    """Ray Data's default would start the task again for ever."""
    monkeypatch.setattr(blocks, "TASK_RETRIES", 0)

    def die(item, **_):
        import os

        os._exit(1)

    monkeypatch.setattr(blocks, "_read_range", die)
    with pytest.raises(ray_session.exceptions.WorkerCrashedError):
        epoch(table)


def test_tasks_run_where_the_workers_hold_every_cpu(ray_session, table):
    class Worker:
        def ready(self) -> bool:
            return True

    worker = ray_session.remote(num_cpus=ray_session.cluster_resources()["CPU"])(Worker).remote()
    assert ray_session.get(worker.ready.remote())
    assert len(epoch(table)) == 200 // 24
    ray_session.kill(worker)


def test_ordered_through_ray(ray_session, table):
    batches = list(ordered(table, size=16, batch=64))
    assert torch.cat([b.index for b in batches]).tolist() == list(range(200))
    assert batches[0].image.shape == (64, 1, 3, 16, 16)


def test_many_epochs_leave_two_names_and_no_open_file(ray_session, table):
    """Ray Data keeps metrics and a log file for every name of a dataset: with a new one an epoch, long runs fill up."""
    from ray.data._internal.stats import get_or_create_stats_actor

    def names() -> set[str]:
        return set(ray_session.get(get_or_create_stats_actor().get_datasets.remote()))

    one = Stream(table, seed=1, global_batch=24, size=16, views=["weak"])
    before = names()
    files = []
    for i in range(6):
        assert len(list(one.epoch(i))) == one.steps
        files.append(len(os.listdir("/proc/self/fd")))
    assert 1 <= len(names() - before) <= 2
    assert files[-1] <= files[1]


def test_a_slow_reader_bounds_what_is_read_ahead(ray_session, monkeypatch, table, tmp_path):
    """Tasks start while the store holds less than its limit; without one, all 50 would run ahead."""
    monkeypatch.setattr("isd_ray.data.stream.TASK_IMAGES", 4)
    monkeypatch.setattr("isd_ray.data.stream.chunk_for", lambda *_: 1)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100_000)
    read = blocks._read_range

    def leave_a_mark(item, **rest):
        (tmp_path / str(item["start"][0])).touch()
        yield from read(item, **rest)

    monkeypatch.setattr(blocks, "_read_range", leave_a_mark)
    batches = Stream(table, seed=1, global_batch=4, size=64, views=["weak"] * 2, cache="none").epoch(0)
    first, started, since = next(batches), 0, time.monotonic()
    while time.monotonic() - since < 3:  # until no task has started for so long
        if len(list(tmp_path.iterdir())) > started:
            started, since = len(list(tmp_path.iterdir())), time.monotonic()
    tasks = int(ray_session.cluster_resources()["CPU"])
    in_store = blocks.TASK_BLOCKS * blocks.BLOCK_BYTES * tasks / first.image.numel()
    handed_over = blocks.AHEAD + 2  # to the reader: those ahead, the one taken and one on its way
    assert started <= in_store + tasks + handed_over
    assert len(list(batches)) == 49
    assert len(list(tmp_path.iterdir())) == 50
