"""Ray Tune, as the sweep uses it: it finds room for trials, starts and ends their processes, and passes results on.

What is tried and what is stopped is `Search`'s business; Tune's own state is not kept (docs/design.md, Sweeps: why).
"""

import functools
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from isd_ray.config import Config, validate
from isd_ray.ending import why_it_died
from isd_ray.errors import MachineError, UserError
from isd_ray.room import DRIVER_CPUS
from isd_ray.sweep.check import Plan
from isd_ray.sweep.search import DONE, Job, Search
from isd_ray.sweep.trial import run_config, run_job
from isd_ray.train.cluster import new_notes, release_orphans, remove_notes
from isd_ray.train.failure import read_failure
from isd_ray.train.folder import RunFolder
from isd_ray.train.trainer import open_splits, prepare_run
from isd_ray.train.validation import Row

TIDY_SECONDS = 2.0
STOP = "stop"  # file in the folder of a run that is to end
Event = Callable[[str, Job, dict[str, Any]], None]  # ("started" | "row" | "ended", job, numbers)


def run(plan: Plan, search: Search, concurrent: int, gpus: float, notify: Event) -> None:
    """Run jobs until the search has none left. A job that fails, or whose process dies, does not end it."""
    uri, resources = search.folder.uri, plan.space.resources
    workers, memory = int(plan.base["train"].get("workers", 0)), resources.memory
    open_once = functools.lru_cache(maxsize=2)(lambda data: open_splits(validate(json.loads(data))))

    def prepared(job: Job, seed: int) -> Config:
        config = run_config(plan, uri, job, seed, gpus)
        splits = open_once(config.model_dump_json(include={"data": True, "evaluate": {"bank"}}))
        prepare_run(config, splits)
        return config

    jobs = _Jobs(search, concurrent, notify, prepared)

    def trial(config: dict[str, Any]) -> None:
        configs = [validate(values) for values in config["runs"]]
        failure = run_job(configs, memory, report_row)
        if failure:
            tune.report({"failure": failure})

    # With workers the driver takes next to nothing: they have a placement group of their own, which it could starve.
    takes = {"cpu": DRIVER_CPUS} if workers else {"cpu": float(resources.cpus), "gpu": gpus}
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial's failure is told by `notify`
    notes = search.folder.sub(new_notes(search.folder))
    name = f"tune-{os.getpid()}-{os.urandom(4).hex()}"
    tuner = tune.Tuner(
        tune.with_resources(trial, takes),
        tune_config=tune.TuneConfig(
            search_alg=_Suggest(jobs),
            scheduler=_Stop(jobs),
            num_samples=-1,
            reuse_actors=not workers and not memory,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=notes.path,
            storage_filesystem=notes.filesystem,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=resources.retries),
            callbacks=[_Tidy()] if workers else [],
        ),
    )
    try:
        tuner.fit()
    finally:
        remove_notes(search.folder)  # ours are the journal and the run folders


def report_row(row: Row, run: RunFolder) -> bool:
    """Report a row from a trial's process, which waits for the search; tell whether the trial is to stop."""
    tune.report({"row": row})
    return run.exists(STOP)


def last_error(trial: Any) -> str:
    """Return what Tune has noted of a trial's last death; it calls its scheduler before the error has its place."""
    if not trial.error_file or not os.path.exists(trial.error_file):
        return ""
    notes = Path(trial.error_file).read_text(errors="replace").split("Failure # ")[-1]
    return notes.partition("\n")[2]


class _Jobs:
    """Which of Tune's trials is which job."""

    def __init__(
        self, search: Search, concurrent: int, notify: Event, prepared: Callable[[Job, int], Config]
    ) -> None:
        self.search, self.concurrent, self.notify, self.prepared = search, concurrent, notify, prepared
        self.by_trial: dict[str, Job] = {}
        self.lost: dict[str, str] = {}

    def ended(self, job: Job, failure: str | None) -> None:
        """Pass the end of a job on."""
        self.search.ended(job, failure)
        self.notify("ended", job, {"failure": failure})

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher and scheduler; what is to be kept of ours stands in the journal."""
        return {}


class _Tidy(tune.Callback):
    """Frees what trials with workers leave behind when they die: the next trials would wait for it for ever."""

    def __init__(self) -> None:
        self.last = 0.0

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        """Called some ten times a second."""
        if time.monotonic() - self.last > TIDY_SECONDS:
            release_orphans()
            self.last = time.monotonic()


class _Suggest(Searcher):
    """Hands the search's next job to Tune, and the end of a job to the search."""

    def __init__(self, jobs: _Jobs) -> None:
        super().__init__()  # no metric: the search looks for itself
        self.jobs = jobs

    def suggest(self, trial_id: str) -> Any:
        jobs = self.jobs
        if len(jobs.by_trial) >= jobs.concurrent:
            return None
        while isinstance(job := jobs.search.next(), Job):
            jobs.notify("started", job, {})
            try:
                runs = [jobs.prepared(job, seed).model_dump() for seed in job.seeds]
            except MachineError:
                raise
            except UserError as error:  # a setting that cannot work, like a batch larger than the data set
                jobs.ended(job, str(error))
                continue
            jobs.by_trial[trial_id] = job
            return {"runs": runs}
        return Searcher.FINISHED if job == DONE else None

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        job = self.jobs.by_trial.pop(trial_id)
        failure = (
            self.jobs.lost.pop(trial_id, "its process ended") if error else (result or {}).get("failure")
        )
        self.jobs.ended(job, failure)

    def save(self, checkpoint_path: str) -> None:
        """Tune asks for a file; what there is to save stands in the journal already."""
        open(checkpoint_path, "w").close()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the journal has it."""


class _Stop(FIFOScheduler):
    """Asks the search, at every row, whether the trial goes on.

    A trial that does not is asked to end, through a file in its run's folder. Tune's own STOP would take its process
    away under Ray Train, which then leaves the workers' placement group behind until the driver ends (Ray 2.60).
    """

    def __init__(self, jobs: _Jobs) -> None:
        super().__init__()
        self.jobs = jobs

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        job = self.jobs.by_trial.get(trial.trial_id)
        row = {k.removeprefix("row/"): v for k, v in result.items() if k.startswith("row/")}
        if job is None or not row or result.get("done"):  # the last result comes a second time, as the end
            return self.CONTINUE
        stop = self.jobs.search.heard(job, row)
        if stop:
            self.jobs.search.run_folder(job.number, row["seed"]).write(STOP, b"")
        self.jobs.notify("row", job, row | {"stop": stop})
        return self.CONTINUE

    def on_trial_error(self, controller: Any, trial: Any) -> None:
        """A process died: find out why before the search is told."""
        job = self.jobs.by_trial[trial.trial_id]
        folders = (self.jobs.search.run_folder(job.number, seed) for seed in job.seeds)
        left = next((reason for f in folders if (reason := read_failure(f)) is not None), None)
        self.jobs.lost[trial.trial_id] = why_it_died(last_error(trial)) if left is None else left
