"""Pictures of a sweep: what was tried, what was stopped, and which options mattered."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import matplotlib
import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.tri import Triangulation
from optuna.importance import FanovaImportanceEvaluator, get_param_importances

from isd_ray.sweep.check import Plan
from isd_ray.sweep.results import Outcome, Trial
from isd_ray.sweep.space import Dimension

matplotlib.use("Agg")  # no window, also where there is a display
COLOURS = {"finished": "#1f6f8b", "stopped": "#b9b9b9", "failed": "#c0392b", "running": "#b9b9b9"}
DEFAULT, WINNER = "#222222", "#e08e0b"
CONTOUR = ("method.temperature_teacher", "method.temperature", "method.momentum", "queue.size")
FEWEST = 5  # trials below which importances say nothing


def last_value(trial: Trial, goal: int = 0) -> float | None:
    """Return the goal where the trial ended: the mean over its runs, or the last evaluation of one that was stopped."""
    if trial.runs:
        return float(trial.mean[goal])
    curve = next(iter(trial.curves.values()), [])
    return curve[-1][1][goal] if curve else None


def reached_by_all(plan: Plan) -> int:
    """Return the epoch before which no trial is stopped."""
    space = plan.space
    return space.budget.epochs if space.scheduler.name == "none" else space.scheduler.grace


def history(plan: Plan, outcome: Outcome) -> Figure:
    """Goal by trial, and the best of the finished ones so far."""
    figure, axes = _figure(plan.space.goals[0])
    best, so_far = -np.inf, []
    for i, trial in enumerate(outcome.trials):
        value = last_value(trial)
        if value is None:
            axes.axvline(i, color=COLOURS["failed"], linewidth=1, linestyle=":")
            continue
        _dot(axes, i, value, trial, outcome)
        if trial.runs:
            best = max(best, value)
            so_far.append((i, best))
    axes.step(*zip(*so_far, strict=True), where="post", color=COLOURS["finished"], linewidth=1)
    axes.set_xticks(range(len(outcome.trials)), [str(t.number) for t in outcome.trials], fontsize=7)
    axes.set_xlabel("trial (dotted: failed)")
    return figure


def curves(plan: Plan, outcome: Outcome) -> Figure:
    """Goal by epoch; a cross where a trial was stopped."""
    figure, axes = _figure(plan.space.goals[0])
    for trial in outcome.trials:
        for seed, curve in trial.curves.items():
            points = [(epoch, values[0]) for epoch, values in curve if values[0] is not None]
            if not points:
                continue
            colour, width = (
                _colour(trial, outcome),
                2.0 if trial in (outcome.winner, outcome.default) else 0.8,
            )
            axes.plot(
                *zip(*points, strict=True), color=colour, linewidth=width, alpha=1 if seed == 0 else 0.5
            )
            if trial.state == "stopped":
                axes.plot(*points[-1], marker="x", color="#777777", markersize=5)
    axes.set_xlabel("epoch")
    return figure


def slices(plan: Plan, outcome: Outcome) -> Figure:
    """Goal against every varied option."""
    dimensions = plan.dimensions
    columns = min(3, len(dimensions))
    rows = -(-len(dimensions) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained")
    for i, dimension in enumerate(dimensions):
        axes = figure.add_subplot(rows, columns, i + 1)
        for trial in _measured(outcome):
            if dimension.name in trial.values:
                x = _place(dimension, trial.values[dimension.name])
                _dot(axes, x, last_value(trial) or 0.0, trial, outcome)
        _label_axis(axes, dimension)
        axes.set_ylabel(f"{plan.space.goals[0]} [%]" if i % columns == 0 else "")
    return figure


def contour(plan: Plan, outcome: Outcome) -> Figure | None:
    """Goal over pairs of temperature, momentum and queue size, as far as they are varied; else None.

    The goal is that after the epoch which all trials reach: a stopped trial had fewer epochs to get anywhere.
    """
    varied = [d for name in CONTOUR for d in plan.dimensions if d.name == name]
    pairs = list(combinations(varied, 2))
    if not pairs:
        return None
    columns = min(3, len(pairs))
    figure = Figure(figsize=(3.4 * columns, 2.9 * -(-len(pairs) // columns)), layout="constrained")
    for i, (a, b) in enumerate(pairs):
        axes = figure.add_subplot(-(-len(pairs) // columns), columns, i + 1)
        trials = [t for t in outcome.trials if _at(t, reached_by_all(plan)) is not None]
        trials = [t for t in trials if a.name in t.values and b.name in t.values]
        x, y = ([_place(d, t.values[d.name]) for t in trials] for d in (a, b))
        value = [_at(t, reached_by_all(plan)) for t in trials]
        _surface(axes, np.array(x), np.array(y), np.array(value, dtype=float))
        for trial, u, v in zip(trials, x, y, strict=True):
            _dot(axes, u, v, trial, outcome)
        _label_axis(axes, a)
        _label_axis(axes, b, axes.set_yticks, axes.set_ylabel)
    return figure


def parallel(plan: Plan, outcome: Outcome) -> Figure:
    """Every trial as a line over all options, coloured by its goal."""
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    trials = sorted(_measured(outcome), key=lambda t: last_value(t) or 0.0)
    values = np.array([last_value(t) for t in trials], dtype=float)
    shade = matplotlib.colors.Normalize(values.min(), max(values.max(), values.min() + 1e-6))
    for trial, value in zip(trials, values, strict=True):
        own = [i for i, d in enumerate(plan.dimensions) if d.name in trial.values]
        heights = [_height(plan.dimensions[i], trial.values[plan.dimensions[i].name]) for i in own]
        places, heights = [*own, len(plan.dimensions)], [*heights, float(shade(value))]
        colour = WINNER if trial is outcome.winner else matplotlib.colormaps["viridis"](shade(value))
        axes.plot(places, heights, color=colour, linewidth=2.2 if trial is outcome.winner else 1, alpha=0.9)
    names = [*(d.name.split(".", 1)[1] for d in plan.dimensions), plan.space.goals[0]]
    ends = [*(_ends(d) for d in plan.dimensions), (f"{values.min():.1f} %", f"{values.max():.1f} %")]
    axes.set_xticks(range(len(names)), [f"{n}\n{low} … {high}" for n, (low, high) in zip(names, ends, strict=True)],
                    fontsize=7)  # fmt: skip
    axes.set_yticks([])
    for i in range(len(names)):
        axes.axvline(i, color="#cccccc", linewidth=0.8, zorder=0)
    return figure


def importance(plan: Plan, outcome: Outcome) -> tuple[Figure, str] | None:
    """Share of the variance of the goal that each option explains (fANOVA, Hutter et al. 2014), and on what it rests.

    After the first epoch at which trials are stopped, which all reach, and after the last. None: too few trials.
    """
    bars, notes = {}, []
    for epoch in dict.fromkeys((reached_by_all(plan), plan.space.budget.epochs)):
        points = [(t, v) for t in outcome.trials if (v := _at(t, epoch)) is not None]
        shares = importances(plan.dimensions, points)
        notes.append(f"epoch {epoch}: {len(points)} trials{'' if shares else ', too few or all alike'}")
        if shares:
            bars[epoch] = shares
    if not bars:
        return None
    names = list(next(iter(bars.values())))
    figure = Figure(figsize=(6.4, 0.5 + 0.42 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / len(bars)
    for i, (epoch, shares) in enumerate(bars.items()):
        y = np.arange(len(names)) + i * height
        axes.barh(y, [shares.get(n, 0.0) for n in names], height=height * 0.9, label=f"after epoch {epoch}",
                  color=("#1f6f8b", "#9fc5d1")[i])  # fmt: skip
    axes.set_yticks(np.arange(len(names)) + height * (len(bars) - 1) / 2, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("share of the variance")
    axes.legend(fontsize=7, frameon=False)
    return figure, "; ".join(notes)


def importances(dimensions: Sequence[Dimension], points: Sequence[tuple[Trial, float]]) -> dict[str, float]:
    """Return {option: share}, largest first, over options that all these trials vary; {} where there are too few."""
    common = [d for d in dimensions if points and all(d.name in t.values for t, _ in points)]
    if len(points) < FEWEST or not common or len({v for _, v in points}) < 2:
        return {}
    study = optuna.create_study(direction="maximize")
    for trial, value in points:
        study.add_trial(
            optuna.create_trial(
                params={d.name: d.encode(trial.values[d.name]) for d in common},
                distributions={d.name: d.distribution() for d in common},
                value=value,
            )
        )
    return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))


def front(plan: Plan, outcome: Outcome) -> Figure:
    """Both goals of every trial, and the Pareto front."""
    figure, axes = _figure(plan.space.goals[1])
    for trial in outcome.trials:
        if trial.runs:
            _dot(axes, float(trial.mean[0]), float(trial.mean[1]), trial, outcome)
    axes.plot(
        [t.mean[0] for t in outcome.front], [t.mean[1] for t in outcome.front], color=WINNER, linewidth=1
    )
    axes.set_xlabel(f"{plan.space.goals[0]} [%]")
    return figure


def _figure(label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_ylabel(f"{label} [%]")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _measured(outcome: Outcome) -> list[Trial]:
    return [t for t in outcome.trials if last_value(t) is not None]


def _at(trial: Trial, epoch: int) -> float | None:
    """The first goal of the first seed after an epoch."""
    return next((values[0] for e, values in trial.curves.get(0, []) if e == epoch), None)


def _colour(trial: Trial, outcome: Outcome) -> str:
    return (
        WINNER if trial is outcome.winner else DEFAULT if trial is outcome.default else COLOURS[trial.state]
    )


def _dot(axes: Axes, x: float, y: float, trial: Trial, outcome: Outcome) -> None:
    """Filled for a whole trial, hollow for one that was stopped."""
    colour = _colour(trial, outcome)
    face = colour if trial.state == "finished" else "white"
    special = trial in (outcome.winner, outcome.default)
    axes.plot(x, y, "o", color=colour, markerfacecolor=face, markersize=7 if special else 5, zorder=3)


def _place(dimension: Dimension, value: Any) -> float:
    """Where a value lies on its axis: logarithmic where it is drawn so, numbered for a choice."""
    if dimension.kind == "choice":
        return float(dimension.choices.index(value))
    if dimension.kind == "loguniform_below_one":
        return float(-np.log10(1 - value))
    return float(np.log10(value)) if dimension.kind in ("loguniform", "logint") else float(value)


def _height(dimension: Dimension, value: Any) -> float:
    """Place within the range, 0 to 1."""
    low, high = (_place(dimension, v) for v in (_bounds(dimension)))
    return (_place(dimension, value) - low) / ((high - low) or 1.0)


def _bounds(dimension: Dimension) -> tuple[Any, Any]:
    if dimension.kind == "choice":
        return dimension.choices[0], dimension.choices[-1]
    return dimension.low, dimension.high


def _ends(dimension: Dimension) -> tuple[str, str]:
    low, high = _bounds(dimension)
    return (str(low), str(high)) if dimension.kind == "choice" else (f"{low:g}", f"{high:g}")


def _label_axis(
    axes: Axes,
    dimension: Dimension,
    ticks: Callable[..., Any] | None = None,
    label: Callable[..., Any] | None = None,
) -> None:
    """Write values, not their logarithms, at an axis."""
    if dimension.kind == "choice":
        marks: list[Any] = list(dimension.choices)
    else:
        places = np.linspace(_place(dimension, dimension.low), _place(dimension, dimension.high), 4)
        back = {"loguniform_below_one": lambda p: 1 - 10.0**-p, "loguniform": lambda p: 10.0**p}
        back["logint"] = back["loguniform"]
        marks = [back.get(dimension.kind, float)(p) for p in places]
    texts = [m if isinstance(m, str) else f"{m:.4g}" if isinstance(m, int | float) else str(m) for m in marks]
    (ticks or axes.set_xticks)([_place(dimension, m) for m in marks], texts, fontsize=7)
    (label or axes.set_xlabel)(dimension.name, fontsize=8)


def _surface(axes: Axes, x: np.ndarray, y: np.ndarray, value: np.ndarray) -> None:
    """Linear interpolation between trials; nothing where they lie on a line."""
    unique = np.unique(np.stack([x, y], axis=1), axis=0, return_index=True)[1]
    if len(unique) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return
    # Triangles are drawn on scaled axes: else the axis of larger numbers alone would decide who is near whom.
    scaled = Triangulation((x[unique] - x.min()) / np.ptp(x), (y[unique] - y.min()) / np.ptp(y))
    mesh = Triangulation(x[unique], y[unique], scaled.triangles)
    axes.tricontourf(mesh, value[unique], levels=12, cmap="viridis", alpha=0.85)
