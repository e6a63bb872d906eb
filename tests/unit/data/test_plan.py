"""The properties of an epoch that everything rests on, over random sizes."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isd_ray.data.plan import (
    chunk_for,
    fits_memory,
    one_size,
    plan,
    rank_columns,
    shard_codes,
    whole_size,
)
from isd_ray.errors import UserError


@st.composite
def epochs(draw):
    """(shards, seed, epoch, global_batch, chunk) with at least one global batch."""
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
    shards = np.repeat(np.arange(len(lengths)), lengths)
    batch = draw(st.integers(1, len(shards)))
    return shards, draw(st.integers(0, 2**32)), draw(st.integers(0, 1000)), batch, draw(st.integers(1, 12))


@given(epochs())
@settings(max_examples=150, deadline=None)
def test_every_row_at_most_once_and_only_a_short_tail_is_left_out(case):
    shards, _, _, batch, _ = case
    rows = plan(*case)
    assert rows.dtype == np.int64
    assert rows.shape == (len(shards) // batch, batch)
    assert len(np.unique(rows)) == rows.size > len(shards) - batch
    assert rows.min() >= 0
    assert rows.max() < len(shards)


@given(epochs(), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_ranks_together_see_the_same_global_batches(case, world):
    rows = plan(*case)
    parts = [rows[:, rank_columns(case[3], rank, world)] for rank in range(world)]
    assert np.array_equal(np.concatenate(parts, axis=1), rows)
    assert [p.shape[1] for p in parts] == [len(p) for p in np.array_split(np.arange(case[3]), world)]


@given(epochs())
@settings(max_examples=30, deadline=None)
def test_pure_and_different_every_epoch_and_seed(case):
    shards, seed, epoch, batch, chunk = case
    rows = plan(*case)
    assert np.array_equal(rows, plan(*case))
    if chunk == 1 and len(shards) >= 30 and rows.size >= 20:
        assert not np.array_equal(rows, plan(shards, seed, epoch + 1, batch, chunk))
        assert not np.array_equal(rows, plan(shards, seed + 1, epoch, batch, chunk))


@given(st.integers(2, 10), st.integers(1, 8), st.integers(1, 6), st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_column_reads_whole_chunks(chunk, batch, per_column, shards, seed):
    """With shards of whole chunks, a window holds the rows of one chunk: one read of `chunk` images."""
    n = batch * per_column
    shard_of_row = np.repeat(np.sort(np.random.default_rng(seed).integers(0, shards, n)), chunk)
    rows = plan(shard_of_row, seed, 0, batch, chunk)
    windows = rows.reshape(per_column, chunk, batch)
    start = windows.min(axis=1, keepdims=True)
    assert np.array_equal(
        np.sort(windows - start, axis=1), np.broadcast_to(np.arange(chunk)[:, None], windows.shape)
    )
    assert (start % chunk == 0).all()


def test_chunks_do_not_cross_shards():
    shards = np.repeat([0, 1, 2], 5)
    rows = plan(shards, 0, 0, 3, chunk=5)  # three columns of five steps: one shard each
    assert sorted(shards[rows[0]].tolist()) == [0, 1, 2]
    assert (shards[rows] == shards[rows[0]]).all()


def test_chunk_one_is_uniform():
    """Chi-squared of where row 0 lands, over 2,000 epochs, 20 places: over 50 once in 10,000."""
    places = [int(np.flatnonzero(plan(np.zeros(20), 3, e, 4).ravel() == 0)[0]) for e in range(2000)]
    counts = np.bincount(places, minlength=20)
    assert ((counts - 100) ** 2 / 100).sum() < 50


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match=r"10 images.*batch of 16"):
        plan(np.zeros(10), 0, 0, 16)


def index(n: int, size: int, width: list[int] | None = None) -> pa.Table:
    side = width or [32] * n
    return pa.table({"shard": ["a"] * n, "size": [size] * n, "width": side, "height": side})


def test_chunk_follows_the_table_only():
    assert fits_memory(index(100, 2000))
    assert chunk_for(index(100, 2000), 10) == 1
    mixed = index(20_000, 100_000, [300, 301] * 10_000)
    assert one_size(mixed) is None
    assert chunk_for(mixed, 256) == 9  # 20,000 / (8 * 256): eight chunks a column
    assert chunk_for(mixed, 64) == 10  # a mebibyte of 100 kB images
    assert chunk_for(mixed, 4096) == 1


@pytest.mark.parametrize(
    ("pixels", "view", "is_whole"),
    [(32, 32, True), (32, 16, True), (224, 224, True), (128, 8, True), (256, 128, True), (448, 224, True),
     (129, 32, False), (257, 128, False), (449, 224, False), (4000, 32, False)],
)  # fmt: skip
def test_images_travel_whole_while_they_are_small_or_little_larger_than_a_view(pixels, view, is_whole):
    table = index(2, 2000, [pixels] * 2)
    assert whole_size(table, view) == ((pixels, pixels) if is_whole else None)
    assert whole_size(index(2, 2000, [pixels, pixels + 1]), view) is None
    for side in (0, -1):
        with pytest.raises(UserError, match=f"a view of {side} pixels: --image-size is at least 1"):
            whole_size(table, side)


def test_shard_codes_of_strings_and_dictionaries():
    names = pa.chunked_array([["a", "a", "b"], ["b", "c"]])
    for column in (names, names.dictionary_encode()):
        assert shard_codes(pa.table({"shard": column})).tolist() == [0, 0, 1, 1, 2]
