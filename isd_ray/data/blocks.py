"""Rows of the index as decoded blocks, in order, read by Ray tasks: the one place where the data room touches Ray.

A task is a streaming generator of Ray Core, what Ray Data itself is made of, without its scheduler: the plan has
decided the order and the size of everything beforehand. `docs/design.md` (Choices) has the figures.
"""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from pyarrow import fs

from isd_ray.data import index as index_table
from isd_ray.data.files import open_filesystem
from isd_ray.data.read import Shape, read_rows
from isd_ray.errors import MachineError, UserError, printable

Block = dict[str, np.ndarray]

BLOCK_BYTES = 8 * 2**20  # decoded bytes in one block of the object store, or one batch where that is more
TASK_BYTES = 32 * 2**20  # decoded bytes that a task may put there before somebody takes them, or one block
AHEAD = 2  # blocks fetched before they are asked for
STORE_SHARE = 0.5  # of the object store, that all ranks together may fill
TASK_RETRIES = 2  # after the death of a process


class Blocks:
    """Reads rows of one index: in Ray tasks where Ray runs, else with the same function in this process."""

    def __init__(self, table: pa.Table):
        self.table = table
        self.filesystem, self.folder = open_filesystem(index_table.root(table))

    @property
    def is_local(self) -> bool:
        """Tell whether the shards lie on a local file system, where a read costs next to nothing."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    @cached_property
    def table_ref(self) -> ray.ObjectRef:
        """The columns that say where images lie, in the object store."""
        return ray.put(self._ranges)

    @cached_property
    def _ranges(self) -> pa.Table:
        return self.table.select(["shard", "key", "offset", "size"]).combine_chunks()

    def read(
        self,
        rows: np.ndarray,
        position: np.ndarray,
        ranges: list[tuple[int, int]],
        batch: int,
        shape: Shape,
        world: int = 1,
    ) -> Iterator[Block]:
        """Yield the blocks of `read_rows` in order, `batch` rows each (the last one may be short).

        ranges: parts [start, stop) of `rows` that follow each other, one a task, multiples of `batch` but the
        last. world: ranks that read at the same time and share the cluster's CPUs.
        """
        if not ranges:
            return
        settings: Any = (self.filesystem, self.folder, batch * block_batches(batch, shape), shape)
        if not ray.is_initialized():
            parts = (read_range(*part, self._ranges, rows, position, *settings) for part in ranges)
            yield from cut_batches((block for part in parts for block in part), batch)
            return
        shared = (self.table_ref, ray.put(rows), ray.put(position))
        reader = READER.options(
            num_returns="streaming",
            max_retries=TASK_RETRIES,
            _generator_backpressure_num_objects=task_blocks(batch, shape),
        )
        tasks = tasks_at_once(batch, shape, world)
        blocks = in_order(lambda part: reader.remote(*part, *shared, *settings), ranges, tasks)
        yield from cut_batches(ahead(blocks, AHEAD), batch)


def read_range(
    start: int,
    stop: int,
    table: pa.Table,
    rows: np.ndarray,
    position: np.ndarray,
    filesystem: fs.FileSystem,
    folder: str,
    batch: int,
    shape: Shape,
) -> Iterator[Block]:
    """Read one part [start, stop) of `rows`, `batch` at a time: what a task does."""
    yield from read_rows(filesystem, folder, table, rows[start:stop], position[start:stop], batch, shape)


# No CPU of Ray's: workers may hold every one, and tasks must run all the same; their number is bounded instead. Spread:
# else tasks without a CPU would all run on the node of their worker.
READER = ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(read_range)


def row_bytes(shape: Shape) -> int:
    """Return the decoded bytes of one row."""
    return math.prod(shape.array)


def block_batches(batch: int, shape: Shape) -> int:
    """Return how many whole batches make one block."""
    return max(1, BLOCK_BYTES // (batch * row_bytes(shape)))


def task_blocks(batch: int, shape: Shape) -> int:
    """Return how many blocks of a task may wait for the reader before it pauses."""
    return max(1, TASK_BYTES // (block_batches(batch, shape) * batch * row_bytes(shape)))


def task_rows(batch: int, shape: Shape) -> int:
    """Return how many rows one task gives, in whole batches, without ever pausing.

    Batches come in order, so a task that is ahead pauses when as many of its blocks wait as may, and its core idles.
    """
    return task_blocks(batch, shape) * block_batches(batch, shape) * batch


def tasks_at_once(batch: int, shape: Shape, world: int) -> int:
    """Return how many tasks a rank runs beside each other: its share of the cluster's CPUs, as its store has room.

    One more is under way (`in_order`): the one whose blocks are being taken has mostly ended.
    """
    found = ray.cluster_resources()
    room = (
        STORE_SHARE
        * found.get("object_store_memory", 0)
        / (world * task_rows(batch, shape) * row_bytes(shape))
    )
    return max(1, min(int(found.get("CPU", 1)) // world, int(room) - 1))


def in_order(
    start: Callable[[tuple[int, int]], "ray.ObjectRefGenerator"], parts: Iterable[tuple[int, int]], tasks: int
) -> Iterator[Block]:
    """Run one task a part, `tasks` and the one that is being read at once, and yield their blocks in order.

    Tasks that nobody waits for any more are cancelled. Raises the UserError that a task raised.
    """
    waiting, running = iter(parts), deque[Any]()
    try:
        while True:
            running.extend(
                start(part) for _, part in zip(range(tasks + 1 - len(running)), waiting, strict=False)
            )
            if not running:
                return
            for block in running[0]:
                yield ray.get(block)
                del block  # else the store keeps it until the next one is there
            running.popleft()
    except ray.exceptions.RayTaskError as error:
        raise error_of_task(error) or error from None
    finally:
        for task in [] if sys.is_finalizing() else running:
            with suppress(ray.exceptions.RayError):  # it has ended, or its node has
                ray.cancel(task)


def ahead(blocks: Iterator[Block], count: int) -> Iterator[Block]:
    """Yield what `blocks` yields, fetched by a thread up to `count` before it is asked for."""
    with ThreadPoolExecutor(1) as fetcher:
        fetched = deque(fetcher.submit(next, blocks, None) for _ in range(count))
        try:
            while (block := fetched.popleft().result()) is not None:
                fetched.append(fetcher.submit(next, blocks, None))
                yield block
        finally:
            for future in fetched:
                future.cancel()
            with suppress(RuntimeError):  # the interpreter ends
                fetcher.submit(blocks.close)  # type: ignore[attr-defined]  # by the thread that runs it


def cut_batches(blocks: Iterable[Block], batch: int) -> Iterator[Block]:
    """Yield `batch` rows at a time (the last ones may be fewer); blocks of whole batches are cut without a copy."""
    rest: Block = {}
    for block in blocks:
        if rest:
            block = {name: np.concatenate([rest[name], block[name]]) for name in block}
        rows = len(block["row"])
        for start in range(0, rows - batch + 1, batch):
            yield {name: column[start : start + batch] for name, column in block.items()}
        rest = {name: column[rows - rows % batch :] for name, column in block.items()} if rows % batch else {}
    if rest:
        yield rest


def error_of_task(error: BaseException | None) -> UserError | None:
    """Return the UserError that a task raised, from under what Ray wraps around it and without the
    lines it adds.

    A failure of the machine, such as a store that does not answer, stays one.
    """
    while error is not None and not isinstance(error, UserError | ray.exceptions.RayError):
        error = error.__cause__
    if isinstance(
        error, ray.exceptions.RayError
    ):  # first: Ray's class for a task's error is of the error's class too
        return error_of_task(getattr(error, "cause", None))
    kind = MachineError if isinstance(error, MachineError) else UserError
    return None if error is None else kind(str(error).partition("\n")[0])


class BadImages:
    """The broken images that were met, each once, and the limit past which there are too many.

    Raises UserError where the limit is no share of the images.
    """

    def __init__(self, table: pa.Table, max_bad: float):
        index_table.require_share(max_bad)
        self.table, self.max_bad = table, max_bad
        self.entries: list[dict[str, Any]] = []
        self._rows: set[int] = set()

    def note(self, block: Block) -> np.ndarray:
        """List the broken images of a block; return which are good, bool [b]. Raises UserError past the limit."""
        good = block["reason"].astype(str) == ""
        for row, reason in zip(block["row"][~good].tolist(), block["reason"][~good], strict=True):
            if row not in self._rows:
                self._rows.add(row)
                shard, key = (self.table.column(name)[row].as_py() for name in ("shard", "key"))
                self.entries.append({"shard": shard, "key": key, "index": row, "reason": str(reason)})
        if len(self.entries) > self.max_bad * self.table.num_rows:
            raise UserError(
                f"{len(self.entries)} of {self.table.num_rows} images are broken, more than max_bad = "
                f"{self.max_bad:g} allows; the first is {self.first()}. Mend or drop these files, or raise max_bad."
            )
        return good

    def first(self) -> str:
        """Name the first broken image and its fault."""
        entry = self.entries[0]
        return printable(f"{entry['key']} in {entry['shard']} ({entry['reason']})")
