"""All that is wrong with a search space, said at once and before anything starts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from isd_ray.config import Config, flatten, merge, option_names, resolve, validate
from isd_ray.errors import UserError, listed, nearest, shown
from isd_ray.evaluate.names import CHEAP, examples, parse
from isd_ray.room import share_fault
from isd_ray.sweep.constraints import Constraint, parse_constraint
from isd_ray.sweep.space import (
    MOST_FAULTS,
    STATM,
    Budget,
    Dimension,
    Space,
    parse_dimension,
)
from isd_ray.train.learnable import check_learnable
from isd_ray.train.trainer import FREE, FREE_SECTIONS
from isd_ray.values import faults_of

IMAGES = "data.size"  # in constraints: images of the pretraining set, those held out not counted
OWN = {  # options that the sweep itself sets, and where the file says it
    "train.epochs": "budget.epochs", "train.seed": "budget.seeds", "data.validation": "validation.per_class",
    "evaluate.every": "validation.every", "evaluate.along": "goals", "evaluate.enabled": "validation",
    "train.threads": "resources.cpus",
    "train.gpus_per_worker": "resources.gpus", "name": "--name", "output": "--output",
}  # fmt: skip
NETWORKS = ("student", "teacher")
GROUPS = ("many", "medium", "few", "large", "small", "class_mean")


@dataclass(frozen=True)
class Plan:
    """A space that was found good: `base` are the options of every run, `default` the values of trial 0."""

    space: Space
    base: dict[str, Any]
    dimensions: tuple[Dimension, ...]
    constraints: tuple[Constraint, ...]
    default: dict[str, Any]

    def active(self, values: Mapping[str, Any]) -> list[Dimension]:
        """Return the dimensions that are varied in a trial with these values."""
        everything = flatten(self.base) | dict(values)
        return [d for d in self.dimensions if d.is_active(everything)]

    def broken(self, values: Mapping[str, Any], images: int | None) -> str | None:
        """Return the first constraint that a setting breaks; those about `data.size` hold where it is None."""
        if not self.constraints:
            return None
        known = flatten(self.space.config_of(self.base, values).model_dump()) | {IMAGES: images}
        return next((c.text for c in self.constraints if not c.holds(known)), None)


def check(space: Space, given: Mapping[str, Any] | None = None) -> Plan:
    """Return the plan of a space; `given` are options from the command line, which win over the file's.

    Raises UserError that lists every fault.
    """
    faults: list[str] = []
    names = option_names()
    base = _checked_base(space, given, names, faults)
    dimensions = [d for name, text in space.space.items() if (d := _dimension(name, text, names, faults))]
    dimensions = _ordered(dimensions, names, faults)
    if not space.space:
        faults.append("space: nothing is varied; name at least one option")
    constraints = [c for text in space.constraints if (c := _constraint(text, names, faults))]
    faults += [
        *_goal_faults(space),
        *_budget_faults(space),
        *([fault] if (fault := share_fault(space.resources.gpus)) else []),
        *_memory_faults(space, base),
    ]
    if not faults:
        faults += _config_faults(space, base, dimensions)
    if faults:
        raise UserError(listed(faults, MOST_FAULTS))
    plan = Plan(space, base, tuple(dimensions), tuple(constraints), _default(space, base, dimensions))
    faults += _setting_faults(plan, plan.default, "the default")
    for number, values in enumerate(space.start, 1):
        faults += _setting_faults(plan, values, f"start, setting {number}")
    if faults:
        raise UserError(listed(faults, MOST_FAULTS))
    return plan


def _checked_base(
    space: Space, given: Mapping[str, Any] | None, names: list[str], faults: list[str]
) -> dict[str, Any]:
    for name in (*flatten(merge(space.config)), *flatten(merge(given or {}))):
        if name not in names:
            faults.append(f"config: unknown option {shown(name)}.{nearest(name, names)}")
        elif name in OWN:
            faults.append(f"config: {name}: the sweep sets it; use {OWN[name]}")
    return space.base(given)


def _dimension(name: str, text: Any, names: list[str], faults: list[str]) -> Dimension | None:
    """Read one dimension and hold its bounds against the option's own range."""
    if name not in names:
        faults.append(f"space: unknown option {shown(name)}.{nearest(name, names)}")
        return None
    if name in OWN:
        faults.append(f"space: {name}: the sweep sets it; use {OWN[name]}")
        return None
    if name in FREE or name.startswith(FREE_SECTIONS):
        faults.append(f"space: {name} does not change what is learned; set it under config")
        return None
    try:
        dimension = parse_dimension(name, text)
    except UserError as error:
        faults.append(f"space: {error}")
        return None
    wrong = [fault for value in _probes(dimension) if (fault := _field_fault(name, value))]
    faults += [f"space: {fault}" for fault in dict.fromkeys(wrong)]
    return None if wrong else dimension


def _probes(dimension: Dimension) -> Iterator[Any]:
    """Yield values that together show whether all can be drawn: every choice, or both bounds and one between."""
    if dimension.kind == "choice":
        yield from dimension.choices
        return
    yield from (dimension.low, dimension.high)
    if dimension.kind in ("int", "logint"):
        return
    yield dimension.low + (dimension.step or 0.618 * (dimension.high - dimension.low))


def _field_fault(name: str, value: Any) -> str | None:
    try:
        validate(merge({name: value}))
    except UserError as error:
        return str(error).removeprefix("--")
    return None


def _ordered(dimensions: list[Dimension], names: list[str], faults: list[str]) -> list[Dimension]:
    """Return the dimensions so that those which `when` names come before those that ask for them."""
    varied = {d.name: d for d in dimensions}
    for d in dimensions:
        for name, wanted in d.when.items():
            if name not in names:
                hint = nearest(name, names)
                faults.append(f"space: {d.name}: when: unknown option {shown(name)}.{hint}")
            elif name in varied:
                never = [v for v in wanted if not varied[name].holds(v)]
                faults += [f"space: {d.name}: when: {name} is never {shown(v)}" for v in never]
    ordered: list[Dimension] = []
    waiting = list(dimensions)
    while waiting:
        open_ = {d.name for d in waiting}
        ready = [d for d in waiting if not open_ & set(d.when)]
        if not ready:
            faults.append(f"space: when: {' and '.join(sorted(open_))} wait for each other")
            return ordered
        ordered += ready
        waiting = [d for d in waiting if d not in ready]
    return ordered


def _constraint(text: str, names: list[str], faults: list[str]) -> Constraint | None:
    try:
        constraint = parse_constraint(text)
    except UserError as error:
        faults.append(str(error))
        return None
    known = [*names, IMAGES]
    wrong = [name for name in constraint.names if name not in known]
    place = f"constraint {shown(text)}"
    faults += [f"{place}: unknown option {shown(name)}.{nearest(name, known)}" for name in wrong]
    return None if wrong else constraint


def _goal_faults(space: Space) -> Iterator[str]:
    known = [f"{network}.{metric}" for network in NETWORKS for metric in examples(cheap=True)]
    for goal in space.goals:
        if not _is_goal(goal):
            hint = nearest(goal, known)
            yield (
                f"goals: unknown goal {shown(goal)}.{hint} It is network.metric, the metric of {CHEAP}; "
                "of one that answers for each image also network.metric.group"
            )
    if len(set(space.goals)) < len(space.goals):
        yield f"goals: {shown(space.goals[0])} stands there twice"
    if len(space.goals) == 2 and space.scheduler.name != "none":
        yield f"scheduler: {space.scheduler.name} judges by one goal; with two, set scheduler.name: none"
    if len(space.goals) == 1 and space.sampler.name == "nsga2":
        yield "sampler: nsga2 is for two goals; with one, use tpe"


def _is_goal(goal: str) -> bool:
    network, metric, group = [*goal.split(".", 2), "", ""][:3]
    try:
        protocol = parse(metric).protocol
    except UserError:
        return False
    grouped = not group or (group in GROUPS and protocol.by_class)
    return network in NETWORKS and protocol.cheap and grouped


def _budget_faults(space: Space) -> Iterator[str]:
    epochs, every, scheduler = space.budget.epochs, space.validation.every, space.scheduler
    try:
        Budget(**space.budget.model_dump())  # --trials has been set since the file was read
    except ValidationError as error:
        yield from (f"budget.{fault}" for fault in faults_of(Budget, error))
    if every > epochs:
        yield f"validation.every {every}: a trial has {epochs} epochs"
    if scheduler.name == "none":
        return
    if scheduler.grace >= epochs:
        yield f"scheduler.grace {scheduler.grace}: a trial has {epochs} epochs; set an earlier one or name: none"
    if scheduler.grace % every:
        yield f"scheduler.grace {scheduler.grace}: no evaluated epoch; use a multiple of validation.every ({every})"


def _memory_faults(space: Space, base: dict[str, Any]) -> Iterator[str]:
    """A limit that nobody would watch is refused."""
    if space.resources.memory is None:
        return
    if not STATM.exists():
        yield f"resources.memory: there is no {STATM} here to read it from (Linux has it); leave it out"
    if flatten(base).get("train.workers", 0):
        yield "resources.memory: workers are processes of their own; set train.workers to 0 or leave it out"


def _config_faults(space: Space, base: dict[str, Any], dimensions: list[Dimension]) -> list[str]:
    """Resolve the corners of the space: what a method does not have, or cannot learn from, is named."""
    faults = []
    try:
        config = space.config_of(base, {})
        check_learnable(config)
    except UserError as error:
        return [f"config: {error}"]
    methods = next((d.choices for d in dimensions if d.name == "method.name"), (config.method.name,))
    for method in methods:
        fixed = merge(base, {"method.name": method})
        for d in dimensions:
            if d.name == "method.name" or method not in d.when.get("method.name", (method,)):
                continue
            for value in d.choices or [d.low]:
                try:
                    check_learnable(resolve(fixed, {d.name: value}))
                except UserError as error:
                    faults.append(f"space: {error}")
    return list(dict.fromkeys(faults))


def _default(space: Space, base: dict[str, Any], dimensions: list[Dimension]) -> dict[str, Any]:
    """Return trial 0: the values that the varied options have under `config`, or when nobody sets them."""
    config = flatten(space.config_of(base, {}).model_dump())
    values: dict[str, Any] = {}
    for d in dimensions:
        if d.is_active(config | values):
            values[d.name] = config[d.name]
    return values


def _setting_faults(plan: Plan, values: Mapping[str, Any], title: str) -> Iterator[str]:
    """Say why a known setting is no point of the space."""
    by_name = {d.name: d for d in plan.dimensions}
    active = [d.name for d in plan.active({**plan.default, **values})]
    for name, value in values.items():
        if name not in by_name:
            yield f"{title}: {shown(name)} is not varied.{nearest(name, by_name)}"
        elif not by_name[name].holds(value):
            remedy = "widen it, so that every trial can be compared"
            yield f"{title}: {name} {shown(value)} lies outside of its range; {remedy}"
    missing = [name for name in active if name not in values]
    if missing:
        yield f"{title}: {', '.join(missing)} has no value"
    elif text := _breaks(plan, values):
        yield f"{title}: {text}"


def _breaks(plan: Plan, values: Mapping[str, Any]) -> str | None:
    try:
        text = plan.broken(values, None)
    except UserError as error:
        return str(error)
    return f"it breaks the constraint {shown(text)}" if text else None


def resolved(plan: Plan, values: Mapping[str, Any]) -> Config:
    """Return the configuration of a run with these values."""
    return plan.space.config_of(plan.base, values)
