"""A search space as people write it: one YAML file that says what is varied, what is fixed, and what counts.

    config: {method.name: isd_plus}                    # any option of a run: fixed, or where the search starts
    space:                                             # varied; any option that changes what is learned
      method.temperature: {loguniform: [0.05, 0.5]}
      method.momentum: {loguniform_below_one: [0.9, 0.999]}     # 1 - x is loguniform
      queue.size: {int: [64, 512], step: 64}
      train.warmup_epochs: {uniform: [0, 4], when: {train.optimizer: lars}}
    constraints: [queue.size <= data.size / 4]
    goals: [student.knn20]                             # one, or two: their Pareto front

`isd_ray.sweep.check` says all that is wrong with one; docs/design.md (Sweeps) has the whole of it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pydantic import Field, ValidationError

from isd_ray.config import Config, merge, resolve
from isd_ray.definitions import file_or_name
from isd_ray.errors import UserError, harmless, listed, nearest, shown
from isd_ray.evaluate.names import ALONG
from isd_ray.sections import EPOCHS, IMAGES, PROCESSES, SEED, THREADS, Section
from isd_ray.values import LARGEST, faults_of
from isd_ray.yaml_files import read_mapping

RANGES = ("uniform", "loguniform", "loguniform_below_one", "int", "logint")
MOST_FAULTS = 20  # that are named at once
MOST_STEPS, TRIALS = 10**6, 100_000
KINDS = (*RANGES, "choice")

STATM = Path("/proc/self/statm")  # what a process takes of main memory; Linux has it


class Budget(Section):
    """How much is tried."""

    trials: int = Field(
        12,
        ge=1,
        le=TRIALS,
        description="Settings that are tried, the default among them",
    )
    epochs: int = Field(16, ge=1, le=EPOCHS, description="Epochs of a whole trial")
    seeds: int = Field(
        1, ge=1, le=1000, description="Runs of a trial that is not stopped, with seeds 0, 1, ..."
    )


class Validation(Section):
    """What trials are judged on: held-out training images, never the test set."""

    per_class: int = Field(
        50,
        ge=1,
        le=IMAGES,
        description="Images of a class that are held out, at most half of them",
    )
    every: int = Field(4, ge=1, le=EPOCHS, description="Epochs between two evaluations")


class Scheduler(Section):
    """Which trials are stopped early, judged by the first goal at evaluated epochs."""

    name: Literal["asha", "median", "none"] = "asha"
    grace: int = Field(4, ge=1, le=EPOCHS, description="No trial is stopped before this epoch")
    factor: int = Field(
        3,
        ge=2,
        le=TRIALS,
        description="asha: of so many trials that reach a rung one goes on",
    )
    startup: int = Field(
        4,
        ge=1,
        le=TRIALS,
        description="median: whole trials before the first is stopped",
    )


class Sampler(Section):
    """How settings are drawn."""

    name: Literal["tpe", "nsga2", "random"] = "tpe"
    seed: int = Field(0, ge=0, le=SEED, description="Seed of the draws")
    startup: int = Field(6, ge=1, le=TRIALS, description="tpe: trials drawn at random first")
    population: int = Field(12, ge=2, le=TRIALS, description="nsga2: trials of a generation")


class Resources(Section):
    """What a trial takes. With train.workers > 0 they are those of each worker."""

    cpus: int = Field(1, ge=1, le=THREADS, description="CPUs, and torch threads")
    gpus: float | None = Field(
        None,
        ge=0,
        le=THREADS,
        description="GPUs, also a fraction; none: 1 where the cluster has any",
    )
    memory: float | None = Field(
        None, gt=0, description="GiB past which a trial is ended (train.workers 0, Linux)"
    )
    concurrent: int | None = Field(
        None,
        ge=1,
        le=PROCESSES,
        description="Trials at once; none: as many as fit",
    )
    retries: int = Field(
        0,
        ge=0,
        le=TRIALS,
        description="New starts, from its checkpoint, of a trial whose process died",
    )


class Confirm(Section):
    """The best trials and the default run again with other seeds before a winner is named."""

    best: int = Field(3, ge=0, le=1000, description="Trials that run again, the default besides")
    seeds: int = Field(2, ge=0, le=1000, description="Further seeds of each")


@dataclass(frozen=True)
class Dimension:
    """One varied option. `when`: the values of other options with which it is varied at all."""

    name: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    choices: tuple[Any, ...] = ()
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def distribution(self) -> BaseDistribution:
        """Return what Optuna draws from; `decode` makes the option's value of a draw."""
        if self.kind == "choice":
            return CategoricalDistribution([_label(choice) for choice in self.choices])
        if self.kind in ("int", "logint"):
            return IntDistribution(
                int(self.low), int(self.high), log=self.kind == "logint", step=int(self.step or 1)
            )
        if self.kind == "loguniform_below_one":
            return FloatDistribution(1 - self.high, 1 - self.low, log=True)
        return FloatDistribution(self.low, self.high, log=self.kind == "loguniform", step=self.step)

    def suggest(self, trial: optuna.Trial) -> Any:
        """Draw a value of the option."""
        d = self.distribution()
        if isinstance(d, CategoricalDistribution):
            return self.decode(trial.suggest_categorical(self.name, d.choices))
        if isinstance(d, IntDistribution):
            return trial.suggest_int(self.name, d.low, d.high, step=d.step, log=d.log)
        assert isinstance(d, FloatDistribution)
        return self.decode(trial.suggest_float(self.name, d.low, d.high, step=d.step, log=d.log))

    def decode(self, drawn: Any) -> Any:
        """Return the option's value."""
        if self.kind == "choice":
            return next(choice for choice in self.choices if _label(choice) == drawn)
        return round(1 - drawn, 12) if self.kind == "loguniform_below_one" else drawn

    def encode(self, value: Any) -> Any:
        """Return the draw that `decode` makes `value` of."""
        if self.kind == "choice":
            return _label(value)
        return 1 - value if self.kind == "loguniform_below_one" else value

    def holds(self, value: Any) -> bool:
        """Tell whether the value can be drawn."""
        if self.kind == "choice":
            return value in self.choices
        if not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        steps = (value - self.low) / self.step if self.step else 0.0
        return abs(steps - round(steps)) < 1e-9

    def is_active(self, values: Mapping[str, Any]) -> bool:
        """Tell whether the option is varied beside these values of all others, by dotted name."""
        return all(values.get(name) in wanted for name, wanted in self.when.items())


class Space(Section):
    """One search; see the module's docstring."""

    description: str = ""
    config: dict[str, Any] = Field(
        {}, description="Options of every run; of a varied option, its value in trial 0"
    )
    space: dict[str, Any] = Field(description="Options that are varied")
    constraints: list[str] = Field([], description="Comparisons that every setting keeps")
    goals: list[str] = Field(
        ["student.knn20"], min_length=1, max_length=2, description="Percentages to raise"
    )
    start: list[dict[str, Any]] = Field([], description="Known settings that are tried after the default")
    validation: Validation = Validation()
    budget: Budget = Budget()
    scheduler: Scheduler = Scheduler()
    sampler: Sampler = Sampler()
    confirm: Confirm = Confirm()
    resources: Resources = Resources()

    def base(self, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the options of every run; `given` (the command line's) win over the file's."""
        return merge({"train.workers": 0}, self.config, given or {})

    @property
    def metrics(self) -> list[str]:
        """The protocols that the goals are numbers of."""
        return [goal.split(".")[1] for goal in self.goals]

    def run_options(self, values: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Return the options of the run of one trial with one seed, on top of `base`: a run to compare, not to keep."""
        return {
            **values,
            "train.epochs": self.budget.epochs,
            "train.seed": seed,
            "data.validation": self.validation.per_class,
            "evaluate.every": self.validation.every,
            "evaluate.along": list(dict.fromkeys([*ALONG, *self.metrics])),
            "evaluate.enabled": False,
        }

    def config_of(self, base: Mapping[str, Any], values: Mapping[str, Any], seed: int = 0) -> Config:
        """Return the resolved configuration of that run."""
        return resolve(base, self.run_options(values, seed))


def read_space(path: str | Path) -> Space:
    """Read the file; raises UserError that lists what is no part of a space. `check` knows the rest."""
    try:
        return Space(**read_mapping(file_or_name("tune_spaces", str(path)), "space"))
    except ValidationError as error:
        faults = listed(faults_of(Space, error), MOST_FAULTS)
        raise UserError(f"space {harmless(str(path), 200)}: {faults}") from None


def parse_dimension(name: str, text: Any) -> Dimension:
    """Read `{kind: [low, high], step: s, when: {option: value}}`; raises UserError for another form."""
    if not isinstance(text, Mapping):
        form = "{loguniform: [low, high]} or the like"
        raise UserError(f"{name}: expected {form}, found {shown(text)}")
    kinds = [key for key in text if key not in ("step", "when")]
    if len(kinds) != 1 or kinds[0] not in KINDS:
        wrong = next((kind for kind in kinds if kind not in KINDS), None)
        hint = nearest(str(wrong), KINDS) if wrong else ""
        found = shown(", ".join(map(str, kinds)))
        raise UserError(f"{name}: give one of {', '.join(KINDS)}, found {found}.{hint}")
    kind, value, step = str(kinds[0]), text[kinds[0]], text.get("step")
    when = text.get("when") or {}
    if not isinstance(when, Mapping):
        raise UserError(
            f"{name}: when: expected {{option: value}} or {{option: [values]}}, found {shown(when)}"
        )
    active = {str(k): tuple(v) if isinstance(v, list) else (v,) for k, v in when.items()}
    if not isinstance(value, list) or not value:
        raise UserError(f"{name}: {kind}: expected a list, found {shown(value)}")
    if kind == "choice":
        if odd := [v for v in value if not _is_plain(v)]:
            raise UserError(
                f"{name}: choice: expected numbers, texts or lists of them, found {shown(odd[0])}"
            )
        if step is not None or len({_label(v) for v in value}) < len(value):
            found = shown(value)
            raise UserError(f"{name}: choice: expected different values and no step, found {found}")
        return Dimension(name, kind, choices=tuple(value), when=active)
    _check_range(name, kind, value, step)
    return Dimension(name, kind, value[0], value[1], step, when=active)


def _check_range(name: str, kind: str, value: list[Any], step: Any) -> None:
    number = int if kind in ("int", "logint") else int | float
    given = [*value, *([] if step is None else [step])]
    if len(value) != 2 or any(not isinstance(x, number) or isinstance(x, bool) for x in given):
        words = "whole numbers" if number is int else "numbers"
        raise UserError(f"{name}: {kind}: expected two {words}, found {shown(given)}")
    if any(abs(x) > LARGEST or x != x for x in given):
        raise UserError(f"{name}: {kind}: expected numbers up to {LARGEST:g}, found {shown(given)}")
    low, high = value
    if not low < high:
        raise UserError(f"{name}: {kind}: {low} is not below {high}")
    if kind in ("loguniform", "logint") and low <= 0:
        raise UserError(f"{name}: {kind}: the lower bound {low} must be above 0")
    if kind == "loguniform_below_one" and high >= 1:
        raise UserError(f"{name}: {kind}: the upper bound {high} must be below 1")
    if step is not None and (kind not in ("uniform", "int") or step <= 0):
        raise UserError(f"{name}: {kind}: step {step}: uniform and int take a step above 0")
    if step is not None and (high - low) / step > MOST_STEPS:
        raise UserError(
            f"{name}: {kind}: step {step} makes more than {MOST_STEPS:,} values; use a larger one"
        )
    if step is not None and abs((high - low) / step - round((high - low) / step)) > 1e-9:
        raise UserError(f"{name}: {kind}: {low} to {high} is no whole number of steps of {step}")


def _is_plain(value: Any) -> bool:
    """Tell whether a value is what JSON can hold: YAML also knows dates and the like."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, str | int | float | bool | None) and value == value


def _label(choice: Any) -> Any:
    """Optuna keeps plain values; a list of views goes as its JSON."""
    return choice if isinstance(choice, str | int | float | bool | None) else json.dumps(choice)
