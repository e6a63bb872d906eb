"""Work on shards is the same call over and over: run it in Ray tasks, a bounded number at once, with
progress.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from isd_ray.errors import UserError
from isd_ray.session import start_ray


def run_tasks(
    call: Callable,
    items: Sequence[tuple],
    *,
    workers: int | None = None,
    unit: str = "tasks",
    quiet: bool = True,
    count: Callable[[Any], int] = lambda _: 1,
    total: int | None = None,
) -> list:
    """Return `[call(*item) for item in items]`, computed in Ray tasks of one core each.

    Args:
        workers: tasks at once; None: every core of the cluster; 0: no Ray, in this process.
        unit: what the progress counts, e.g. "images".
        count: how many units a result stands for.
        total: units in all (default: one an item).

    Raises:
        UserError: fewer than 0 workers, and what a call raises.
    """
    if (workers or 0) < 0:
        raise UserError(f"--workers {workers}: give the tasks at once, or 0 for this process alone")
    progress = Progress(unit, len(items) if total is None else total, quiet)
    with progress:
        if workers == 0:
            return [progress.add(call(*item), count) for item in items]
        start_ray()
        workers = workers or int(ray.cluster_resources().get("CPU", 1))
        return _in_ray(call, items, workers, lambda result: progress.add(result, count))


def _in_ray(call: Callable, items: Sequence[tuple], workers: int, seen: Callable[[Any], Any]) -> list:
    task = ray.remote(num_cpus=1, max_retries=2)(call)
    results: list[Any] = [None] * len(items)
    waiting = iter(enumerate(items))
    running: dict[ray.ObjectRef, int] = {}
    while True:
        for i, item in waiting:
            running[task.remote(*item)] = i
            if len(running) >= workers:
                break
        if not running:
            return results
        done, _ = ray.wait(list(running))
        for reference in done:
            results[running.pop(reference)] = seen(_get(reference))


def _get(reference: ray.ObjectRef) -> Any:
    """Fetch a result; an error of the task comes back as itself, not wrapped in Ray's traceback."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause or error) from None


class Progress:
    """A bar on a terminal, a line a second elsewhere, nothing when quiet."""

    def __init__(self, unit: str, total: int, quiet: bool):
        self.unit, self.total, self.quiet = unit, total, quiet
        self.done, self.started, self.said = 0, time.monotonic(), time.monotonic()
        columns = (TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
        self.bar = Bar(TextColumn(unit), BarColumn(), MofNCompleteColumn(), *columns)
        self.live = not quiet and sys.stdout.isatty()
        self.task = self.bar.add_task(unit, total=total, rate="")

    def __enter__(self) -> "Progress":
        if self.live:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.bar.stop()

    def add(self, result: Any, count: Callable[[Any], int]) -> Any:
        """Count `result`, say how far the work is, and hand it on."""
        self.done += count(result)
        now = time.monotonic()
        rate = self.done / max(now - self.started, 1e-9)
        if self.live:
            self.bar.update(self.task, completed=self.done, rate=f"{rate:.0f}/s")
        elif not self.quiet and (now - self.said >= 1 or self.done >= self.total):
            left = max(self.total - self.done, 0) / max(rate, 1e-9)
            print(f"{self.done}/{self.total} {self.unit}  {rate:.0f}/s  {left:.0f} s left", flush=True)
            self.said = now
        return result
