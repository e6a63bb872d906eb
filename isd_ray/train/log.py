"""Numbers of the run while it goes: gathered over the workers every few steps, shown, written, and checked."""

import time
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from isd_ray.config import Config
from isd_ray.data.stream import Stream
from isd_ray.errors import UserError
from isd_ray.train.folder import RunFolder, checkpoint_names
from isd_ray.train.loggers import open_loggers
from isd_ray.train.parts import PARTS, STAGES, Clock, shares
from isd_ray.train.progress import MetricsWriter, Progress
from isd_ray.train.state import Worker


class Log:
    """Collects loss, diagnostics and where the time goes; every `log_every` steps it reduces them over the workers.

    That reduction is the only communication besides gradients and queue. Rank 0's clock rides along in it, so all
    workers agree on when to save a checkpoint. Used as a context, it tells trackers its end.
    """

    def __init__(
        self, config: Config, folder: RunFolder, worker: Worker, stream: Stream, step: int, clock: Clock
    ) -> None:
        self.config, self.folder, self.worker, self.steps = config, folder, worker, stream.steps
        self.stream, self.clock = stream, clock
        self.every = config.train.log_every
        self.loss, self.count = torch.zeros((), device=worker.device), 0
        self.started = self.saved = time.monotonic()
        self.first = worker.rank == 0
        if self.first:
            batch = config.train.batch_size
            self.loggers = open_loggers(config, folder, worker.out, step)
            self.progress = Progress(config.train.epochs, self.steps, batch, start_step=step, out=worker.out)
            self.metrics = MetricsWriter(folder, start_step=step)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        with suppress(OSError, UserError):  # what failed first is what is told
            self.close(failed=True)

    def due(self, step: int) -> bool:
        """Tell whether the log is reduced once `step` steps are done: at the same steps on all workers."""
        return step % self.every == 0 or step % self.steps == 0

    def add(self, loss: Tensor) -> None:
        """Add this rank's share of one step's loss, without waiting for the device."""
        self.loss += loss
        self.count += 1

    def reduce(self, step: int, rate: float, diagnostics: dict[str, Tensor]) -> bool:
        """Gather the numbers since the last call, show and write them; tell whether a checkpoint is due.

        Raises UserError on all workers when the loss is not finite.
        """
        seconds = time.monotonic() - self.started
        clock = float(time.monotonic() - self.saved >= self.config.train.checkpoint_seconds)
        names = sorted(diagnostics)
        values = [self.loss / self.count, *(diagnostics[name].float() / self.worker.world for name in names)]
        parts, stages = shares(self.clock.take()), self.stream.take_stages()
        extra = [*parts.values(), *stages.values(), self.worker.world * clock * self.first]
        extra = [value / self.worker.world for value in extra]
        vector = torch.cat([torch.stack([v.to(self.loss) for v in values]), self.loss.new_tensor(extra)])
        if self.worker.world > 1:
            dist.all_reduce(vector)
        loss, *numbers, save = vector.tolist()
        found = dict(zip([*names, *parts, *stages], numbers, strict=True))
        if not torch.isfinite(vector[0]):
            raise UserError(self.not_finite(step))
        if self.first:
            self.show(step, loss, rate, {name: found[name] for name in names}, found, seconds)
        self.loss.zero_()
        self.count, self.started = 0, time.monotonic()
        return save > 0

    def show(
        self,
        step: int,
        loss: float,
        rate: float,
        diagnostics: dict[str, float],
        spent: dict[str, float],
        seconds: float,
    ) -> None:
        """Show progress and write one line of metrics; `spent`: shares of the parts, ms an image of the stages."""
        self.progress.step(step, loss, diagnostics, spent["wait"] * seconds, lr=rate)
        images = self.count * self.config.train.batch_size / seconds
        speed = {"images_per_second": round(images, 1)}
        speed |= {f"{part}_share": round(spent[part], 4) for part in PARTS}
        speed |= {f"{stage}_ms": round(spent[stage], 4) for stage in STAGES}
        epoch = (step - 1) // self.steps
        numbers = {"epoch": epoch, "loss": loss, "lr": rate, **speed, **diagnostics}
        self.metrics.write({"step": step} | numbers)
        self.loggers.row(step, numbers)

    def measured(self, row: dict[str, Any]) -> None:
        """Send what was measured on the way to trackers: a row of validation.jsonl, on rank 0."""
        self.loggers.row(row["step"], {k: v for k, v in row.items() if "." in k}, "validation/")

    def not_finite(self, step: int) -> str:
        """Say where the loss broke and what is left."""
        names = checkpoint_names(self.folder)
        kept = f"the last good checkpoint is {names[-1]}" if names else "no checkpoint was written yet"
        return (
            f"the loss is not finite at step {step} (epoch {(step - 1) // self.steps + 1}); lower --train.lr "
            f"or raise the temperatures; {kept}"
        )

    def was_saved(self) -> None:
        """Make the metrics up to the checkpoint visible and start the clock of the next one."""
        self.saved = time.monotonic()
        if self.first:
            self.metrics.flush()
            self.loggers.flush()

    def close(self, failed: bool = False) -> None:
        """Finish the progress line, the files and the trackers."""
        if self.first:
            self.progress.close()
            self.loggers.finish(failed)
            self.metrics.close()
