"""What a sweep is doing: one table that stays in place on a terminal, one line an event in a log."""

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from isd_ray.errors import printable
from isd_ray.sweep.search import Job
from isd_ray.sweep.space import Space

SHOWN = 12  # finished trials in the table


class Board:
    """Takes the events of `tune.run` and shows them. Use it as a context manager."""

    def __init__(self, space: Space, out: TextIO | None = None) -> None:
        self.space, self.out = space, out or sys.stdout
        self.rows: dict[Job, dict[str, Any]] = {}
        self.began = time.monotonic()
        self.live = Live(console=Console(file=self.out)) if self.out.isatty() else None

    def __enter__(self) -> "Board":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live:
            self.live.stop()

    def __call__(self, event: str, job: Job, numbers: Mapping[str, Any]) -> None:
        """Show one event."""
        row = self.rows.setdefault(job, {"state": "runs", "epoch": 0, "goals": None})
        if event == "row":
            row |= {"epoch": numbers["epoch"], "goals": [numbers.get(goal) for goal in self.space.goals]}
            row |= {"state": "stopped"} if numbers["stop"] else {}
        elif event == "ended" and row["state"] != "stopped":
            row |= {"state": f"failed: {numbers['failure']}" if numbers["failure"] else "finished"}
        if self.live:
            self.live.update(self.table())
        elif event != "row":
            print(printable(self.line(event, job, row)), file=self.out, flush=True)

    def line(self, event: str, job: Job, row: Mapping[str, Any]) -> str:
        """Return an event as a line of a log."""
        seconds = time.monotonic() - self.began
        if event == "started":
            values = "  ".join(f"{name} {short(value)}" for name, value in job.values.items())
            return f"[{seconds:5.0f} s] {title(job)} starts: {values}"
        return f"[{seconds:5.0f} s] {title(job)} {row['state']} after epoch {row['epoch']}: {self.goals(row)}"

    def goals(self, row: Mapping[str, Any]) -> str:
        """Return the goals of a row as text."""
        if row["goals"] is None:
            return "not evaluated"
        return "  ".join(
            f"{goal} {short(value)}" for goal, value in zip(self.space.goals, row["goals"], strict=True)
        )

    def table(self) -> Table:
        """Return the table: running jobs first, then the best that ended."""
        varied = list(dict.fromkeys(name for job in self.rows for name in job.values))
        table = Table(
            title=f"{len(self.rows)} of about {self.expected()} jobs, {time.monotonic() - self.began:.0f} s"
        )
        for column in ("", *(name.split(".")[-1] for name in varied), "epoch", *self.space.goals, "state"):
            table.add_column(column, justify="left" if column in ("", "state") else "right", overflow="fold")
        for job, row in self.ordered():
            goals = row["goals"] or [None] * len(self.space.goals)
            values = [short(job.values.get(name)) for name in varied]
            cells = [title(job), *values, str(row["epoch"]), *map(short, goals), row["state"][:60]]
            table.add_row(*(Text(printable(cell)) for cell in cells))
        return table

    def ordered(self) -> list[tuple[Job, dict[str, Any]]]:
        """Return the jobs to show."""
        running = [item for item in self.rows.items() if item[1]["state"] == "runs"]
        ended = [item for item in self.rows.items() if item[1]["state"] != "runs"]
        best = sorted(ended, key=lambda item: -((item[1]["goals"] or [None])[0] or -1.0))
        return running + best[:SHOWN]

    def expected(self) -> int:
        """Return how many jobs a sweep from the beginning has."""
        return self.space.budget.trials + (self.space.confirm.best + 1) * self.space.confirm.seeds


def title(job: Job) -> str:
    """Return the name of a job."""
    name = f"trial {job.number}" + (" (default)" if job.number == 0 else "")
    return f"{name}, seed {job.seeds[0]}" if job.confirms else name


def short(value: Any) -> str:
    """Return a value in few characters."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
