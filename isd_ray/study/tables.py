"""The tables of a study's report."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from isd_ray.evaluate.names import parse
from isd_ray.study.blocks import BEST, Table
from isd_ray.study.results import ALL, CLASS_MEAN, STD, Outcome, Run
from isd_ray.study.spec import Setting
from isd_ray.study.statistics import Paired, holm, paired

NOTHING = "-"
FLOORS = {"untrained": "untrained backbone", "pixels": "raw pixels"}


def metric_title(metric: str) -> str:
    """Return `student.knn20` as words."""
    network, name = metric.split(".")
    return f"{' '.join(parse(name).title.split())} of the {network}"


def group_title(group: str) -> str:
    """Return the name of a group as the papers write it."""
    return {ALL: "All", CLASS_MEAN: "Class mean", STD: "Std"}.get(group, group.capitalize())


def compared_groups(outcome: Outcome, setting: Setting) -> list[str]:
    """Return all images, then the groups, largest classes first."""
    return [ALL, *outcome.groups(setting)]


def means(outcome: Outcome, setting: Setting, metric: str) -> Table:
    """Mean and deviation over seeds and splits of every method, with the floors that any method has to beat."""
    groups = [ALL, *([CLASS_MEAN] if _is_unbalanced_test(outcome, setting, metric) else [])]
    groups += [*outcome.groups(setting), STD]
    scores = {name: outcome.of(setting, name) for name in outcome.methods}
    best = {g: _best(scores, metric, g) for g in groups}
    rows = []
    for name, runs in scores.items():
        cells = [_spread(runs, metric, g) for g in groups]
        rows.append(
            [
                name,
                *(BEST * (best[g] == name) + c for g, c in zip(groups, cells, strict=True)),
                str(len(runs)),
            ]
        )
    kind = metric.split(".")[1]
    for floor, words in FLOORS.items():
        found = {
            (run.cell.subset, run.cell.seed): run
            for run in outcome.of(setting)
            if run.scores(f"{floor}.{kind}")
        }
        runs = list(found.values())  # it is the same number whichever method's run measured it
        cells = [_spread(runs, f"{floor}.{kind}", g) for g in groups]
        if any(cell != NOTHING for cell in cells):
            rows.append([words, *cells, str(len(runs))])
    header = ["", *(group_title(g) for g in groups), "runs"]
    note = (
        "Mean ± standard deviation over runs (n - 1), in %. Bold: the highest mean (of Std the lowest). A group is the "
        "mean over its classes; Std is the population deviation of the groups of a run, low is balanced."
    )
    return Table(
        f"{metric_title(metric)}: mean ± deviation", header, rows, note, rules=frozenset({len(scores)})
    )


def by_split(outcome: Outcome, setting: Setting, metric: str) -> Table:
    """The form of table 5 of the ISD paper: methods by splits, with a row of differences, for all groups together."""
    unit = outcome.units(setting)
    keys = list(dict.fromkeys(s if unit == "split" else seed for s, seed in outcome.columns(setting)))
    rows: list[list[str]] = []
    rules = set()
    base = outcome.plan.study.baseline
    for group in compared_groups(outcome, setting):
        rules.add(len(rows))
        values = {m: outcome.by_unit(setting, m, metric, group) for m in outcome.methods}
        for method, found in values.items():
            rows.append(
                [group_title(group), method, *(_number(found.get(k)) for k in keys), _mean_of(found.values())]
            )
        for method, found in values.items():
            if method == base:
                continue
            both = {k: found[k] - values[base][k] for k in keys if k in found and k in values[base]}
            cells = [_signed(both.get(k)) for k in keys]
            rows.append([group_title(group), f"Diff {method} - {base}", *cells, _signed_mean(both.values())])
    header = ["classes", "method", *(f"{unit} {k}" if isinstance(k, int) else k for k in keys), "mean"]
    several = len({seed for _, seed in outcome.columns(setting)}) > 1
    note = "In %." + (" Each entry is the mean over seeds." if unit == "split" and several else "")
    return Table(f"{metric_title(metric)} by {unit}", header, rows, note, texts=2, rules=frozenset(rules))


def tests(outcome: Outcome, setting: Setting, metric: str) -> Table:
    """Paired tests of every method against the baseline, by group, with what the number of pairs allows."""
    found = list(tested(outcome, setting, metric))
    adjusted = holm([test.p_t for _, _, test in found])
    rows: list[list[str]] = []
    rules, before = set(), ""
    for (group, method, test), p in zip(found, adjusted, strict=True):
        if group != before:
            rules.add(len(rows))
            before = group
        numbers = [_signed(test.mean, 2), _interval(test), _number(test.deviation, 2), _number(test.t, 2)]
        ps = [_p(test.p_t), _p(p), _p(test.p_sign), _p(test.least)]
        rows.append([group_title(group), method, str(test.n), *numbers, *ps])
    header = [
        "classes", f"method against {outcome.plan.study.baseline}", "n", "mean", "95 % interval", "deviation", "t",
        "p, t-test", "p, Holm", "p, sign-flip", "least p, sign-flip",
    ]  # fmt: skip
    return Table(f"{metric_title(metric)}: paired tests", header, rows, tests_note(outcome, setting), texts=2,
                 rules=frozenset(rules))  # fmt: skip


def tested(outcome: Outcome, setting: Setting, metric: str) -> Iterator[tuple[str, str, Paired]]:
    """Yield group, method and the test of its differences from the baseline, where both were measured."""
    for group in compared_groups(outcome, setting):
        for method in outcome.methods[1:]:
            differences = outcome.differences(setting, method, metric, group)
            if differences:
                yield group, method, paired(differences)


def tests_note(outcome: Outcome, setting: Setting) -> str:
    """Say what a pair is and what p means."""
    unit = outcome.units(setting)
    pair = (
        "A pair is a split (its seeds are averaged: they are not independent)."
        if unit == "split"
        else "A pair is a seed."
    )
    return (
        f"{pair} Percentage points. Two-sided: Student's t takes the differences for normal; the exact sign-flip test "
        "does not, but with n pairs its p cannot be below 2/2^n, the last column. Holm: p of the t-test adjusted for "
        "all rows here."
    )


def control(outcome: Outcome, setting: Setting, metric: str) -> Table | None:
    """What the imbalance costs each method, and whether it costs less than it costs the baseline."""
    if not has_control(outcome, setting):
        return None
    rows = []
    base = outcome.plan.study.baseline
    for method in outcome.methods:
        for group in compared_groups(outcome, setting):
            costs = imbalance_costs(outcome, setting, method, metric, group)
            if not costs:
                continue
            saved = savings(outcome, setting, method, metric, group) if method != base else []
            less = paired(saved) if saved else Paired(0, 0.0)
            own = paired(list(outcome.averaged(setting, costs).values()))
            values = [outcome.by_run(s, method, metric, group) for s in (setting, balanced(setting))]
            rows.append([method, group_title(group), *(_mean_of(v[k] for k in costs) for v in values),
                         _signed(own.mean, 2), _interval(own), _signed(less.mean if saved else None, 2),
                         _interval(less), _p(less.p_t), str(own.n)])  # fmt: skip
    header = ["method", "classes", "unbalanced", "balanced", "cost", "95 % interval", f"less than {base}'s",
              "95 % interval", "p, t-test", "n"]  # fmt: skip
    note = (
        "In %. Equally many images in both sets; groups are of the unbalanced one. Cost: balanced less unbalanced; "
        f"less than {base}'s: {base}'s cost less the method's, by pairs; above 0, imbalance harms the method less."
    )
    every = len(compared_groups(outcome, setting))
    return Table(f"{metric_title(metric)}: what the imbalance costs", header, rows, note, texts=2,
                 rules=frozenset(range(0, len(rows), every)))  # fmt: skip


def balanced(setting: Setting) -> Setting:
    """Return the balanced control of a setting."""
    return Setting(setting.data, setting.imbalance, control=True)


def has_control(outcome: Outcome, setting: Setting) -> bool:
    """Whether the setting is unbalanced and the study has its balanced control."""
    return not setting.control and balanced(setting) in outcome.plan.settings


def imbalance_costs(
    outcome: Outcome, setting: Setting, method: str, metric: str, group: str
) -> dict[tuple[Any, int], float]:
    """Return balanced less unbalanced accuracy, in points, of every (split, seed) that both have."""
    here, there = (outcome.by_run(s, method, metric, group) for s in (setting, balanced(setting)))
    return {key: there[key] - here[key] for key in here if key in there}


def savings(outcome: Outcome, setting: Setting, method: str, metric: str, group: str) -> list[float]:
    """Return the imbalance's cost to the baseline less its cost to the method, in points, by split or seed."""
    own, base = (
        imbalance_costs(outcome, setting, m, metric, group) for m in (method, outcome.plan.study.baseline)
    )
    both = {key: base[key] - own[key] for key in own if key in base}
    return list(outcome.averaged(setting, both).values())


def _is_unbalanced_test(outcome: Outcome, setting: Setting, metric: str) -> bool:
    scores = [run.scores(metric) for run in outcome.of(setting)]
    return any(abs(s[ALL] - s[CLASS_MEAN]) > 1e-6 for s in scores if ALL in s and CLASS_MEAN in s)


def _values(runs: Sequence[Run], metric: str, group: str) -> list[float]:
    return [score[group] for run in runs if group in (score := run.scores(metric))]


def _spread(runs: Sequence[Run], metric: str, group: str) -> str:
    values = _values(runs, metric, group)
    if not values:
        return NOTHING
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def _best(scores: dict[str, list[Run]], metric: str, group: str) -> str | None:
    means = {m: float(np.mean(v)) for m, runs in scores.items() if (v := _values(runs, metric, group))}
    if len(means) < 2:
        return None
    return min(means, key=lambda m: means[m] if group == STD else -means[m])


def _number(value: float | None, digits: int = 1) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"


def _signed(value: float | None, digits: int = 1) -> str:
    return NOTHING if value is None else f"{value:+.{digits}f}"


def _mean_of(values: Any) -> str:
    known = list(values)
    return f"{np.mean(known):.2f}" if known else NOTHING


def _signed_mean(values: Any) -> str:
    known = list(values)
    return f"{np.mean(known):+.2f}" if known else NOTHING


def _interval(test: Paired) -> str:
    return NOTHING if test.low is None else f"{test.low:+.2f} … {test.high:+.2f}"


def _p(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4f}" if value >= 0.0001 else "< 0.0001"
