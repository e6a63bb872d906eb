"""What is tried next, what is stopped, and what is already known: Optuna's study, kept in a journal.

All of it is a function of the journal and the run folders, so a driver that was killed goes on where it was: the
sampler is seeded anew for every draw, and Optuna's pruners keep their rungs in the study.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState

from isd_ray.data.files import join
from isd_ray.errors import UserError
from isd_ray.sweep.check import Plan
from isd_ray.sweep.journal import FILE, FolderJournal
from isd_ray.sweep.space import Space
from isd_ray.train.failure import FAILURE
from isd_ray.train.folder import RunFolder
from isd_ray.train.validation import Row, read_rows

DRAWS = 200  # draws in a row that may break a constraint or repeat a setting
LEARNED_DRAWS = 20  # so many of them by the sampler; it may insist on a corner that is forbidden
DONE = "done"
optuna.logging.set_verbosity(optuna.logging.ERROR)


@dataclass(frozen=True)
class Job:
    """Runs of one trial: those of the search itself, or one more to confirm it with another seed."""

    number: int
    values: Mapping[str, Any]
    seeds: tuple[int, ...]
    confirms: bool = False


class Search:
    """The study of one sweep; `next` says what to run, `heard` and `ended` take what comes of it."""

    def __init__(self, plan: Plan, folder: RunFolder, images: int | None = None) -> None:
        self.plan, self.space, self.folder, self.images = plan, plan.space, folder, images
        self.goals = plan.space.goals
        self.journal = FolderJournal(folder)
        self.study = self._open_study()
        self.live: dict[Job, optuna.Trial | None] = {}
        self._enqueue_known()

    def trials(self) -> list[FrozenTrial]:
        """Return all trials but those that were drawn and refused."""
        return [t for t in self.study.get_trials(deepcopy=False) if "refused" not in t.user_attrs]

    def next(self) -> Job | str | None:
        """Return the next job; None: none before another ends; DONE: none any more."""
        job = self._unfinished() or self._fresh()
        if job is None and not any(not j.confirms for j in self.live):
            job = next((j for j in self.confirmations() if j not in self.live and self._is_open(j)), None)
            if job is None and not self.live:
                return DONE
        if job is not None and job not in self.live:
            self.live[job] = None if job.confirms else self._handle(job.number)
        return job

    def heard(self, job: Job, row: Row) -> bool:
        """Take a row of validation.jsonl; tell whether the trial is to be stopped.

        The default is never stopped: it is what the others are measured against.
        """
        trial, epoch = self.live[job], row["epoch"]
        if any(row.get(goal) is None for goal in self.goals):
            return True  # what is not measured now never will be: `ended` says so
        if trial is None or len(self.goals) > 1 or row["seed"] != job.seeds[0]:
            return False
        known = self._frozen(job.number)
        if epoch in known.intermediate_values:  # heard before the driver was killed
            return "stopped" in known.user_attrs
        with self.journal.at_once():
            trial.report(row[self.goals[0]], epoch)
            stop = epoch < self.space.budget.epochs and trial.should_prune() and job.number != 0
            if stop:
                trial.set_user_attr("stopped", epoch)
        return stop

    def ended(self, job: Job, failure: str | None) -> None:
        """Take the end of a job: finished, stopped, or failed for a reason."""
        trial = self.live.pop(job)
        if trial is None:
            if failure:
                self.write_failure(job, failure)
            return
        values = None if failure else self._values(job)
        with self.journal.at_once():
            if "stopped" in self._frozen(job.number).user_attrs:
                self.study.tell(trial, state=TrialState.PRUNED)
            elif values is not None:
                self.study.tell(trial, values)
            else:
                trial.set_user_attr("failed", failure or f"{', '.join(self.goals)} was not measured")
                # The sampler learns from a pruned trial that it was bad; from a failed one it learns nothing.
                state = TrialState.PRUNED if len(self.goals) == 1 else TrialState.FAIL
                self.study.tell(trial, state=state)

    def finished(self) -> list[FrozenTrial]:
        """Return the trials that ran to the end, best first goal first."""
        complete = [t for t in self.trials() if t.state == TrialState.COMPLETE]
        return sorted(complete, key=lambda t: (-t.values[0], t.number))

    def candidates(self) -> list[FrozenTrial]:
        """Return the trials that are run again before one is named: the best (of the front) and the default."""
        best = self.finished()
        if len(self.goals) == 2:
            front = {t.number for t in self.study.best_trials}
            best = [t for t in best if t.number in front]
        chosen = best[: max(self.space.confirm.best, 1)]
        return chosen + [t for t in self.finished() if t.number == 0 and t not in chosen]

    def confirmations(self) -> list[Job]:
        """Return the jobs that run the candidates again, each with one further seed."""
        first = self.space.budget.seeds
        seeds = range(first, first + self.space.confirm.seeds)
        return [
            Job(t.number, _Values(t.user_attrs["values"]), (s,), True)
            for s in seeds
            for t in self.candidates()
        ]

    def run_folder(self, number: int, seed: int) -> RunFolder:
        """Return the folder of one run."""
        return RunFolder(join(trial_uri(self.folder.uri, number), f"seed-{seed}"))

    def goals_of(self, number: int, seed: int) -> list[float] | None:
        """Return the goals after the last epoch of one run [%]; None where it did not get there."""
        rows = read_rows(self.run_folder(number, seed))
        if not rows or rows[-1]["epoch"] < self.space.budget.epochs:
            return None
        values = [rows[-1].get(goal) for goal in self.goals]
        return None if None in values else [float(v) for v in values if v is not None]

    def write_failure(self, job: Job, reason: str) -> None:
        """Leave the reason in the folder of the run that failed."""
        self.run_folder(job.number, job.seeds[0]).write_json(FAILURE, {"reason": reason})

    def _open_study(self) -> optuna.Study:
        try:
            return optuna.create_study(
                study_name="sweep",
                storage=JournalStorage(self.journal),
                load_if_exists=True,
                directions=["maximize"] * len(self.goals),
                pruner=build_pruner(self.space),
            )
        except UserError:
            raise
        except (
            Exception
        ) as error:  # Optuna replays the lines and stumbles, in many ways, over one that is missing
            raise UserError(
                f"{self.folder.place(FILE)}: its lines do not fit together ({type(error).__name__}: {error}); put the "
                "file back as it was, or choose another --name"
            ) from error

    def _enqueue_known(self) -> None:
        """Put the default and the file's known settings before everything that is drawn."""
        there = {t.user_attrs.get("known") for t in self.study.get_trials(deepcopy=False)}
        by_name = {d.name: d for d in self.plan.dimensions}
        for i, values in enumerate([self.plan.default, *self.space.start]):
            if i not in there:
                drawn = {name: by_name[name].encode(value) for name, value in values.items()}
                self.study.enqueue_trial(drawn, user_attrs={"known": i})

    def _unfinished(self) -> Job | None:
        """Return a trial that was running when an earlier driver was killed."""
        live = {job.number for job in self.live if not job.confirms}
        running = [t for t in self.trials() if t.state == TrialState.RUNNING and t.number not in live]
        return self._job(running[0].number, running[0].user_attrs["values"]) if running else None

    def _fresh(self) -> Job | None:
        """Draw the next trial, where the budget has one left."""
        begun = [t for t in self.trials() if t.state != TrialState.WAITING]
        if len(begun) >= self.space.budget.trials:
            return None
        tried = [t.user_attrs.get("values") for t in begun]
        for draw in range(DRAWS):
            with self.journal.at_once():
                trial, values, broken = self._ask(len(begun), tried, at_random=draw >= LEARNED_DRAWS)
            if broken is None:
                return self._job(trial.number, values)
        if len(begun) <= 1:
            raise UserError(
                f"constraints: {DRAWS} draws in a row break '{broken}'; widen the ranges or loosen it"
            )
        return None  # a small space can be used up before the budget is

    def _ask(
        self, begun: int, tried: list[Any], at_random: bool
    ) -> tuple[optuna.Trial, dict[str, Any], str | None]:
        """Draw once; returns trial, values, and why it was refused, or None."""
        number = begun + sum("refused" in t.user_attrs for t in self.study.get_trials(deepcopy=False))
        self.study.sampler = build_sampler(self.space, number, at_random)
        trial = self.study.ask()
        values = self._draw(trial)
        broken = self.plan.broken(values, self.images) or ("it was tried before" if values in tried else None)
        trial.set_constraint("refused", 1.0 if broken else -1.0)
        if broken is None:
            trial.set_user_attr("values", values)
        else:
            trial.set_user_attr("refused", broken)
            self.study.tell(trial, state=TrialState.PRUNED)
        return trial, values, broken

    def _draw(self, trial: optuna.Trial) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for dimension in self.plan.dimensions:
            if dimension in self.plan.active(values):
                values[dimension.name] = dimension.suggest(trial)
        return values

    def _job(self, number: int, values: Mapping[str, Any]) -> Job:
        return Job(number, _Values(values), tuple(range(self.space.budget.seeds)))

    def _is_open(self, job: Job) -> bool:
        folder = self.run_folder(job.number, job.seeds[0])
        return self.goals_of(job.number, job.seeds[0]) is None and not folder.exists(FAILURE)

    def _values(self, job: Job) -> list[float] | None:
        """Return the mean over the trial's seeds of every goal."""
        runs = [self.goals_of(job.number, seed) for seed in job.seeds]
        if any(run is None for run in runs):
            return None
        return [float(v) for v in np.mean([run for run in runs if run is not None], axis=0)]

    def _frozen(self, number: int) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[number]

    def _handle(self, number: int) -> optuna.Trial:
        return self._resumed(self._frozen(number))

    def _resumed(self, trial: FrozenTrial) -> optuna.Trial:
        return optuna.Trial(self.study, trial._trial_id)


class _Values(dict):
    """A setting that can be part of a key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self)))


def trial_uri(sweep: str, number: int) -> str:
    """Return the folder that holds the runs of one trial."""
    return join(sweep, "trials", f"{number:04d}")


def build_sampler(space: Space, number: int, at_random: bool = False) -> BaseSampler:
    """Return the sampler for the draw of trial `number`: what it draws depends on the history and this seed alone."""
    sampler = space.sampler
    seed = int(np.random.SeedSequence((sampler.seed, number)).generate_state(1)[0])
    if sampler.name == "random" or at_random:
        return RandomSampler(seed=seed)
    if sampler.name == "nsga2":
        return NSGAIISampler(population_size=sampler.population, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(n_startup_trials=sampler.startup, multivariate=True, group=True, seed=seed)


def build_pruner(space: Space) -> optuna.pruners.BasePruner:
    """Return what stops trials: asynchronous successive halving (Li et al. 2020), the median of whole trials, or none.

    A resource is an epoch of the run, whatever number of times the trial was interrupted.
    """
    scheduler = space.scheduler
    if scheduler.name == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(
            min_resource=scheduler.grace, reduction_factor=scheduler.factor, min_early_stopping_rate=0
        )
    if scheduler.name == "median":
        return optuna.pruners.MedianPruner(
            n_startup_trials=scheduler.startup, n_warmup_steps=scheduler.grace - 1
        )
    return optuna.pruners.NopPruner()
