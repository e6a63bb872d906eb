"""Rows of the index as decoded blocks, in order, through Ray Data: the one place where the data room touches Ray."""

import logging
import math
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from itertools import cycle
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from pyarrow import fs

from isd_ray.data import index as index_table
from isd_ray.data.files import open_filesystem
from isd_ray.data.read import Shape, read_rows
from isd_ray.errors import UserError, printable

Block = dict[str, np.ndarray]

BLOCK_BYTES = 16 * 2**20  # decoded bytes in one block of the object store, or one batch where that is more
# Blocks that a task may put there before somebody takes them (Ray Data's limit), and, times the concurrent tasks, past
# which no task starts: Ray's own limit is half of the store, and a slow reader then had the whole epoch in it.
TASK_BLOCKS = 2
AHEAD = 2  # batches fetched before they are asked for
TASK_CPUS = 0  # workers may hold every CPU, and tasks must run all the same: their number is bounded instead
# Three lines of the executor a dataset are too many when every epoch is one.
logging.getLogger("ray.data._internal.execution.streaming_executor").setLevel(logging.WARNING)
logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # says that there is no progress bar
TASK_RETRIES = 2  # after the death of a process; Ray Data's own default is for ever, which looks like a hang


class Blocks:
    """Reads rows of one index: through Ray Data where Ray runs, else with the same operator in this process."""

    def __init__(self, table: pa.Table):
        self.table = table
        self.filesystem, self.folder = open_filesystem(index_table.root(table))
        # Ray Data keeps metrics and a log file for every name that a dataset ever had, and names one anew with every
        # epoch: about a MiB an epoch. Two names take turns, since an epoch that is left early may not have ended yet.
        self._names = cycle([f"isd_ray_{uuid.uuid4().hex[:12]}_{turn}" for turn in range(2)])

    @property
    def is_local(self) -> bool:
        """Tell whether the shards lie on a local file system, where a read costs next to nothing."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    @cached_property
    def _table_ref(self) -> ray.ObjectRef:
        return ray.put(self._ranges)

    @cached_property
    def _ranges(self) -> pa.Table:
        return self.table.select(["shard", "offset", "size"]).combine_chunks()

    def read(
        self,
        rows: np.ndarray,
        position: np.ndarray,
        ranges: list[tuple[int, int]],
        batch: int,
        shape: Shape,
        world: int = 1,
        then: Callable[[ray.data.Dataset], ray.data.Dataset] | None = None,
    ) -> Iterator[Block]:
        """Yield the blocks of `read_rows` in order, `batch` rows each (the last one may be short).

        ranges: parts [start, stop) of `rows` that follow each other, one a task, multiples of `batch` but the
        last. world: ranks that read at the same time and share the cluster's CPUs. then: adds operators to the dataset,
        one row out for one row in, `row` among its columns; it needs Ray.
        """
        if not ranges:
            return
        work = partial(_read_range, filesystem=self.filesystem, folder=self.folder, batch=batch, shape=shape)
        if not ray.is_initialized():
            for start, stop in ranges:
                item = {"start": np.array([start]), "stop": np.array([stop])}
                yield from work(item, table=self._ranges, rows=rows, position=position)
            return
        refs = {"table": self._table_ref, "rows": ray.put(rows), "position": ray.put(position)}
        dataset = _dataset(work, refs, ranges, world, block_batches(batch, shape) * batch * row_bytes(shape))
        dataset = dataset if then is None else then(dataset)
        name = next(self._names)
        dataset.get_dataset_id = lambda: name  # type: ignore[method-assign]
        try:
            blocks = dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=AHEAD)
            yield from cut_batches(blocks, batch)
        except ray.exceptions.RayTaskError as error:
            raise _user_error(error) or error from None


def row_bytes(shape: Shape) -> int:
    """Return the decoded bytes of one row."""
    return math.prod(shape.array)


def block_batches(batch: int, shape: Shape) -> int:
    """Return how many whole batches make one block."""
    return max(1, BLOCK_BYTES // (batch * row_bytes(shape)))


def task_rows(batch: int, shape: Shape) -> int:
    """Return how many rows one task gives, in whole batches, without ever waiting for its turn.

    Batches come in order, so a task that is ahead stops when its blocks that nobody has taken are as many as
    Ray Data allows, and its core idles.
    """
    return TASK_BLOCKS * block_batches(batch, shape) * batch


def cut_batches(blocks: Iterable[Block], batch: int) -> Iterator[Block]:
    """Yield `batch` rows at a time (the last ones may be fewer); blocks of whole batches are cut without a copy.

    `iter_batches(batch_size=batch)` gives the same and copies every batch.
    """
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


def _dataset(
    work: Any, refs: dict[str, Any], ranges: list[tuple[int, int]], world: int, block_bytes: int
) -> ray.data.Dataset:
    """Build one fused operator over ranges; its settings stay with this dataset."""
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.target_max_block_size = block_bytes  # a little less than the other columns make it
    tasks = max(1, int(ray.cluster_resources().get("CPU", 1)) // world)
    tasks = min(tasks, len(ranges))
    context.execution_options.resource_limits = ray.data.ExecutionResources(
        object_store_memory=TASK_BLOCKS * max(block_bytes, BLOCK_BYTES) * tasks
    )
    with ray.data.DataContext.current(context):
        items = [{"start": start, "stop": stop} for start, stop in ranges]
        dataset = ray.data.from_items(items, override_num_blocks=len(items))
        with warnings.catch_warnings():  # Ray 2.60 calls max_retries deprecated and has no other name for it
            warnings.simplefilter("ignore", DeprecationWarning)
            return dataset.map_batches(
                partial(_fetch_and_read, work=work, refs=refs),
                batch_size=1,
                num_cpus=TASK_CPUS,
                compute=ray.data.TaskPoolStrategy(size=tasks),
                max_retries=TASK_RETRIES,
            )


def _user_error(error: BaseException | None) -> UserError | None:
    """Return the UserError that a task raised, from under what Ray wraps around it and without the lines it adds."""
    while error is not None and not isinstance(error, UserError | ray.exceptions.RayError):
        error = error.__cause__
    if isinstance(
        error, ray.exceptions.RayError
    ):  # first: Ray's class for a task's error is of the error's class too
        return _user_error(getattr(error, "cause", None))
    return None if error is None else UserError(str(error).partition("\n")[0])


def _fetch_and_read(item: Block, work: Any, refs: dict[str, Any]) -> Iterator[Block]:
    yield from work(item, **{name: ray.get(ref) for name, ref in refs.items()})


def _read_range(
    item: Block, *, filesystem: fs.FileSystem, folder: str, table: pa.Table, rows: np.ndarray, position: np.ndarray,
    batch: int, shape: Shape,
) -> Iterator[Block]:  # fmt: skip
    part = slice(int(item["start"][0]), int(item["stop"][0]))
    yield from read_rows(filesystem, folder, table, rows[part], position[part], batch, shape)


class BadImages:
    """The broken images that were met, each once, and the limit past which there are too many."""

    def __init__(self, table: pa.Table, max_bad: float):
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
