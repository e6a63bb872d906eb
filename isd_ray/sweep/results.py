"""What a sweep found: a table of all trials, the curves, the winner, and its configuration to run."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from optuna.trial import FrozenTrial, TrialState

from isd_ray.config import merge, resolve, to_yaml
from isd_ray.errors import UserError
from isd_ray.sweep.check import Plan
from isd_ray.sweep.search import Search, trial_uri
from isd_ray.train.failure import read_failure
from isd_ray.train.folder import RunFolder
from isd_ray.train.validation import read_rows


@dataclass
class Trial:
    """One trial. runs: the goals after the last epoch [%] by seed; curves: (epoch, goals [%]) by seed."""

    number: int
    state: str  # finished, stopped, failed or running
    values: dict[str, Any]
    runs: dict[int, list[float]]
    curves: dict[int, list[tuple[int, list[float | None]]]]
    reason: str | None
    seconds: float | None
    folder: str

    @property
    def mean(self) -> np.ndarray:
        """Mean of each goal over the runs."""
        return np.mean(list(self.runs.values()), axis=0)

    @property
    def deviation(self) -> np.ndarray:
        """Standard deviation of a run of each goal (n - 1), NaN for one run."""
        if len(self.runs) < 2:
            return np.full(len(self.mean), np.nan)
        return np.std(list(self.runs.values()), axis=0, ddof=1)


@dataclass
class Outcome:
    """All trials; those compared at the end, over equally many seeds; the winner; the Pareto front (two goals)."""

    trials: list[Trial]
    compared: list[Trial]
    winner: Trial
    front: list[Trial]

    @property
    def default(self) -> Trial:
        """Trial 0."""
        return self.trials[0]


def collect(search: Search) -> Outcome:
    """Read everything and name the winner: of the trials with most runs, the one with the best mean of the first goal.

    The default takes part, so the winner is never below it on these runs. Raises UserError where no trial got to its
    end.
    """
    trials = [_trial(search, frozen) for frozen in search.trials() if frozen.state != TrialState.WAITING]
    finished = [t for t in trials if t.state == "finished" and t.runs]
    if not finished:
        reasons = sorted({t.reason or t.state for t in trials})
        raise UserError(f"{search.folder.uri}: no trial got to its end ({'; '.join(reasons)})")
    most = max(len(t.runs) for t in finished)
    compared = [t for t in finished if len(t.runs) == most]
    winner = min(compared, key=lambda t: (-t.mean[0], t.number))
    front = pareto(finished) if len(search.goals) == 2 else []
    return Outcome(trials, compared, winner, front)


def pareto(trials: list[Trial]) -> list[Trial]:
    """Return the trials that no other one beats in one goal without losing in the other, best first goal first."""
    front = [
        t for t in trials if not any((o.mean >= t.mean).all() and (o.mean > t.mean).any() for o in trials)
    ]
    return sorted(front, key=lambda t: -t.mean[0])


def write(plan: Plan, search: Search, outcome: Outcome) -> None:
    """Write trials.parquet, curves.parquet and best.yaml into the sweep's folder."""
    folder, goals = search.folder, plan.space.goals
    _write_table(folder, "trials.parquet", trial_rows(plan, outcome))
    curves = [
        {"trial": t.number, "seed": seed, "epoch": epoch} | dict(zip(goals, values, strict=True))
        for t in outcome.trials
        for seed, curve in t.curves.items()
        for epoch, values in curve
    ]
    _write_table(folder, "curves.parquet", curves)
    folder.write("best.yaml", best_yaml(plan, outcome).encode())


def trial_rows(plan: Plan, outcome: Outcome) -> list[dict[str, Any]]:
    """Return one flat row a trial: its state, goals and settings by dotted name (None: not varied in it)."""
    rows = []
    for t in outcome.trials:
        row: dict[str, Any] = {"trial": t.number, "state": t.state, "reason": t.reason, "seconds": t.seconds}
        row |= {"default": t.number == 0, "winner": t is outcome.winner, "pareto": t in outcome.front}
        row |= {"runs": len(t.runs), "epoch": max((c[-1][0] for c in t.curves.values() if c), default=0)}
        for i, goal in enumerate(plan.space.goals):
            row[goal] = float(t.mean[i]) if t.runs else None
            row[f"{goal} deviation"] = float(t.deviation[i]) if len(t.runs) > 1 else None
        rows.append(row | {d.name: t.values.get(d.name) for d in plan.dimensions} | {"folder": t.folder})
    return rows


def best_yaml(plan: Plan, outcome: Outcome) -> str:
    """Return the winner's options for a run of its own: on all training images, evaluated on the test set."""
    winner, default = outcome.winner, outcome.default
    base = {name: value for name, value in plan.base.items() if name != "train"}
    base["train"] = {k: v for k, v in plan.base["train"].items() if (k, v) != ("workers", 0)}
    config = resolve(merge(base, winner.values, {"train.epochs": plan.space.budget.epochs}))
    lines = [f"# Trial {winner.number}, {describe(winner, plan.space.goals)}"]
    if default.runs and default is not winner:
        lines.append(f"# Default: {describe(default, plan.space.goals)}")
    return "\n".join(lines) + "\n" + to_yaml(config)


def describe(trial: Trial, goals: list[str]) -> str:
    """Return the goals of a trial as text: mean and deviation over its seeds."""
    parts = []
    for goal, mean, deviation in zip(goals, trial.mean, trial.deviation, strict=True):
        spread = f" ± {deviation:.1f}" if len(trial.runs) > 1 else ""
        parts.append(f"{goal} {mean:.1f}{spread}")
    seeds = f"{len(trial.runs)} seed{'s' * (len(trial.runs) > 1)}"
    return f"{', '.join(parts)} % on validation images ({seeds})"


def _trial(search: Search, frozen: FrozenTrial) -> Trial:
    goals, attributes = search.goals, frozen.user_attrs
    seeds = range(search.space.budget.seeds + search.space.confirm.seeds)
    runs, curves = {}, {}
    failures = []
    for seed in seeds:
        folder = search.run_folder(frozen.number, seed)
        rows = read_rows(folder)
        if rows:
            curves[seed] = [(row["epoch"], [row.get(goal) for goal in goals]) for row in rows]
        if (reached := search.goals_of(frozen.number, seed)) is not None:
            runs[seed] = reached
        if (failure := read_failure(folder)) is not None:
            failures.append(f"seed {seed}: {failure}")
    reason = attributes.get("failed") or ("; ".join(failures) or None)
    state = "running" if frozen.state == TrialState.RUNNING else "finished"
    state = "stopped" if "stopped" in attributes else "failed" if "failed" in attributes else state
    seconds = frozen.duration.total_seconds() if frozen.duration else None
    return Trial(
        frozen.number, state, dict(attributes.get("values", {})), runs, curves, reason, seconds,
        trial_uri(search.folder.uri, frozen.number),
    )  # fmt: skip


def _write_table(folder: RunFolder, name: str, rows: list[dict[str, Any]]) -> None:
    """Write rows as Parquet; a column of lists or of mixed kinds (a choice) goes as text."""
    columns: dict[str, Any] = {}
    for key in rows[0] if rows else ():
        values = [row[key] for row in rows]
        kinds = {type(v) for v in values if v is not None}
        plain = kinds <= {int, float} or (
            len(kinds) == 1 and kinds < {int, float, bool, str} | kinds - {list, dict}
        )
        columns[key] = pa.array(values if plain else [None if v is None else str(v) for v in values])
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    folder.write(name, sink.getvalue())
