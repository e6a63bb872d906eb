"""One trial: ordinary runs of the pretrain job, one a seed, in the process that Tune gives it."""

import os
import threading
from collections.abc import Callable
from typing import Any

import torch

from isd_ray.config import Config, merge, resolve
from isd_ray.data.files import join
from isd_ray.sweep.check import Plan
from isd_ray.sweep.search import Job, trial_uri
from isd_ray.sweep.space import STATM
from isd_ray.train.cluster import WorkerDied
from isd_ray.train.failure import FAILURE, leave_failure
from isd_ray.train.folder import RunFolder, load_checkpoint
from isd_ray.train.trainer import export, summary, train_prepared
from isd_ray.train.validation import Row, read_rows

POLL = 0.2  # seconds between two looks at the memory


def run_job(
    configs: list[Config], memory: float | None, tell: Callable[[Row, RunFolder], bool]
) -> str | None:
    """Run a job's runs one after another, from their checkpoints where there are any; returns why it failed, or None.

    Raises WorkerDied where the process of a Ray Train worker ended.

    memory: GiB past which this process ends itself. tell: called with each row of validation.jsonl and its seed, also
    those of before an interruption, and with the run's folder; it returns whether the job is to stop there.
    """
    for config in configs:
        folder = RunFolder(join(config.output, str(config.name)))
        if folder.exists(FAILURE):
            folder.remove(FAILURE)  # of an attempt before this one
        with MemoryLimit(memory, folder):
            try:
                if not train_to_the_end(config, folder, tell):
                    return None
            except Exception as error:
                reason = leave_failure(folder, error)
                if isinstance(error, WorkerDied):
                    raise  # as the death of this process would be: Tune counts it and starts the trial again
                return reason
            finally:
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()  # the next trial of this process needs the room
    return None


def train_to_the_end(config: Config, folder: RunFolder, tell: Callable[[Row, RunFolder], bool]) -> bool:
    """Train a run that the driver has prepared, unless it is finished; tell whether it came to its end.

    That is the pretrain job without its test.
    """
    stopped = False

    def listen(row: Row) -> bool:
        nonlocal stopped
        stopped = tell(row | {"seed": config.train.seed}, folder)
        return stopped

    if any(listen(row) for row in known_rows(folder)):
        return False
    if folder.exists("result.json"):
        return True
    seconds = train_prepared(config, folder, config.train.device, listen)
    if not stopped:
        export(config, folder)
        folder.write_json("result.json", summary(config, folder, seconds))
    return not stopped


def run_config(plan: Plan, sweep: str, job: Job, seed: int, gpus: float) -> Config:
    """Return the configuration of one run; `jobs/pretrain.py --config` repeats it.

    gpus: of a trial, or of each of its workers; 0: on CPU.
    """
    resources = plan.space.resources
    options: dict[str, Any] = {
        **plan.space.run_options(job.values, seed),
        "name": f"seed-{seed}",
        "output": trial_uri(sweep, job.number),
        "train.threads": resources.cpus,
        "train.device": "cuda" if gpus else "cpu",
    }
    if gpus:
        options["train.gpus_per_worker"] = gpus
    return resolve(merge(plan.base), options)


def known_rows(folder: RunFolder) -> list[Row]:
    """Return the rows up to the checkpoint that the run goes on from: those after it are measured anew."""
    rows = read_rows(folder)
    saved = load_checkpoint(folder) if rows else None
    return [row for row in rows if saved and row["step"] <= saved["step"]]


class MemoryLimit:
    """Ends this process when it takes more than `limit` GiB, before it takes its neighbours' or the machine's.

    The reason is left in the run's folder. None: no limit.
    """

    def __init__(self, limit: float | None, folder: RunFolder) -> None:
        self.limit, self.folder = limit, folder
        self.over = threading.Event()

    def __enter__(self) -> None:
        if self.limit is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    def __exit__(self, *_: Any) -> None:
        self.over.set()

    def _watch(self) -> None:
        while not self.over.wait(POLL):
            taken = resident_memory() / 2**30
            if self.limit is not None and taken > self.limit:
                reason = f"out of memory: it took {taken:.2f} GiB, resources.memory allows {self.limit:g}"
                self.folder.write_json(FAILURE, {"reason": reason})
                os._exit(1)


def resident_memory() -> int:
    """Return the bytes of main memory that this process holds (Linux)."""
    pages = int(STATM.read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
