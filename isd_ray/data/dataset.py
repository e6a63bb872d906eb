"""Rows of the index as a Ray Data dataset, for work whose next operators run on other processes and GPUs.

Training reads by tasks of its own (`isd_ray.data.blocks`), which is faster; here Ray Data's scheduler feeds a pool of
actors, retries what dies and bounds what lies between the operators.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import ray

from isd_ray.data.blocks import (
    AHEAD,
    TASK_RETRIES,
    Block,
    Blocks,
    block_batches,
    cut_batches,
    error_of_task,
    row_bytes,
)
from isd_ray.data.read import Shape, read_rows

Then = Callable[[ray.data.Dataset], ray.data.Dataset]


def read_through(
    blocks: Blocks, rows: np.ndarray, ranges: list[tuple[int, int]], batch: int, shape: Shape, then: Then
) -> Iterator[Block]:
    """Yield what the operators that `then` adds make of the blocks of `rows`, in order; needs Ray.

    One row must come out for one row in, `row` among its columns. ranges: parts [start, stop) of `rows`, one a task.
    """
    if not ranges:
        return
    size = block_batches(batch, shape) * batch
    dataset = then(_dataset(blocks, rows, ranges, size, shape))
    try:
        found = dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=AHEAD)
        yield from cut_batches(found, batch)
    except ray.exceptions.RayTaskError as error:
        raise error_of_task(error) or error from None


def _dataset(
    blocks: Blocks, rows: np.ndarray, ranges: list[tuple[int, int]], size: int, shape: Shape
) -> ray.data.Dataset:
    """Build the operator that opens, reads and decodes; its settings stay with this dataset."""
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.target_max_block_size = size * row_bytes(shape)
    tasks = min(max(1, int(ray.cluster_resources().get("CPU", 1))), len(ranges))
    refs = {"table": blocks.table_ref, "rows": ray.put(rows)}
    place = {"filesystem": blocks.filesystem, "folder": blocks.folder, "batch": size, "shape": shape}
    with ray.data.DataContext.current(context):
        items = [{"start": start, "stop": stop} for start, stop in ranges]
        dataset = ray.data.from_items(items, override_num_blocks=len(items))
        with warnings.catch_warnings():  # Ray 2.60 calls max_retries deprecated and has no other name for it
            warnings.simplefilter("ignore", DeprecationWarning)
            return dataset.map_batches(
                partial(_read_item, refs=refs, place=place),
                batch_size=1,
                num_cpus=0,
                compute=ray.data.TaskPoolStrategy(size=tasks),
                max_retries=TASK_RETRIES,  # Ray Data's own default is for ever, which looks like a hang
            )


def _read_item(item: Block, refs: dict[str, ray.ObjectRef], place: dict[str, Any]) -> Iterator[Block]:
    part = ray.get(refs["rows"])[int(item["start"][0]) : int(item["stop"][0])]
    yield from read_rows(table=ray.get(refs["table"]), rows=part, position=part, **place)
