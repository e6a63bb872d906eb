"""Batches of images for one rank, in the order of the plan: nothing is lost, repeated or reordered on the way.

The plan decides, Ray Data carries out: each rank runs its own dataset over its columns of the plan, in which
one fused operator opens the shards, reads ranges, decodes and crops, with preserve_order. Small sets of one
image size are decoded once and kept in memory; a step is then one gather.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from isd_ray.data import index as index_table
from isd_ray.data.blocks import BadImages, Blocks, task_rows
from isd_ray.data.plan import MEMORY_LIMIT, chunk_for, fits_memory, one_size, plan, rank_columns, shard_codes
from isd_ray.data.read import STAGES, Shape
from isd_ray.data.views import View, get_views
from isd_ray.errors import UserError, nearest

TASK_IMAGES = 1024  # most images that one task reads from local shards; its start costs milliseconds
CACHES = ("auto", "memory", "none")


@dataclass(frozen=True)
class Batch:
    """A rank's part of one global batch.

    image: uint8 [b, V, 3, H, W]: the whole image (V = 1), or, where `cropped`, one crop a view; index: int64
    [b], rows of the index table; label: int64 [b], -1 for none; position: int64 [b], place in the epoch, the
    key of all random draws together with `epoch` and `seed`.
    """

    image: Tensor
    index: Tensor
    label: Tensor
    position: Tensor
    epoch: int
    seed: int
    cropped: bool = False


class Stream:
    """The batches of one rank.

    table: the index; size: side of a view in pixels; views: names or View values; rank, world: this rank's
    place. cache: "memory" keeps the decoded set in this process (every rank holds all of it, since the plan
    mixes the whole set); "none" reads the shards every epoch; "auto" takes memory for a set of one image size
    that needs at most 2 GiB and a fifth of the machine's memory. max_bad: share of the set that may be
    broken; a rank counts the broken images that it has met, each once, in `bad`.

    With cache="none" and T concurrent tasks (the rank's share of the cluster's CPUs) memory is bounded, whatever the
    size of the set and the speed of its reader: here by two batches ahead; in the object store by T x 32 MiB, past
    which no task starts, and the decoded ranges of the T tasks that may run by then (1,024 images each, or one window
    of `chunk` steps where that is more); in a task by the encoded images of its range.

    The batches depend on (table, seed, global_batch) only, not on cache, world or the machine.

    Raises UserError for an unknown view or cache, for a cache that cannot hold the set, and for a set smaller
    than one global batch.
    """

    def __init__(
        self,
        table: pa.Table,
        *,
        seed: int,
        global_batch: int,
        size: int,
        views: Sequence[str | View],
        rank: int = 0,
        world: int = 1,
        cache: Literal["auto", "memory", "none"] = "auto",
        max_bad: float = 0.01,
    ):
        if not 0 < world <= global_batch:
            raise UserError(
                f"{world} workers cannot share a global batch of {global_batch}: raise the batch size."
            )
        self.table, self.seed, self.global_batch, self.size = table, seed, global_batch, size
        self.rank, self.world = rank, world
        self.views = get_views(views)
        self.cache = _choose_cache(table, cache)
        self.chunk = chunk_for(table, global_batch)
        self._shards = shard_codes(table)
        self._labels = torch.from_numpy(index_table.labels(table))
        self._bad = BadImages(table, max_bad)
        self._blocks = Blocks(table)
        self._stages, self._read = np.zeros(len(STAGES)), 0
        self._memory: tuple[Tensor, np.ndarray] | None = None

    @property
    def steps(self) -> int:
        """Steps of one epoch: the same on every rank."""
        return self.table.num_rows // self.global_batch

    @property
    def bad(self) -> list[dict[str, Any]]:
        """The broken images met so far: shard, key, index (row of the table), reason."""
        return self._bad.entries

    def take_stages(self) -> dict[str, float]:
        """Return the milliseconds an image that reading tasks spent since the last call: read, decode, transform.

        All zero where nothing was read, as from memory. Tasks run beside each other and beside the caller.
        """
        means = 1000 * self._stages / max(self._read, 1)
        self._stages, self._read = np.zeros(len(STAGES)), 0
        return dict(zip(STAGES, means.tolist(), strict=True))

    def _good(self, block: dict[str, np.ndarray]) -> np.ndarray:
        """Note broken images and the time that the block took; return which rows are good, bool [b]."""
        self._stages += block["seconds"].sum(axis=0)
        self._read += len(block["seconds"])
        return self._bad.note(block)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from step `start` on; a broken image is left out of its batch.

        Raises UserError past `max_bad`, and when all images of a local batch are broken.
        """
        rows = plan(self._shards, self.seed, epoch, self.global_batch, self.chunk)
        columns = rank_columns(self.global_batch, self.rank, self.world)
        position = np.arange(rows.size).reshape(rows.shape)[:, columns]
        batches = self._from_memory if self.cache == "memory" else self._from_shards
        yield from batches(rows[:, columns], position, epoch, start)

    def _from_memory(self, rows: np.ndarray, position: np.ndarray, epoch: int, start: int) -> Iterator[Batch]:
        images, is_good = self._decoded()
        for step in range(start, len(rows)):
            good = is_good[rows[step]]
            row = rows[step][good]
            self._require_some(row, step)
            yield self._batch(images[torch.from_numpy(row)].unsqueeze(1), row, position[step][good], epoch)

    def _from_shards(self, rows: np.ndarray, position: np.ndarray, epoch: int, start: int) -> Iterator[Batch]:
        whole = one_size(self.table)
        shape = (
            Shape(whole[::-1])
            if whole
            else Shape((self.size, self.size), tuple(self.views), self.seed, epoch)
        )
        local = rows.shape[1]
        chunk = 1 if self._blocks.is_local else self.chunk
        windows = _windows(start, len(rows), chunk, local, min(TASK_IMAGES, task_rows(local, shape)))
        ranges = [(a * local, b * local) for a, b in windows]
        blocks = self._blocks.read(rows.ravel(), position.ravel(), ranges, local, shape, self.world)
        for step, block in enumerate(blocks, start):
            good = self._good(block)
            row = block["row"][good]
            self._require_some(row, step)
            image = good_images(block, good)
            yield self._batch(image, row, block["position"][good], epoch, cropped=whole is None)

    def _batch(
        self, image: Tensor, row: np.ndarray, position: np.ndarray, epoch: int, cropped: bool = False
    ) -> Batch:
        index = torch.from_numpy(row)
        return Batch(image, index, self._labels[index], torch.from_numpy(position), epoch, self.seed, cropped)

    def _decoded(self) -> tuple[Tensor, np.ndarray]:
        """Return the whole set, uint8 [N, 3, H, W], and which rows are good; decoded at the first call."""
        if self._memory is None:
            width, height = one_size(self.table) or (0, 0)
            images = torch.empty(self.table.num_rows, 3, height, width, dtype=torch.uint8)
            is_good = np.zeros(self.table.num_rows, dtype=bool)
            for block in _in_order(self._blocks, Shape((height, width)), 256, self.world):
                images.numpy()[block["row"]] = block["image"][:, 0]
                is_good[block["row"]] = self._good(block)
            self._memory = images, is_good
        return self._memory

    def _require_some(self, rows: np.ndarray, step: int) -> None:
        if len(rows) == 0:
            raise UserError(
                f"All images of step {step} on rank {self.rank} are broken; the first broken one of the run is "
                f"{self._bad.first()}. Mend or drop these files, or use a larger batch."
            )


def ordered(table: pa.Table, *, size: int, batch: int = 256, max_bad: float = 0.01) -> Iterator[Batch]:
    """Yield the whole set once in index order, for evaluation: each image as it is, or, where images differ in size,
    the centre view of `size` pixels.

    A broken image is left out (`index` says which rows there are). Raises UserError past `max_bad`.
    """
    shape = centre_shape(table, size)
    labels = torch.from_numpy(index_table.labels(table))
    bad = BadImages(table, max_bad)
    for block in _in_order(Blocks(table), shape, batch):
        good = bad.note(block)
        index = torch.from_numpy(block["row"][good])
        yield Batch(good_images(block, good), index, labels[index], index, epoch=0, seed=0)


def centre_shape(table: pa.Table, size: int) -> Shape:
    """Return how evaluation reads a set: images of one size as they are, others as centre views of `size` pixels."""
    whole = one_size(table)
    return Shape(whole[::-1]) if whole else Shape((size, size), center=True)


def ordered_ranges(rows: int, batch: int, shape: Shape) -> list[tuple[int, int]]:
    """Cut 0 .. rows into ranges [start, stop) for reading tasks, whole batches each but the last."""
    step = batch * max(1, min(TASK_IMAGES, task_rows(batch, shape)) // batch)
    return [(a, min(a + step, rows)) for a in range(0, rows, step)]


def good_images(block: dict[str, np.ndarray], good: np.ndarray) -> Tensor:
    """Return the good images of a block; where all are, without a copy: do not write to them."""
    images = block["image"] if good.all() else block["image"][good]
    with warnings.catch_warnings():  # torch cannot mark a tensor as read-only, as Ray's shared memory is
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(images)


def _in_order(reader: Blocks, shape: Shape, batch: int, world: int = 1) -> Iterator[dict[str, np.ndarray]]:
    rows = np.arange(reader.table.num_rows)
    yield from reader.read(rows, rows, ordered_ranges(len(rows), batch, shape), batch, shape, world)


def _windows(start: int, steps: int, chunk: int, local: int, images: int) -> list[tuple[int, int]]:
    """Cut steps start .. steps into ranges for tasks of about `images`, at multiples of the plan's windows.

    From remote shards a task reads at least a whole window, `chunk` steps, so that it requests each range
    once; from local ones (`chunk` 1 here) bytes that are read twice come from the page cache.
    """
    window = chunk * max(1, images // (chunk * local))
    edges = [start, *range((start // window + 1) * window, steps, window), steps]
    return [(a, b) for a, b in pairwise(edges) if a < b]


def _choose_cache(table: pa.Table, cache: str) -> str:
    if cache not in CACHES:
        raise UserError(f"No cache is named '{cache}'.{nearest(cache, CACHES)} Known: {', '.join(CACHES)}.")
    if cache == "memory" and one_size(table) is None:
        raise UserError("cache=memory needs images of one size, and these differ: use cache=auto or none.")
    if cache != "auto":
        return cache
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return "memory" if fits_memory(table, min(MEMORY_LIMIT, machine // 5)) else "none"
