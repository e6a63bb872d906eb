"""What a run is doing, for a person who watches and for a file that stays.

`Progress` answers the questions of somebody in front of a terminal or a job's log: how far, how fast, is the
data pipeline the bottleneck, does the loss fall, when is it done. `MetricsWriter` keeps the same numbers as
JSON lines, without repeated or missing steps when a run is resumed. Rank 0 alone uses them.

A *step* counts finished optimiser steps of the whole run: the first call after a fresh start is step 1, after
a resume from step s it is s + 1.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor

from isd_ray.ending import broken
from isd_ray.train.folder import RunFolder, read_lines

METRICS = "metrics.jsonl"
LIVE_REFRESH = 0.5  # seconds between two updates of the live line

Row = dict[str, Any]
Numbers = Mapping[str, float | Tensor]


class Progress:
    """Report a training loop: a live line on a terminal, else a plain line every `interval` seconds and at the end.

    `step` may be called for every step or for every tenth: the figures hold for the time since the last line.
    """

    def __init__(
        self,
        total_epochs: int,
        steps_per_epoch: int,
        global_batch: int,
        start_step: int = 0,
        out: TextIO | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total_epochs, self.steps_per_epoch, self.global_batch = (
            total_epochs,
            steps_per_epoch,
            global_batch,
        )
        self.total = total_epochs * steps_per_epoch
        self.out = out or sys.stderr
        self.interval, self.clock = interval, clock
        self.start_step = self.window_step = start_step
        self.started = self.window_start = self.shown = clock()
        self.waited = 0.0
        self.live = self._start_live() if self.out.isatty() else None

    def step(
        self, step: int, loss: float, diagnostics: Numbers, waited_seconds: float, lr: float | None = None
    ) -> None:
        """Note that step `step` is finished; since the last call `waited_seconds` were spent waiting for data."""
        self.waited += waited_seconds
        now = self.clock()
        due = now - self.window_start >= self.interval or step == self.total
        if due or (self.live and now - self.shown >= LIVE_REFRESH):
            self._show(self._row(step, loss, diagnostics, lr, now), keep=due)
            self.shown = now
        if due:
            self.window_start, self.window_step, self.waited = now, step, 0.0

    def close(self) -> None:
        """End the live line. Safe to call twice."""
        if self.live:
            self.live.stop()
            self.live = None

    def _row(self, step: int, loss: float, diagnostics: Numbers, lr: float | None, now: float) -> Row:
        seconds = max(now - self.window_start, 1e-9)
        pace = (now - self.started) / max(step - self.start_step, 1)
        row: Row = {
            "step": step,
            "epoch": (step - 1) // self.steps_per_epoch,
            "loss": float(loss),
            "images_per_second": (step - self.window_step) * self.global_batch / seconds,
            "wait_share": min(self.waited / seconds, 1.0),
            "eta_seconds": pace * max(self.total - step, 0),
        }
        return row | ({} if lr is None else {"lr": lr}) | {name: float(x) for name, x in diagnostics.items()}

    def _show(self, row: Row, *, keep: bool) -> None:
        line = describe(row, self.total_epochs, self.total)
        if self.live and keep:
            self.live.console.print(Text(line))
        elif self.live:
            self.live.update(Text(line), refresh=True)
        else:
            print(line, file=self.out, flush=True)

    def _start_live(self) -> Live:
        live = Live(console=Console(file=self.out), auto_refresh=False, transient=True)
        live.start()
        return live


SHOWN_APART = ("step", "epoch", "loss", "lr", "images_per_second", "wait_share", "eta_seconds")


def describe(row: Row, total_epochs: int, total_steps: int) -> str:
    """Return a row as one line: epoch i/E, step, loss, lr, images/s, share of time waited for data, the rest,
    ETA.
    """
    parts = [f"epoch {row['epoch'] + 1}/{total_epochs}", f"step {row['step']}/{total_steps}"]
    if "loss" in row:
        parts.append(f"loss {row['loss']:.4f}")
    if "lr" in row:
        parts.append(f"lr {row['lr']:.3g}")
    if "images_per_second" in row:
        parts += [f"{row['images_per_second']:.0f} images/s", f"waited {row['wait_share']:.0%}"]
    parts += [f"{name} {value:.4g}" for name, value in row.items() if name not in SHOWN_APART]
    if "eta_seconds" in row:
        parts.append(f"ETA {duration(row['eta_seconds'])}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Return seconds as h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"


class MetricsWriter:
    """Write rows to metrics.jsonl of a run's folder, one JSON object a line.

    On a resume from step s (`start_step=s`), lines of later steps and a line that was torn by a kill are dropped
    first, so nothing appears twice. A local file grows line by line. A remote one is written whole at `flush`,
    because object stores do not append. NaN and infinities become null, which every JSON reader accepts. Raises
    MachineError where a disk or store fails.
    """

    def __init__(self, folder: RunFolder, start_step: int = 0):
        self.folder = folder
        rows = read_lines(folder, METRICS)
        self.lines = [json.dumps(row) for row in rows if row["step"] <= start_step]
        self._write_whole()
        self.file = Path(folder.path, METRICS).open("a") if folder.local else None  # noqa: SIM115

    def write(self, row: Row) -> None:
        """Add one row; it needs `step` and gets `time`, in seconds since 1970."""
        line = json.dumps(
            {"time": round(time.time(), 3)} | {name: _finite(value) for name, value in row.items()}
        )
        if self.file:
            try:
                self.file.write(line + "\n")
                self.file.flush()
            except OSError as error:
                raise broken(self.folder.place(METRICS), error) from None
        else:
            self.lines.append(line)

    def flush(self) -> None:
        """Make everything visible to readers; call it with each checkpoint. Remote: writes the whole file."""
        if not self.file:
            self._write_whole()

    def close(self) -> None:
        """Flush and close. Safe to call twice."""
        self.flush()
        if self.file:
            self.file.close()

    def _write_whole(self) -> None:
        self.folder.write(METRICS, "".join(line + "\n" for line in self.lines).encode())


def _finite(value: Any) -> Any:
    number = float(value) if isinstance(value, Tensor) else value
    return None if isinstance(number, float) and not -float("inf") < number < float("inf") else number
