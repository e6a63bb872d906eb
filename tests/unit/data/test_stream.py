"""The stream without Ray (the same operator in this process): order, ranks, resume, caches, broken input."""

import io
import json
import re
import tarfile
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from isd_ray.data import blocks
from isd_ray.data import stream as module
from isd_ray.data.augment import center_view, make_views
from isd_ray.data.blocks import cut_batches
from isd_ray.data.plan import plan, shard_codes
from isd_ray.data.stream import Stream, ordered
from isd_ray.errors import UserError


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    """Keep these tests in this process, also where another test has started Ray."""
    monkeypatch.setattr(blocks.ray, "is_initialized", lambda: False)


def picture(i: int, size: tuple[int, int]) -> Image.Image:
    values = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def make_set(folder, n=60, per_shard=13, size=lambda i: (16, 16)) -> pa.Table:
    """Write tars of PNG files and return their index."""
    rows = []
    for first in range(0, n, per_shard):
        name = f"{first // per_shard:05d}.tar"
        with tarfile.open(folder / name, "w") as tar:
            for i in range(first, min(n, first + per_shard)):
                buffer = io.BytesIO()
                picture(i, size(i)).save(buffer, "PNG")
                member = tarfile.TarInfo(f"{i:06d}.png")
                member.size = len(buffer.getvalue())
                offset = tar.offset + 512
                tar.addfile(member, io.BytesIO(buffer.getvalue()))
                rows.append((name, f"{i:06d}", offset, member.size, i % 3, *size(i)))
    return index_table(folder, rows)


def index_table(folder, rows) -> pa.Table:
    names = ("shard", "key", "offset", "size", "label", "width", "height")
    types = (pa.string(), pa.string(), pa.int64(), pa.int64(), pa.int32(), pa.int32(), pa.int32())
    kinds = dict(zip(names, types, strict=True))
    columns = zip(*rows, strict=True)
    arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds.values(), strict=True)]
    metadata = {"isd_ray": json.dumps({"format": 1, "root": str(folder), "classes": ["a", "b", "c"]})}
    return pa.table(dict(zip(kinds, arrays, strict=True))).replace_schema_metadata(metadata)


@pytest.fixture
def small(tmp_path) -> pa.Table:
    return make_set(tmp_path)


@pytest.fixture
def mixed(tmp_path) -> pa.Table:
    folder = tmp_path / "mixed"
    folder.mkdir()
    return make_set(folder, size=lambda i: (20 + i % 7, 30 - i % 5))


def stream(table, **options) -> Stream:
    defaults = dict(seed=5, global_batch=16, size=16, views=["weak", "strong"], max_bad=0.1)
    return Stream(table, **{**defaults, **options})


def damage(table: pa.Table, folder, row: int, content: bytes) -> None:
    """Overwrite the first bytes of the image of a row."""
    item = table.slice(row, 1).to_pylist()[0]
    with open(folder / item["shard"], "r+b") as file:
        file.seek(item["offset"])
        file.write(content[: item["size"]])


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_batches_are_the_plan_and_hold_the_right_images(small, cache):
    one = stream(small, cache=cache)
    rows = plan(shard_codes(small), 5, 2, 16)
    batches = list(one.epoch(2))
    assert len(batches) == one.steps == 3
    for step, batch in enumerate(batches):
        assert batch.index.tolist() == rows[step].tolist()
        assert batch.label.tolist() == (rows[step] % 3).tolist()
        assert batch.position.tolist() == list(range(16 * step, 16 * step + 16))
        assert (batch.epoch, batch.seed, batch.cropped) == (2, 5, False)
        expected = np.stack([np.asarray(picture(i, (16, 16))).transpose(2, 0, 1) for i in rows[step]])
        assert np.array_equal(batch.image[:, 0].numpy(), expected)


@pytest.mark.parametrize("cache", ["memory", "none"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_make_the_same_global_batches(small, cache, world):
    alone = list(stream(small, cache=cache).epoch(1))
    parts = [list(stream(small, cache=cache, rank=r, world=world).epoch(1)) for r in range(world)]
    for step, whole in enumerate(alone):
        for field in ("image", "index", "label", "position"):
            together = torch.cat([getattr(part[step], field) for part in parts])
            assert torch.equal(together, getattr(whole, field))


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_resume_at_any_step(mixed, start):
    whole = list(stream(mixed).epoch(4))
    rest = list(stream(mixed).epoch(4, start))
    assert len(rest) == len(whole) - start
    for a, b in zip(whole[start:], rest, strict=True):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.index, b.index)


def test_chunks_do_not_change_what_ranks_and_windows_read(mixed, monkeypatch):
    monkeypatch.setattr(module, "chunk_for", lambda table, batch: 4)
    monkeypatch.setattr(module, "TASK_IMAGES", 40)
    rows = plan(shard_codes(mixed), 5, 0, 8, 4)
    parts = [list(stream(mixed, global_batch=8, rank=r, world=2).epoch(0, 3)) for r in range(2)]
    for step, (a, b) in enumerate(zip(*parts, strict=True), 3):
        assert torch.cat([a.index, b.index]).tolist() == rows[step].tolist()


def test_images_of_many_sizes_are_cropped_where_they_are_read(mixed):
    """The crops equal those that the training device makes of these images, but for rounding to 8 bits."""
    batch = next(stream(mixed).epoch(0))
    assert batch.image.shape == (16, 2, 3, 16, 16)
    assert batch.cropped
    crops = make_views(batch, ["weak", "weak"], 16, [0] * 3, [1] * 3)
    for i, row in enumerate(batch.index.tolist()):
        whole = picture(row, (20 + row % 7, 30 - row % 5))
        image = torch.from_numpy(np.array(whole)).permute(2, 0, 1)[None, None]
        alone = type(batch)(image, batch.index[i : i + 1], batch.label[:1], batch.position[i : i + 1], 0, 5)
        for found, expected in zip(
            crops, make_views(alone, ["weak", "weak"], 16, [0] * 3, [1] * 3), strict=True
        ):
            assert (found[i] - expected[0]).abs().max() < 1.01 / 255


@pytest.mark.parametrize("views", [["weak"], ["weak", "strong", "weak"]])
def test_large_images_of_one_size_are_cropped_as_those_of_several(tmp_path, views):
    """A set of one size, and the same images in a set that has one of another size."""
    tables = []
    for odd in (0, 1):
        (folder := tmp_path / str(odd)).mkdir()
        tables.append(make_set(folder, size=lambda i, odd=odd: (140, 130 + odd * (i // 59))))
    one, several = (stream(table, views=views, global_batch=60) for table in tables)
    assert (one.cache, several.cache) == ("none", "none")
    for a, c in zip(one.epoch(3), several.epoch(3), strict=True):
        assert a.cropped
        assert a.image.shape == (60, len(views), 3, 16, 16)
        same = a.index != 59
        assert torch.equal(a.image[same], c.image[same])
    centre, same = (next(ordered(table, size=16, batch=59)).image for table in tables)
    assert centre.shape == (59, 1, 3, 16, 16)
    assert torch.equal(centre, same)


def test_multi_crop_sides(mixed):
    views = ["swav_large", "swav_small"]
    large, small = make_views(next(stream(mixed, views=views).epoch(0)), views, 16, [0] * 3, [1] * 3)
    assert large.shape[-1] == 16
    assert small.shape[-1] == 7


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_broken_images_are_listed_and_left_out(small, tmp_path, cache):
    damage(small, tmp_path, 3, b"<html>not found</html>")
    damage(small, tmp_path, 20, b"\0" * 10_000)
    cut = small.slice(59, 1).to_pylist()[0]
    with open(tmp_path / cut["shard"], "r+b") as file:
        file.truncate(cut["offset"] + cut["size"] - 5)
    one = stream(small, cache=cache, global_batch=60)
    (batch,) = one.epoch(0)
    assert sorted(batch.index.tolist()) == sorted(set(range(60)) - {3, 20, 59})
    assert {(b["index"], b["key"], b["shard"]) for b in one.bad} == {
        (3, "000003", "00000.tar"), (20, "000020", "00001.tar"), (59, "000059", "00004.tar")
    }  # fmt: skip
    reasons = {b["index"]: b["reason"] for b in one.bad}
    assert "html" in reasons[3]
    assert "ends 5 bytes before" in reasons[59]
    list(one.epoch(1))
    assert len(one.bad) == 3


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_too_many_broken_images_stop_the_run(small, tmp_path, cache):
    (tmp_path / "00002.tar").unlink()
    with pytest.raises(
        UserError, match=r"of 60 images are broken.*max_bad = 0.1.*00002.tar \(the shard is missing\)"
    ):
        list(stream(small, cache=cache).epoch(0))
    one = stream(small, cache=cache, max_bad=0.5, global_batch=20)
    assert sum(len(b.index) for b in one.epoch(0)) == 47
    assert {b["reason"] for b in one.bad} == {"the shard is missing"}


def test_a_local_batch_without_a_good_image_stops_the_run(small, tmp_path):
    for row in range(60):
        damage(small, tmp_path, row, b"x" * 100)
    with pytest.raises(UserError, match="All images of step 0 on rank 0 are broken"):
        next(stream(small, max_bad=1.0).epoch(0))


@pytest.mark.parametrize(("column", "value"), [("offset", 10**9), ("offset", -5), ("size", 0), ("size", -3)])
def test_wrong_ranges_are_broken_images(small, column, value):
    values = small.column(column).to_numpy().copy()
    values[7] = value
    wrong = small.set_column(small.schema.get_field_index(column), column, pa.array(values))
    one = stream(wrong, global_batch=60)
    (batch,) = one.epoch(0)
    assert set(range(60)) - set(batch.index.tolist()) == {7}
    assert re.search("valid range|ends .* bytes before", one.bad[0]["reason"])


def test_an_image_of_another_size_than_the_index_says_is_broken(tmp_path):
    table = make_set(tmp_path, size=lambda i: (16, 16) if i else (8, 8))
    for name in ("width", "height"):
        table = table.set_column(table.schema.get_field_index(name), name, pa.array([16] * 60, pa.int32()))
    one = stream(table, global_batch=60)
    list(one.epoch(0))
    assert one.bad[0]["reason"] == "8 x 8 pixels, but the index says 16 x 16"


def test_what_cannot_work_is_said_at_once(small, mixed):
    with pytest.raises(UserError, match="Did you mean 'memory'"):
        stream(small, cache="memori")
    with pytest.raises(UserError, match="images of one size"):
        stream(mixed, cache="memory")
    large = small.set_column(5, "width", pa.array([4000] * 60, pa.int32()))
    with pytest.raises(
        UserError, match=r"cache=memory keeps whole images, and 4000 x 16 pixels .* views of 16"
    ):
        stream(large, cache="memory")
    with pytest.raises(UserError, match="a view of 0 pixels"):
        stream(small, size=0)
    with pytest.raises(UserError, match="20 workers"):
        stream(small, world=20)
    with pytest.raises(UserError, match="60 images, fewer than one global batch of 64"):
        next(stream(small, global_batch=64).epoch(0))


def test_a_subset_reads_its_own_rows(small):
    chosen = np.array([2, 3, 17, 40, 59])
    (batch,) = stream(small.take(pa.array(chosen)), global_batch=5).epoch(0)
    assert sorted(batch.index.tolist()) == [0, 1, 2, 3, 4]
    assert (batch.label.numpy() == chosen[batch.index] % 3).all()
    row = int(batch.index[0])
    assert np.array_equal(batch.image[0, 0].permute(1, 2, 0), np.asarray(picture(chosen[row], (16, 16))))


def test_ordered_gives_the_set_in_index_order(small, mixed):
    assert torch.cat([b.index for b in ordered(small, size=16, batch=7)]).tolist() == list(range(60))
    batch = next(ordered(mixed, size=70, batch=60))
    raw = torch.from_numpy(np.array(picture(8, (21, 27)))).permute(2, 0, 1)[None]
    expected = center_view(raw, 70, [0] * 3, [1] * 3)
    assert (batch.image[8] / 255 - expected).abs().max() < 1.01 / 255


@pytest.mark.parametrize("lengths", [[8, 4, 3], [4, 4], [5, 2, 6, 1], [3], [], [1] * 9])
def test_blocks_of_any_length_become_batches_in_order(lengths):
    edges = np.cumsum([0, *lengths]).tolist()
    pieces = [{"row": np.arange(a, b), "x": np.arange(a, b) * 2.0} for a, b in pairwise(edges)]
    found = list(cut_batches(pieces, 4))
    assert [len(batch["row"]) for batch in found] == [4] * (edges[-1] // 4) + [edges[-1] % 4] * (
        edges[-1] % 4 > 0
    )
    for name, scale in (("row", 1), ("x", 2)):
        together = [value for batch in found for value in batch[name].tolist()]
        assert together == [scale * i for i in range(edges[-1])]
    if len(lengths) and all(n % 4 == 0 for n in lengths):
        assert all(any(np.shares_memory(b["x"], block["x"]) for block in pieces) for b in found)
