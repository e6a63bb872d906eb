"""Pictures of a study's numbers: accuracy over class frequency, groups, learning curves, cost."""

from collections import defaultdict
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import NullFormatter

from isd_ray.study.results import ALL, CLASS_MEAN, Outcome, Run
from isd_ray.study.spec import Setting
from isd_ray.study.tables import compared_groups, group_title, metric_title

matplotlib.use("Agg")  # no window, also where there is a display
PALETTE = (  # the baseline first; told apart also by people who see fewer colours (Okabe and Ito)
    "#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B8B00", "#7F7F7F", "#8C564B",
)  # fmt: skip
MARKS = "osD^vPX*<>"
POINTS = 12  # places on the axis of frequencies; more classes are averaged
WIDTH = 7.6  # inches


def colour(outcome: Outcome, method: str) -> str:
    """Return a method's colour, the same in all pictures."""
    return PALETTE[outcome.methods.index(method) % len(PALETTE)]


def frequency(outcome: Outcome, setting: Setting, metric: str) -> Figure:
    """Accuracy over pretraining images of a class, and below it the difference from the baseline."""
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True)
    lines = {m: by_frequency(outcome, outcome.of(setting, m), metric) for m in outcome.methods}
    base = lines[outcome.methods[0]]
    for i, (method, line) in enumerate(lines.items()):
        if not line:
            continue
        style = {
            "color": colour(outcome, method),
            "marker": MARKS[i % len(MARKS)],
            "markersize": 4,
            "linewidth": 1.2,
        }
        axes.plot(list(line), list(line.values()), label=method, **style)
        both = [x for x in line if x in base]
        if method != outcome.methods[0]:
            below.plot(both, [line[x] - base[x] for x in both], **style)
    below.axhline(0, color=PALETTE[0], linewidth=1)
    axes.set_ylabel("accuracy [%]")
    below.set_ylabel(f"minus {outcome.methods[0]}\n[points]")
    below.set_xlabel("pretraining images of the class")
    _log_axis(below, sorted({x for line in lines.values() for x in line}))
    axes.tick_params(axis="x", which="both", length=0)
    for each in (axes, below):
        _clean(each)
    _legend(figure, axes)
    return figure


def by_frequency(outcome: Outcome, runs: Sequence[Run], metric: str) -> dict[float, float]:
    """Return {pretraining images of a class: mean accuracy over such classes and over runs}, rarest first.

    Where the classes have more than 12 different numbers of images, neighbouring ones are averaged.
    """
    points: dict[float, list[float]] = defaultdict(list)
    for run in runs:
        counts = outcome.plan.frequencies(run.cell.subset)
        for c, accuracy in enumerate(run.per_class(metric) or ()):
            if accuracy is not None and counts[c]:
                points[counts[c]].append(accuracy)
    order = sorted(points)
    if len(order) <= POINTS:
        return {x: float(np.mean(points[x])) for x in order}
    merged = {}
    for part in np.array_split(np.array(order), POINTS):
        values = [v for x in part for v in points[x]]
        merged[float(np.exp(np.mean(np.log(part))))] = float(np.mean(values))
    return merged


def bars(outcome: Outcome, setting: Setting, metric: str) -> Figure:
    """Accuracy of every group and method, mean and deviation over runs."""
    groups = compared_groups(outcome, setting)
    if len(groups) == 1:
        groups.append(CLASS_MEAN)
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(outcome.methods)
    for i, method in enumerate(outcome.methods):
        values = [
            [v for r in outcome.of(setting, method) if (v := r.scores(metric).get(g)) is not None]
            for g in groups
        ]
        means = [float(np.mean(v)) if v else np.nan for v in values]
        errors = [float(np.std(v, ddof=1)) if len(v) > 1 else 0.0 for v in values]
        places = np.arange(len(groups)) + (i - (len(outcome.methods) - 1) / 2) * width
        axes.bar(places, means, width * 0.92, yerr=errors, color=colour(outcome, method), label=method,
                 error_kw={"elinewidth": 0.8, "ecolor": "#777777"})  # fmt: skip
    axes.set_xticks(range(len(groups)), [group_title(g) for g in groups])
    axes.set_ylabel("accuracy [%]")
    _clean(axes)
    _legend(figure, axes)
    return figure


def curves(outcome: Outcome, setting: Setting, metric: str) -> tuple[Figure, str]:
    """Accuracy on held-out training images by epoch where runs measure it, and every method's loss on its own axis.

    Returns the figure and what it shows.
    """
    watched = any(run.validation for run in outcome.of(setting))
    methods = [m for m in outcome.methods if outcome.of(setting, m)]
    below = 1.5 * -(-len(methods) // 4) + 0.5
    figure = Figure(figsize=(WIDTH, below + (3.0 if watched else 0.0)), layout="constrained")
    caption = "Loss of every run; losses of different methods cannot be compared."
    if not watched:
        _losses(outcome, setting, methods, figure)
        return figure, caption + " No run was evaluated on the way (evaluate.every)."
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[3.0, below])[:, 0]
    _losses(outcome, setting, methods, lower)
    axes = upper.add_subplot()
    for method in methods:
        for i, run in enumerate(outcome.of(setting, method)):
            points = [(row["epoch"], row[metric]) for row in run.validation if row.get(metric) is not None]
            if points:
                label, shade = None if i else method, colour(outcome, method)
                axes.plot(*np.transpose(points), color=shade, linewidth=1, label=label)
    axes.set_ylabel("validation [%]")
    _clean(axes)
    _legend(upper, axes)
    above = f"Above: {metric_title(metric)} on held-out training images."
    return figure, f"{above} Below: {caption[0].lower()}{caption[1:]}"


def _losses(outcome: Outcome, setting: Setting, methods: Sequence[str], figure: FigureBase) -> None:
    columns = min(4, len(methods))
    for i, method in enumerate(methods):
        axes = figure.add_subplot(-(-len(methods) // columns), columns, i + 1)
        for run in outcome.of(setting, method):
            epochs = [row["step"] / run.rows[-1]["step"] * run.config["train.epochs"] for row in run.rows]
            losses = [row["loss"] for row in run.rows]
            axes.plot(epochs, losses, color=colour(outcome, method), linewidth=0.8, alpha=0.7)
        axes.set_title(method, fontsize=8)
        axes.tick_params(labelsize=7)
        _clean(axes)
    figure.supxlabel("epoch", fontsize=8)
    figure.supylabel("loss", fontsize=8)


def cost(outcome: Outcome, metric: str) -> Figure | None:
    """Accuracy over what it took, one point a method and setting; None where nothing is known of the cost."""
    settings = [s for s in outcome.plan.settings if not s.control and any(r.cost() for r in outcome.of(s))]
    if not settings:
        return None
    columns = min(3, len(settings))
    rows = -(-len(settings) // columns)
    figure = Figure(figsize=(WIDTH, 0.4 + 2.7 * rows), layout="constrained")
    for i, setting in enumerate(settings):
        axes = figure.add_subplot(rows, columns, i + 1)
        for j, method in enumerate(outcome.methods):
            runs = [r for r in outcome.of(setting, method) if r.cost() and ALL in r.scores(metric)]
            if runs:
                x = np.mean([r.cost()["passes"] for r in runs]) / 1e6
                y = np.mean([r.scores(metric)[ALL] for r in runs])
                axes.plot(x, y, MARKS[j % len(MARKS)], color=colour(outcome, method), label=method)
        axes.set_title(setting.name, fontsize=8)
        axes.set_xlabel("10^6 forward and backward passes", fontsize=8)
        axes.set_ylabel("All [%]" if i % columns == 0 else "")
        _clean(axes)
        if i == 0:
            _legend(figure, axes)
    return figure


def _log_axis(axes: Axes, counts: Sequence[float]) -> None:
    if not counts:
        return
    axes.set_xscale("log")
    ticks = counts if len(counts) <= POINTS else counts[:: len(counts) // POINTS + 1]
    axes.set_xticks(ticks, [f"{x:.0f}" for x in ticks], fontsize=7)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: FigureBase, axes: Axes) -> None:
    """Beside the picture, never on top of a line."""
    handles, names = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside right upper", fontsize=8, frameon=False)
