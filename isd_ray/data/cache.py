"""Sets that fit are decoded once and kept: by each rank, once a node, or on the training device."""

import hashlib
import os
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import torch
from torch import Tensor

from isd_ray.data.blocks import Block, Blocks, task_rows
from isd_ray.data.plan import MEMORY_LIMIT, fits_memory, one_size, shard_codes, whole_size
from isd_ray.data.read import Shape
from isd_ray.errors import UserError, nearest, printable

CACHES = ("auto", "memory", "object_store", "device", "none")
TASK_IMAGES = 1024  # most images that one task reads from local shards; its start costs milliseconds


class Decoded(NamedTuple):
    """A whole set: images uint8 [N, 3, H, W]; reason [N], "" for a good image; seconds float32 [N, 3] of STAGES.

    holder: whatever must live as long as the images do.
    """

    images: Tensor
    reason: np.ndarray
    seconds: np.ndarray
    holder: Any = None


def choose_cache(table: pa.Table, cache: str, finish: bool, side: int) -> str:
    """Return where the decoded images are kept; "auto" looks at their size, and takes memory or none.

    A cache keeps images that travel whole to views of `side` pixels (`whole_size`), and no others:
    batches would differ with the cache. Raises UserError for an unknown name and for a cache that
    cannot hold this set.
    """
    whole = whole_size(table, side)
    if cache not in CACHES:
        raise UserError(
            f"No cache is named '{printable(cache)}'.{nearest(cache, CACHES)} Known: {', '.join(CACHES)}."
        )
    if cache not in ("auto", "none"):
        size = one_size(table)
        if size is None:
            raise UserError(
                f"cache={cache} needs images of one size, and these differ: use cache=auto or none."
            )
        if whole is None:
            raise UserError(
                f"cache={cache} keeps whole images, and {size[0]} x {size[1]} pixels are too many beside views of "
                f"{side} x {side}: use cache=auto or none, or shards of smaller images."
            )
        if finish:
            raise UserError(
                f"cache={cache} keeps whole images, so tasks cannot make their views: use cache=none."
            )
    if cache == "object_store" and not ray.is_initialized():
        raise UserError("cache=object_store needs Ray; use cache=memory.")
    if cache == "auto" and (finish or whole is None):
        return "none"
    if cache != "auto":
        return cache
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return "memory" if fits_memory(table, min(MEMORY_LIMIT, machine // 5)) else "none"


def decoded(blocks: Blocks, cache: str, device: torch.device, world: int) -> Decoded:
    """Decode the set into the chosen cache, or find it there. `world` ranks do so at the same time."""
    if cache == "object_store":
        return _shared(blocks)
    images, reason, seconds = decode_set(blocks, world)
    tensor = torch.from_numpy(images)
    return Decoded(tensor.to(device) if cache == "device" else tensor, reason, seconds)


def decode_set(blocks: Blocks, world: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return images uint8 [N, 3, H, W] (zeros for a broken one), reason [N] and seconds float32 [N, 3]."""
    width, height = one_size(blocks.table) or (0, 0)
    rows = blocks.table.num_rows
    images = np.zeros((rows, 3, height, width), dtype=np.uint8)
    reason, seconds = np.full(rows, "", dtype=object), np.zeros((rows, 3), dtype=np.float32)
    for block in in_index_order(blocks, Shape((height, width)), 256, world):
        row = block["row"]
        images[row], reason[row], seconds[row] = block["image"][:, 0], block["reason"], block["seconds"]
    return images, reason, seconds


def in_index_order(blocks: Blocks, shape: Shape, batch: int, world: int = 1) -> Iterator[Block]:
    """Yield the whole set once, `batch` rows at a time, in the order of the index."""
    rows = np.arange(blocks.table.num_rows)
    yield from blocks.read(rows, rows, ordered_ranges(len(rows), batch, shape), batch, shape, world)


def ordered_ranges(rows: int, batch: int, shape: Shape) -> list[tuple[int, int]]:
    """Cut 0 .. rows into ranges [start, stop) for reading tasks, whole batches each but the last."""
    step = batch * max(1, min(TASK_IMAGES, task_rows(batch, shape)) // batch)
    return [(a, min(a + step, rows)) for a in range(0, rows, step)]


class _Holder:
    """An actor that decodes a set once and owns it in the object store, from which every rank of a node maps it."""

    def __init__(self, table: pa.Table):
        self._blocks = Blocks(table)
        self._kept: Any = None

    def kept(self) -> Any:
        if self._kept is None:
            images, reason, seconds = decode_set(self._blocks)
            self._kept = ray.put(images), reason, seconds
        return self._kept


def _shared(blocks: Blocks) -> Decoded:
    """Ask this run's holder for the set; the first rank that asks starts it."""
    group = ray.util.get_current_placement_group()  # one for all workers of a run, another one for each trial
    run = group.id.hex() if group else ray.get_runtime_context().get_job_id()
    content = hashlib.sha256(blocks.folder.encode())
    content.update(shard_codes(blocks.table).tobytes() + blocks.table["offset"].to_numpy().tobytes())
    name = f"isd_ray images {run} {content.hexdigest()}"
    holder: Any = ray.remote(num_cpus=0)(_Holder).options(name=name, get_if_exists=True).remote(blocks.table)
    ref, reason, seconds = ray.get(holder.kept.remote())
    return Decoded(read_only(ray.get(ref)), reason, seconds, holder)


def read_only(array: np.ndarray) -> Tensor:
    """Return a tensor over an array of Ray's shared memory: do not write to it."""
    with warnings.catch_warnings():  # torch cannot mark a tensor as read-only
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)
