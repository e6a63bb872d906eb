"""Pictures of images: what is nearest to rare queries, where classes lie, and what the teacher finds alike."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from isd_ray.study.pictures import Arrays

matplotlib.use("Agg")  # no window, also where there is a display
RIGHT, WRONG, PLAIN = (0, 150, 90), (213, 60, 0), (120, 120, 120)
BORDER = 3  # pixels around an image
GAP = 4
BLOCK = 4.5  # inches of a block's width
NAMES = 0.6  # inches of it for the names of classes
MANY = 20  # classes that colours can still tell apart
TEXT = 6  # points


def neighbour_sheet(drawn: Mapping[str, Arrays], names: Sequence[str], counts: Sequence[int]) -> Figure:
    """A block a method: a query a row, then its nearest labelled images, framed green where the class is the same."""
    rows = max(len(a["query_label"]) for a in drawn.values())
    figure, places = _grid(len(drawn), rows, max(a["near_image"].shape[1] for a in drawn.values()))
    for axes, (method, a) in zip(places, drawn.items(), strict=True):
        same = a["near_label"] == a["query_label"][:, None]
        _sheet(axes, a["query_image"], a["near_image"], same)
        hits = f"{100 * same.mean():.0f} % of the class"
        _label(axes, f"{method}: {hits}", a["query_label"], a["query_image"].shape[-1], names, counts)
    return figure


def anchor_sheet(drawn: Mapping[str, Arrays], names: Sequence[str], counts: Sequence[int]) -> Figure | None:
    """A block a method: a query a row, then the teacher's likeliest anchors with their probabilities.

    None where no method has a teacher over a queue.
    """
    drawn = {method: a for method, a in drawn.items() if "anchor_image" in a}
    if not drawn:
        return None
    rows = max(len(a["query_label"]) for a in drawn.values())
    figure, places = _grid(
        len(drawn), rows, max(a["anchor_image"].shape[1] for a in drawn.values()), text=True
    )
    for axes, (method, a) in zip(places, drawn.items(), strict=True):
        same = a["anchor_label"] == a["query_label"][:, None]
        step_y, step_x = _sheet(axes, a["query_image"], a["anchor_image"], same, text=True)
        for (q, i), p in np.ndenumerate(a["anchor_probability"]):
            x, y = (i + 1) * step_x + GAP + step_x / 2, (q + 1) * step_y - GAP
            axes.text(x, y, _probability(float(p)), fontsize=TEXT, ha="center", va="bottom")
        mass = a["anchor_probability"].sum(axis=1).mean()
        title = f"{method} (t = {float(a['anchor_temperature']):g}): {100 * mass:.0f} % of the mass"
        _label(axes, title, a["query_label"], a["query_image"].shape[-1], names, counts, step_y)
    return figure


def map_sheet(drawn: Mapping[str, Arrays], names: Sequence[str], counts: Sequence[int]) -> Figure:
    """Every method's map twice: coloured by class, and by how frequent the class is."""
    columns = min(4, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(1.9 * columns + 1.5, 3.9 * rows + 0.3), layout="constrained")
    present = np.unique(np.concatenate([a["map_label"] for a in drawn.values()]))
    palette = matplotlib.colormaps["tab20" if len(present) <= MANY else "nipy_spectral"]
    colours = [palette((i + 0.5) / max(len(present), MANY)) for i in range(len(present))]
    shades = np.log10(np.maximum(np.asarray(counts)[present], 1))
    low, high = float(shades.min()), float(max(shades.max(), shades.min() + 0.1))
    for i, (method, a) in enumerate(drawn.items()):
        row, column = divmod(i, columns)
        x, y = a["map_place"].T
        place = np.searchsorted(present, a["map_label"])
        order = np.argsort(-shades[place], kind="stable")  # the rare ones on top
        upper = figure.add_subplot(2 * rows, columns, 2 * row * columns + column + 1, title=method)
        upper.scatter(x, y, c=[colours[p] for p in place], s=3, linewidths=0)
        upper.title.set_fontsize(9)
        lower = figure.add_subplot(2 * rows, columns, (2 * row + 1) * columns + column + 1)
        rarity = shades[place][order]
        shown = lower.scatter(
            x[order], y[order], c=rarity, cmap="viridis_r", vmin=low, vmax=high, s=3, linewidths=0
        )
        for axes in (upper, lower):
            axes.set_xticks([])
            axes.set_yticks([])
    if len(present) <= MANY:
        dots = [
            Line2D(
                [],
                [],
                marker="o",
                linestyle="",
                markersize=4,
                color=colours[i],
                label=f"{names[c]} ({counts[c]:,})",
            )
            for i, c in enumerate(present)
        ]
        figure.legend(handles=dots, loc="outside right upper", fontsize=7, frameon=False)
    bar = figure.colorbar(shown, ax=figure.axes, location="bottom", fraction=0.03, aspect=40, pad=0.02)
    bar.set_ticks([low, high], labels=[f"{10**t:.0f} images" for t in (low, high)])
    bar.ax.tick_params(labelsize=7)
    return figure


def _grid(blocks: int, rows: int, images: int, text: bool = False) -> tuple[Figure, list[Axes]]:
    """Make a figure of two columns of blocks, each as high as its rows of a query and `images` others need."""
    columns = min(2, blocks)
    lines = -(-blocks // columns)
    row = (BLOCK - NAMES) / (images + 1) * (4 / 3 if text else 1.0)
    figure = Figure(figsize=(BLOCK * columns, lines * (rows * row + 0.3)), layout="constrained")
    return figure, [figure.add_subplot(lines, columns, i + 1) for i in range(blocks)]


def _sheet(
    axes: Axes, queries: np.ndarray, others: np.ndarray, same: np.ndarray, text: bool = False
) -> tuple[int, int]:
    """Show queries [Q, 3, S, S] and what belongs to each [Q, k, 3, S, S]; returns the steps of rows and columns."""
    side = queries.shape[-1] + 2 * BORDER
    step_y, step_x = side + GAP + (side // 3 if text else 0), side + GAP
    canvas = np.full(
        (len(queries) * step_y + GAP, (others.shape[1] + 1) * step_x + 2 * GAP, 3), 255, np.uint8
    )
    for q in range(len(queries)):
        top = q * step_y + GAP
        _put(canvas, queries[q], top, 0, PLAIN)
        for i in range(others.shape[1]):
            _put(canvas, others[q, i], top, (i + 1) * step_x + GAP, RIGHT if same[q, i] else WRONG)
    axes.imshow(canvas, interpolation="nearest")
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    return step_y, step_x


def _put(canvas: np.ndarray, image: np.ndarray, top: int, left: int, frame: tuple[int, int, int]) -> None:
    side = image.shape[-1] + 2 * BORDER
    canvas[top : top + side, left : left + side] = frame
    inner = slice(top + BORDER, top + side - BORDER), slice(left + BORDER, left + side - BORDER)
    canvas[inner] = image.transpose(1, 2, 0)


def _label(
    axes: Axes, title: str, labels: np.ndarray, image: int, names: Sequence[str], counts: Sequence[int],
    step: int | None = None,
) -> None:  # fmt: skip
    side = image + 2 * BORDER
    places = [q * (step or side + GAP) + GAP + side / 2 for q in range(len(labels))]
    axes.set_yticks(places, [f"{names[c]}\n({counts[c]:,})" for c in labels], fontsize=TEXT)
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=8)


def _probability(p: float) -> str:
    return f"{p:.2f}" if p >= 0.005 else "<.01"
