"""Batches of images for one rank, in the order of the plan: nothing is lost, repeated or reordered on the way.

The plan decides, Ray's tasks carry out: each rank has its columns of the plan read by tasks of its own, which open the
shards, read ranges, decode and crop, wherever the cluster has CPUs. Small sets of one image size are decoded once and
kept in memory; a step is then one gather.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from isd_ray.data import index as index_table
from isd_ray.data.blocks import BadImages, Blocks, task_rows
from isd_ray.data.cache import TASK_IMAGES, Decoded, choose_cache, decoded, in_index_order, read_only
from isd_ray.data.plan import chunk_for, plan, rank_columns, shard_codes, whole_size
from isd_ray.data.read import STAGES, Shape
from isd_ray.data.views import View, get_views
from isd_ray.errors import UserError


@dataclass(frozen=True)
class Batch:
    """A rank's part of one global batch, on the CPU (the images elsewhere where they are kept on a device).

    image: uint8 [b, V, 3, H, W]: the whole image (V = 1), or, where `cropped`, one crop a view, which has its colours
    already where `finished`; index: int64 [b], rows of the index table; label: int64 [b], -1 for none; position: int64
    [b], place in the epoch, the key of all random draws together with `epoch` and `seed`.
    """

    image: Tensor
    index: Tensor
    label: Tensor
    position: Tensor
    epoch: int
    seed: int
    cropped: bool = False
    finished: bool = False


class Stream:
    """The batches of one rank.

    table: the index; size: side of a view in pixels; views: names or View values; rank, world: this
    rank's place. cache: "memory" keeps the decoded set in this process (every rank holds all of it,
    since the plan mixes the whole set); "object_store" once a node, for all its ranks; "device" on
    `device`, where batches then lie; "none" reads the shards every epoch; "auto" takes memory for a
    set whose images travel whole (`plan.whole_size`) and need at most 2 GiB and a fifth of the
    machine's memory, else none. finish: have the reading tasks make the views altogether, not only
    their crops. max_bad: share of the set that may be broken; a rank counts the broken images that
    it has met, each once, in `bad`.

    With cache="none" memory is bounded, whatever the size of the set and of its images and the
    speed of the reader: in the object store by T + 1 times 32 MiB of decoded images (or one batch,
    where that is more), T being the tasks at once, the rank's share of the cluster's CPUs, or fewer
    where all ranks' would fill more than half of the store; in a task by 64 MiB of encoded images
    (512 MiB from a store, or one image where that is more), held twice while they are read, one
    decoded image and one block.

    The batches depend on (table, seed, global_batch) only, not on cache, world or the machine; `finish` rounds them to
    whole grey levels.

    Raises UserError for an unknown view or cache, for a cache that cannot hold the set or its
    finished views, for a size or `max_bad` that cannot be, and for a set smaller than one global
    batch.
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
        cache: str = "auto",
        device: str | torch.device = "cpu",
        finish: bool = False,
        max_bad: float = 0.01,
    ):
        if not 0 < world <= global_batch:
            raise UserError(
                f"{world} workers cannot share a global batch of {global_batch}: raise the batch size."
            )
        self.table, self.seed, self.global_batch, self.size = table, seed, global_batch, size
        self.rank, self.world = rank, world
        self.views = get_views(views)
        self.cache, self.finish = choose_cache(table, cache, finish, size), finish
        self.device = torch.device(device)
        self.chunk = chunk_for(table, global_batch)
        self._shards = shard_codes(table)
        self._labels = torch.from_numpy(index_table.labels(table))
        self._bad = BadImages(table, max_bad)
        self._blocks = Blocks(table)
        self._stages, self._read = np.zeros(len(STAGES)), 0
        self._kept: Decoded | None = None

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
        batches = self._from_shards if self.cache == "none" else self._from_memory
        yield from batches(rows[:, columns], position, epoch, start)

    def _from_memory(self, rows: np.ndarray, position: np.ndarray, epoch: int, start: int) -> Iterator[Batch]:
        images, is_good = self._decoded()
        for step in range(start, len(rows)):
            good = is_good[rows[step]]
            row = rows[step][good]
            self._require_some(row, step)
            image = images[torch.from_numpy(row).to(images.device)].unsqueeze(1)
            yield self._batch(image, row, position[step][good], epoch)

    def _from_shards(self, rows: np.ndarray, position: np.ndarray, epoch: int, start: int) -> Iterator[Batch]:
        whole = None if self.finish else whole_size(self.table, self.size)
        side = (self.size, self.size)
        shape = (
            Shape(whole[::-1])
            if whole
            else Shape(side, tuple(self.views), self.seed, epoch, finished=self.finish)
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
            kind = {"cropped": whole is None, "finished": self.finish}
            yield self._batch(image, row, block["position"][good], epoch, **kind)

    def _batch(self, image: Tensor, row: np.ndarray, position: np.ndarray, epoch: int, **kind: bool) -> Batch:
        index = torch.from_numpy(row)
        place = torch.from_numpy(position)
        return Batch(image, index, self._labels[index], place, epoch, self.seed, **kind)

    def _decoded(self) -> tuple[Tensor, np.ndarray]:
        """Return the whole set, uint8 [N, 3, H, W], and which rows are good; decoded at the first call."""
        if self._kept is None:
            self._kept = decoded(self._blocks, self.cache, self.device, self.world)
            rows = np.arange(self.table.num_rows)
            self._is_good = self._good(
                {"row": rows, "reason": self._kept.reason, "seconds": self._kept.seconds}
            )
        return self._kept.images, self._is_good

    def _require_some(self, rows: np.ndarray, step: int) -> None:
        if len(rows) == 0:
            raise UserError(
                f"All images of step {step} on rank {self.rank} are broken; the first broken one of the run is "
                f"{self._bad.first()}. Mend or drop these files, or use a larger batch."
            )


def ordered(table: pa.Table, *, size: int, batch: int = 256, max_bad: float = 0.01) -> Iterator[Batch]:
    """Yield the whole set once in index order, for evaluation: each image as it is, or, where
    images do not travel whole (`plan.whole_size`), the centre view of `size` pixels.

    A broken image is left out (`index` says which rows there are). Raises UserError past `max_bad`.
    """
    shape = centre_shape(table, size)
    labels = torch.from_numpy(index_table.labels(table))
    bad = BadImages(table, max_bad)
    for block in in_index_order(Blocks(table), shape, batch):
        good = bad.note(block)
        index = torch.from_numpy(block["row"][good])
        yield Batch(good_images(block, good), index, labels[index], index, epoch=0, seed=0)


def centre_shape(table: pa.Table, size: int) -> Shape:
    """Return how evaluation reads images: those that travel whole as they are, else centre views."""
    whole = whole_size(table, size)
    return Shape(whole[::-1]) if whole else Shape((size, size), center=True)


def good_images(block: dict[str, np.ndarray], good: np.ndarray) -> Tensor:
    """Return the good images of a block; where all are, without a copy: do not write to them."""
    return read_only(block["image"] if good.all() else block["image"][good])


def _windows(start: int, steps: int, chunk: int, local: int, images: int) -> list[tuple[int, int]]:
    """Cut steps start .. steps into ranges for tasks of about `images`, at multiples of the plan's windows.

    From remote shards a task reads at least a whole window, `chunk` steps, so that it requests each range
    once; from local ones (`chunk` 1 here) bytes that are read twice come from the page cache.
    """
    window = chunk * max(1, images // (chunk * local))
    edges = [start, *range((start // window + 1) * window, steps, window), steps]
    return [(a, b) for a, b in pairwise(edges) if a < b]
