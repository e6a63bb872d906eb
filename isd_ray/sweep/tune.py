"""Ray Tune, as the sweep uses it: it finds room for trials, starts and ends their processes, and passes results on.

What is tried and what is stopped is `Search`'s business; Tune's own state is not kept (docs/design.md 5a says why).
"""

import math
import os
from collections.abc import Callable
from typing import Any

import ray
from ray import tune
from ray.tune.execution.placement_groups import PlacementGroupFactory
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from isd_ray.errors import UserError
from isd_ray.sweep.check import Plan
from isd_ray.sweep.search import DONE, FAILURE, Job, Search
from isd_ray.sweep.trial import run_job

DATA_CPUS = 1  # CPUs that trials leave to the tasks that read images: without any they would wait for ever
Event = Callable[[str, Job, dict[str, Any]], None]  # ("started" | "row" | "ended", job, numbers)


def room(plan: Plan) -> tuple[int, float]:
    """Return (trials at once, GPUs of a trial or of each of its workers).

    Raises UserError where the cluster can never hold one trial, or not as many at once as the file asks for.
    """
    resources, workers = plan.space.resources, int(plan.base["train"].get("workers", 0))
    have = ray.cluster_resources()
    cpus, all_gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
    gpus = resources.gpus if resources.gpus is not None else min(all_gpus, 1.0)
    parts = max(workers, 1)  # of a trial with workers, its driver takes nothing
    needs: dict[str, tuple[float, float]] = {"CPUs": (parts * resources.cpus, cpus - DATA_CPUS)}
    if gpus:
        needs["GPUs"] = (parts * gpus, all_gpus)
    for unit, (need, free) in needs.items():
        if need > free:
            kept = f", {DATA_CPUS} of which is kept for reading images" if unit == "CPUs" else ""
            raise UserError(
                f"resources: a trial takes {need:g} {unit} and this cluster has {have.get(unit[:3], 0):g}{kept}; lower "
                f"resources.{unit.lower()} or train.workers"
            )
    fitting = min(math.floor(free / need + 1e-9) for need, free in needs.values())
    if resources.concurrent is not None and resources.concurrent > fitting:
        raise UserError(
            f"resources.concurrent {resources.concurrent}: {fitting} trials fit on this cluster at once; lower it"
        )
    return resources.concurrent or fitting, gpus


def run(plan: Plan, search: Search, concurrent: int, gpus: float, notify: Event) -> None:
    """Run jobs until the search has none left. A job that fails, or whose process dies, does not end it."""
    uri, jobs = search.folder.uri, _Jobs(search, concurrent, notify)
    workers = int(plan.base["train"].get("workers", 0))
    resources = plan.space.resources

    def trial(config: dict[str, Any]) -> None:
        job = Job(**(config["job"] | {"seeds": tuple(config["job"]["seeds"])}))
        failure = run_job(plan, uri, job, gpus, lambda row: tune.report({"row": row}))
        if failure:
            tune.report({"failure": failure})

    bundle = {"CPU": float(resources.cpus)} | ({"GPU": gpus} if gpus else {})
    if workers:
        bundle = {
            "CPU": 0.0
        }  # the workers take a placement group of their own; a driver that took a CPU could starve it
    name = f"tune-{os.getpid()}-{os.urandom(4).hex()}"
    tuner = tune.Tuner(
        tune.with_resources(trial, PlacementGroupFactory([bundle])),
        tune_config=tune.TuneConfig(
            search_alg=_Suggest(jobs),
            scheduler=_Stop(jobs),
            num_samples=-1,
            reuse_actors=not workers and not resources.memory,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=f"{uri}/ray",
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=resources.retries),
        ),
    )
    try:
        tuner.fit()
    finally:
        search.folder.remove_folder("ray")  # Tune's own notes; ours are the journal and the run folders


class _Jobs:
    """Which of Tune's trials is which job."""

    def __init__(self, search: Search, concurrent: int, notify: Event) -> None:
        self.search, self.concurrent, self.notify = search, concurrent, notify
        self.by_trial: dict[str, Job] = {}
        self.lost: dict[str, str] = {}


class _Suggest(Searcher):
    """Hands the search's next job to Tune, and the end of a job to the search."""

    def __init__(self, jobs: _Jobs) -> None:
        super().__init__()  # no metric: the search looks for itself
        self.jobs = jobs

    def suggest(self, trial_id: str) -> Any:
        jobs = self.jobs
        if len(jobs.by_trial) >= jobs.concurrent:
            return None
        job = jobs.search.next()
        if job == DONE:
            return Searcher.FINISHED
        if not isinstance(job, Job):
            return None
        jobs.by_trial[trial_id] = job
        jobs.notify("started", job, {})
        plain = {
            "number": job.number,
            "values": dict(job.values),
            "seeds": list(job.seeds),
            "confirms": job.confirms,
        }
        return {"job": plain}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        job = self.jobs.by_trial.pop(trial_id)
        failure = (
            self.jobs.lost.pop(trial_id, "its process ended") if error else (result or {}).get("failure")
        )
        self.jobs.search.ended(job, failure)
        self.jobs.notify("ended", job, {"failure": failure})

    def save(self, checkpoint_path: str) -> None:
        """Tune asks for a file; what there is to save stands in the journal already."""
        open(checkpoint_path, "w").close()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the journal has it."""


class _Stop(FIFOScheduler):
    """Asks the search, at every row, whether the trial goes on."""

    def __init__(self, jobs: _Jobs) -> None:
        super().__init__()
        self.jobs = jobs

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        job = self.jobs.by_trial.get(trial.trial_id)
        row = {k.removeprefix("row/"): v for k, v in result.items() if k.startswith("row/")}
        if job is None or not row or result.get("done"):  # the last result comes a second time, as the end
            return self.CONTINUE
        stop = self.jobs.search.heard(job, row)
        self.jobs.notify("row", job, row | {"stop": stop})
        return self.STOP if stop else self.CONTINUE

    def on_trial_error(self, controller: Any, trial: Any) -> None:
        """A process died: find out why before the search is told."""
        job = self.jobs.by_trial[trial.trial_id]
        left = [f for s in job.seeds if (f := self.jobs.search.run_folder(job.number, s)).exists(FAILURE)]
        error = trial.get_error()
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = left[0].read_json(FAILURE)["reason"] if left else f"its process ended: {lines[0]}"
        self.jobs.lost[trial.trial_id] = reason
