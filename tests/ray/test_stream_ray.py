"""The stream through Ray tasks gives what the same function gives without Ray, and survives what tasks can do."""

import gc
import io
import json
import os
import tarfile
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from isd_ray.data import blocks
from isd_ray.data.augment import make_views
from isd_ray.data.read import Shape
from isd_ray.data.stream import Stream, ordered
from isd_ray.data.views import VIEWS
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


@pytest.mark.parametrize("cache", ["none", "memory", "object_store", "device"])
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


@pytest.mark.parametrize("deaths", [2, 4])
def test_a_task_that_dies_is_started_again_twice(ray_session, monkeypatch, table, tmp_path, deaths):
    def die(start, *rest):
        died = len(list(tmp_path.iterdir()))
        if start == 0 and died < deaths:
            (tmp_path / str(died)).touch()
            os._exit(1)
        yield from blocks.read_range(start, *rest)

    expected = without_ray(monkeypatch, table)
    monkeypatch.setattr(blocks, "READER", ray_session.remote(num_cpus=0)(die))
    if deaths <= blocks.TASK_RETRIES:
        assert_equal(epoch(table), expected)
    else:
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


def test_many_epochs_leave_no_open_file_and_nothing_in_the_store(ray_session, table):
    one = Stream(table, seed=1, global_batch=24, size=16, views=["weak"])
    files, free = [], []
    for i in range(6):
        assert len(list(one.epoch(i))) == one.steps
        next(one.epoch(i))  # left early
        files.append(len(os.listdir("/proc/self/fd")))
        gc.collect()
        time.sleep(0.5)  # the store hears of it a little later
        free.append(ray_session.available_resources()["object_store_memory"])
    assert files[-1] <= files[1]
    assert free[-1] >= free[1] - 100_000  # bytes; an epoch has 150,000


def test_a_slow_reader_bounds_what_is_read_ahead(ray_session, monkeypatch, table, tmp_path):
    """Tasks start as earlier ones are taken, and pause after their share; without a bound all would run ahead."""
    monkeypatch.setattr("isd_ray.data.stream.TASK_IMAGES", 12)
    monkeypatch.setattr("isd_ray.data.stream.chunk_for", lambda *_: 1)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4 * 2 * 3 * 64**2)  # a batch
    monkeypatch.setattr(blocks, "TASK_BYTES", 2 * 4 * 2 * 3 * 64**2)
    monkeypatch.setattr(
        "isd_ray.data.stream.task_rows", lambda *_: 12
    )  # three batches, of which two may wait

    def leave_marks(start, *rest):
        for number, block in enumerate(blocks.read_range(start, *rest)):
            (tmp_path / f"{start}-{number}").touch()
            yield block

    monkeypatch.setattr(blocks, "READER", ray_session.remote(num_cpus=0)(leave_marks))
    batches = Stream(table, seed=1, global_batch=4, size=64, views=["weak"] * 2, cache="none").epoch(0)
    next(batches)
    made, since = 0, time.monotonic()
    while time.monotonic() - since < 3:  # until none was made for so long
        if len(list(tmp_path.iterdir())) > made:
            made, since = len(list(tmp_path.iterdir())), time.monotonic()
    tasks = int(ray_session.cluster_resources()["CPU"]) + 1
    waiting = 2 + 1  # blocks of a task: those that may wait, and the one with which it pauses
    assert tasks <= made <= tasks * waiting + blocks.AHEAD + 2
    assert len(list(batches)) == 49
    assert len(list(tmp_path.iterdir())) == 50


def test_what_all_ranks_read_ahead_fits_half_of_the_store(ray_session, monkeypatch):
    monkeypatch.setattr(
        blocks.ray, "cluster_resources", lambda: {"CPU": 64.0, "object_store_memory": 2.0 * 2**30}
    )
    large = Shape((224, 224), views=(VIEWS["weak"], VIEWS["weak"]))
    for batch, world in ((16, 1), (16, 4), (256, 1), (4096, 1)):
        held = (blocks.tasks_at_once(batch, large, world) + 1) * blocks.task_rows(batch, large)
        least = 2 * blocks.task_rows(batch, large)  # one task and the one that is read
        assert world * held * blocks.row_bytes(large) <= max(2**30, least * blocks.row_bytes(large))
    assert blocks.tasks_at_once(16, Shape((32, 32)), 1) == 31


def test_views_finished_in_tasks_are_those_of_the_device_rounded(ray_session, table):
    """Also a small view of a multi-crop, whose rest of the row is empty."""
    views = ["strong", replace(VIEWS["strong"], side=0.5, solarize_p=0.5, blur_from=0)]
    options: dict = {"views": views, "size": 20, "global_batch": 50}
    for here, there in zip(epoch(table, **options), epoch(table, **options, finish=True), strict=True):
        assert torch.equal(here.index, there.index)
        assert there.finished
        plain = [make_views(batch, views, 20, mean=(0.0,) * 3, std=(1 / 255,) * 3) for batch in (here, there)]
        for a, b in zip(*plain, strict=True):
            assert a.shape == b.shape
            assert (a - b).abs().max() <= 0.5 + 1e-3
            assert torch.allclose(b, b.round(), atol=1e-3)


def test_whole_images_are_cropped_in_tasks_where_these_finish_views(ray_session, table):
    """Pillow crops there and matrices on the device: the same boxes, within a few grey levels."""
    one = one_size(table)
    options: dict = {"views": ["weak", "weak"], "cache": "none"}
    for here, there in zip(epoch(one, **options), epoch(one, **options, finish=True), strict=True):
        a, b = (make_views(batch, ["weak"] * 2, 16, (0.0,) * 3, (1 / 255,) * 3) for batch in (here, there))
        assert max((x - y).abs().max() for x, y in zip(a, b, strict=True)) <= 2
    with pytest.raises(UserError, match="cache=none"):
        epoch(one, cache="memory", finish=True)


def test_ranks_share_one_copy_in_the_object_store(ray_session, table):
    one = one_size(table)
    free = ray_session.available_resources()["object_store_memory"]
    streams = [
        Stream(one, seed=1, global_batch=24, size=16, views=["weak"], rank=r, world=3, cache="object_store")
        for r in range(3)
    ]
    first = [next(stream.epoch(0)) for stream in streams]
    time.sleep(0.5)  # the store hears of it a little later
    used = free - ray_session.available_resources()["object_store_memory"]
    images = one.num_rows * 3 * 24 * 24
    assert used < 2 * images  # no lower bound: what earlier tests put there may leave meanwhile
    assert len({stream._decoded()[0].data_ptr() for stream in streams}) == 1
    whole = epoch(one, cache="memory")  # epoch 3
    parts = [list(stream.epoch(3)) for stream in streams]
    assert torch.equal(torch.cat([part[0].image for part in parts]), whole[0].image)
    assert len({batch.image.shape for batch in first}) == 1
