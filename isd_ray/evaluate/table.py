"""The result of an evaluation as a table that a person reads: on a terminal, in a job's log, in Markdown."""

import sys
from collections.abc import Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from isd_ray.errors import harmless, printable
from isd_ray.evaluate.names import parse
from isd_ray.markup import LONGEST_NAME, as_markdown, in_markdown

WIDTH = 100
COLUMNS = 8  # metrics of a table that fit into the width
MAX_CLASSES = 20  # more do not fit into a line; they stand in result.json
Grid = tuple[str, list[str], list[list[str]]]  # title, header (a line break divides a title), rows


def print_table(
    result: dict[str, Any],
    out: TextIO | None = None,
    *,
    class_names: Sequence[str] | None = None,
    by: str = "knn20",
) -> None:
    """Print a result of `evaluate_encoders`, at most 100 columns wide: a row an encoder, a column a metric,
    then the groups of metric `by`, and its accuracy per class for the first encoder. Colour only on a
    terminal.
    """
    console = Console(file=out or sys.stdout, width=WIDTH, highlight=False)
    for name, header, rows in _grids(result, by):
        table = Table(box=box.SIMPLE_HEAD, title=name, title_justify="left", pad_edge=False)
        for i, column in enumerate(header):
            table.add_column(Text(column), justify="right" if i else "left")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        console.print(table)
    for line in _notes(result, by, class_names):
        console.print(printable(line), markup=False)


def markdown(result: dict[str, Any], *, class_names: Sequence[str] | None = None, by: str = "knn20") -> str:
    """Return the same tables and notes as Markdown."""
    lines = []
    for _, header, rows in _grids(result, by):
        rule = ["---", *["---:"] * (len(header) - 1)]
        texts = [[in_markdown(cell) for cell in cells] for cells in (header, *rows)]
        table = (texts[0], rule, *texts[1:])
        lines += ["", *("| " + " | ".join(cells) + " |" for cells in table)]
    notes = [line for note in _notes(result, by, class_names) for line in ("", as_markdown(note))]
    return "\n".join(lines[1:] + notes) + "\n"


def _grids(result: dict[str, Any], by: str) -> list[Grid]:
    """The main metrics with the groups of metric `by` and their std, then the others, COLUMNS at a time."""
    metrics = list(next(iter(result["metrics"].values())))
    main = [m for m in metrics if parse(m).protocol.main][:COLUMNS]
    groups = list(result["protocol"]["groups"]["classes"]) if by in main else []
    grids = [("Accuracy on the test set (%)", *_cells(result, main, [*groups, "std"] if groups else [], by))]
    rest = [m for m in metrics if m not in main]
    for start in range(0, len(rest), COLUMNS):
        grids.append(("Other protocols (%)", *_cells(result, rest[start : start + COLUMNS], [], by)))
    return grids if main else grids[1:]


def _cells(
    result: dict[str, Any], metrics: list[str], extra: list[str], by: str
) -> tuple[list[str], list[list[str]]]:
    lead = parse(by).title
    header = ["", *[parse(m).title for m in metrics], *[f"{lead}\n{name}" for name in extra]]
    rows = []
    for name, values in result["metrics"].items():
        by_group = (result["groups"][name].get(by) or {}) | {"std": result["std"][name].get(by)}
        rows.append(
            [name, *[_percent(values[m]) for m in metrics], *[_percent(by_group.get(g)) for g in extra]]
        )
    return header, rows


def _notes(result: dict[str, Any], by: str, class_names: Sequence[str] | None) -> list[str]:
    """Lines below the table: per class, groups, bank, and what was left out and why."""
    protocol, notes = result["protocol"], []
    name, per_class = next((n, m.get(by)) for n, m in result["per_class"].items())
    if per_class and len(per_class) <= MAX_CLASSES:
        known = class_names or [str(c) for c in range(len(per_class))]
        names = [harmless(name, LONGEST_NAME) for name in known]
        each = ", ".join(f"{c} {_percent(v)}" for c, v in zip(names, per_class, strict=True))
        notes.append(f"{_one_line(parse(by).title)} per class, {name}: {each}")
    sizes = ", ".join(f"{group} {len(members)}" for group, members in protocol["groups"]["classes"].items())
    notes.append(f"Classes by pretraining count: {sizes or 'all equally frequent'}.")
    bank = protocol["bank"]
    notes.append(f"Bank ({bank['name']}): {bank['images']} labelled images, "
                 f"{bank['smallest_class']} to {bank['largest_class']} a class.")  # fmt: skip
    for metric, p in protocol.items():
        if "left_out" in p:
            notes.append(f"{_one_line(parse(metric).title)} is left out: {p['left_out']}.")
    return notes


def _one_line(title: str) -> str:
    return title.replace("\n", " ")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
