"""What the numbers of a study say in plain words: where a method wins, where it loses, and what cannot be said."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from isd_ray.study.results import ALL, Outcome
from isd_ray.study.spec import Setting
from isd_ray.study.statistics import LEVEL, Paired, holm, paired
from isd_ray.study.tables import (
    FLOORS,
    compared_groups,
    group_title,
    has_control,
    metric_title,
    savings,
    tested,
)

FEWEST = 3  # pairs below which nobody should speak of winning: two differences are alike by chance too often


@dataclass(frozen=True)
class Judged:
    """One comparison with the baseline: p is that of the t-test, adjusted (Holm) for the table it stands in."""

    group: str
    method: str
    test: Paired
    p: float | None

    @property
    def says(self) -> int:
        """Return 1 for a gain, -1 for a loss, 0 where chance may explain it or there are fewer than three pairs."""
        if self.p is None or self.p >= LEVEL or self.test.n < FEWEST:
            return 0
        return 1 if self.test.mean > 0 else -1


def judge(outcome: Outcome, setting: Setting, metric: str) -> list[Judged]:
    """Return the comparisons of a setting."""
    found = list(tested(outcome, setting, metric))
    adjusted = holm([test.p_t for _, _, test in found])
    return [Judged(group, method, test, p) for (group, method, test), p in zip(found, adjusted, strict=True)]


def subjects(outcome: Outcome) -> list[str]:
    """Return the methods that the verdict is about: ISD's, or all but the baseline where it compares none of them."""
    methods, study = outcome.methods[1:], outcome.plan.study
    kind = {m: str(next((r.config["method.name"] for r in outcome.runs if r.cell.method == m
                         and r.folder.exists("config.yaml")), m)) for m in study.methods}  # fmt: skip
    return [m for m in methods if kind[m].startswith("isd")] or methods


def verdict(outcome: Outcome) -> Iterator[str]:
    """Yield one sentence or two a setting and method, then the ranks."""
    metric, base = outcome.plan.study.metrics[0], outcome.plan.study.baseline
    for setting in outcome.plan.settings:
        judged = judge(outcome, setting, metric)
        for method in subjects(outcome):
            own = [j for j in judged if j.method == method]
            if not own:
                yield f"{setting.name}: {method} and {base} have no finished pair; nothing can be said."
                continue
            n, unit = own[0].test.n, outcome.units(setting)
            title = (
                f"{setting.name}, {metric_title(metric)}, {method} against {base} ({n} {unit}{'s' * (n > 1)})"
            )
            yield f"{title}: {_sides(own)}{_trade(own)}"
        if ranks := _ranks(outcome, setting, metric):
            yield f"{setting.name}: {ranks}"
        yield from _costs(outcome, setting, metric)


def _costs(outcome: Outcome, setting: Setting, metric: str) -> Iterator[str]:
    """Say whether imbalance harms a method less than the baseline: the question behind the balanced control."""
    if not has_control(outcome, setting):
        return
    base = outcome.plan.study.baseline
    found = {m: paired(s) for m in outcome.methods if m != base
             and (s := savings(outcome, setting, m, metric, ALL))}  # fmt: skip
    adjusted = holm([test.p_t for test in found.values()])
    for (method, test), p in zip(found.items(), adjusted, strict=True):
        if method not in subjects(outcome):
            continue
        says = Judged(ALL, method, test, p).says
        words = {1: f"harms {method} less than {base}", -1: f"harms {method} more than {base}",
                 0: f"harms {method} and {base} alike, as far as can be told"}[says]  # fmt: skip
        less = _one(Judged(ALL, method, test, p))
        yield f"{setting.name}: imbalance {words}; its cost to {base} less that to {method}: {less}."


def _sides(judged: list[Judged]) -> str:
    parts = []
    for says, words in ((1, "wins on"), (-1, "loses on"), (0, "cannot be told apart on")):
        found = [_one(j) for j in judged if j.says == says]
        if found:
            parts.append(f"{words} {', '.join(found)}")
    return "; ".join(parts) + "."


def _one(j: Judged) -> str:
    interval = "" if j.test.low is None else f" [{j.test.low:+.1f}, {j.test.high:+.1f}]"
    p = "" if j.p is None else f", p {j.p:.3f}"
    return f"{group_title(j.group)} ({j.test.mean:+.1f}{interval}{p})"


def _trade(judged: list[Judged]) -> str:
    """Name a gain on some classes that others pay for: one number for all classes would hide it."""
    by_says = {s: [group_title(j.group) for j in judged if j.says == s and j.group != ALL] for s in (1, -1)}
    if by_says[1] and by_says[-1]:
        return f" What {', '.join(by_says[1])} gain, {', '.join(by_says[-1])} pay for."
    return ""


def _ranks(outcome: Outcome, setting: Setting, metric: str) -> str:
    parts = []
    for group in compared_groups(outcome, setting):
        means = {}
        for method in outcome.methods:
            values = outcome.by_unit(setting, method, metric, group).values()
            if values:
                means[method] = float(np.mean(list(values)))
        if len(means) < 2:
            continue
        order = sorted(means, key=lambda m: -means[m])
        others = [m for m in subjects(outcome) if m in order and m != order[0]]
        own = ", ".join(f"{m} is number {order.index(m) + 1}" for m in others)
        parts.append(f"{group_title(group)}: {order[0]} {means[order[0]]:.1f}{f' ({own})' if own else ''}")
    return f"highest means of {len(outcome.methods)} methods: {'; '.join(parts)}." if parts else ""


def limits(outcome: Outcome) -> Iterator[str]:
    """Yield what the study cannot say, and why."""
    study = outcome.plan.study
    missing = len(outcome.runs) - len(outcome.finished)
    if missing:
        yield f"{missing} of {len(outcome.runs)} cells have no result; what they would change is unknown."
    yield from _of_pairs(outcome)
    below = sorted(_below_floor(outcome))
    if below:
        yield (
            f"Not above the untrained backbone or raw pixels on average: {'; '.join(below)}. There a comparison says "
            "how methods fail, not what they learn."
        )
    epochs = sorted({run.config["train.epochs"] for run in outcome.finished})
    if epochs:
        span = f"{epochs[0]}" if len(epochs) == 1 else f"{epochs[0]} to {epochs[-1]}"
        yield (
            f"Epochs of a run: {span}. Methods learn at different speeds (ISD's authors show it behind MoCo early and "
            "ahead late), so more epochs may change the order."
        )
    yield (
        "The options stand in the tables below; the study itself did not search any. With other temperatures, momenta "
        "or learning rates the order may differ, most for the methods that were tuned least."
    )
    if len(study.data) == 1:
        yield f"One data set ({next(iter(study.data))}): nothing is said about others."
    yield "p values are adjusted within a table, not over all tables of the report."


def _of_pairs(outcome: Outcome) -> Iterator[str]:
    """What n allows."""
    seen = set()
    for setting in outcome.plan.settings:
        unit = outcome.units(setting)
        n = len(dict.fromkeys(s if unit == "split" else seed for s, seed in outcome.columns(setting)))
        if (unit, n) in seen:
            continue
        seen.add((unit, n))
        if n < FEWEST:
            yield f"{n} pair{'s' * (n > 1)} of a {unit} each: too few to call anything a gain or a loss; give more."
            continue
        least = Paired(n, 0.0).least
        if least > LEVEL:
            yield (
                f"With {n} {unit}s the exact sign-flip test cannot give less than p = {least:g}: where a gain or loss "
                "is named it rests on the t-test, which takes the differences for normal. Six pairs are the fewest "
                "with which the sign-flip test can go below 0.05."
            )
        if unit == "seed" and outcome.plan.study.imbalances[setting.imbalance].splits != "seeds":
            yield (
                "Seeds vary weights, order and views on one and the same choice of images: the tests say nothing about "
                "other choices (imbalances: splits)."
            )


def _below_floor(outcome: Outcome) -> Iterator[str]:
    metric = outcome.plan.study.metrics[0]
    kind = metric.split(".")[1]
    for setting in outcome.plan.settings:
        floor = _highest_floor(outcome, setting, kind)
        for method in outcome.methods:
            values = [s[ALL] for run in outcome.of(setting, method) if ALL in (s := run.scores(metric))]
            if values and np.mean(values) <= floor:
                yield f"{method} on {setting.name}"


def _highest_floor(outcome: Outcome, setting: Setting, kind: str) -> float:
    highest = -np.inf
    for floor in FLOORS:
        values = [s[ALL] for run in outcome.of(setting) if ALL in (s := run.scores(f"{floor}.{kind}"))]
        highest = max(highest, float(np.mean(values))) if values else highest
    return highest
