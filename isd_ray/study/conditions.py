"""Under which conditions a study compared: options, cost, and what failed."""

from typing import Any

import numpy as np

from isd_ray.config import flatten, merge
from isd_ray.study.blocks import Table
from isd_ray.study.results import Outcome, Run
from isd_ray.study.tables import NOTHING

PLACES = {  # options that say where a run lies or how fast it goes, and nothing of what is learned
    "name", "output", "address", "train.threads", "train.device", "train.gpus_per_worker", "train.log_every",
    "train.loggers", "train.checkpoint_seconds", "train.keep_checkpoints", "train.max_failures", "data.root",
    "data.shards", "data.download", "data.cache", "method.name", "evaluate.baselines",
}  # fmt: skip


def costs(outcome: Outcome) -> Table:
    """What the runs took, averaged over seeds and splits."""
    rows: list[list[str]] = []
    rules = set()
    unit = "GPU h" if any("gpu_hours" in run.cost() for run in outcome.finished) else "CPU h"
    for setting in outcome.plan.settings:
        rules.add(len(rows))
        for method in outcome.methods:
            found = [cost for run in outcome.of(setting, method) if (cost := run.cost())]
            if not found:
                continue
            mean = {name: float(np.mean([cost[name] for cost in found])) for name in found[0]}
            gflop = float(np.mean([(r.result or {})["cost"]["gflop"] for r in outcome.of(setting, method)]))
            hours = mean.get("gpu_hours", mean.get("cpu_hours", float("nan")))
            numbers = [f"{mean['images_per_second']:.0f}", f"{hours:.3f}", f"{mean['epochs']:.0f}"]
            numbers += [f"{mean['images'] / 1e6:.3f}", f"{mean['passes_per_image']:g}"]
            rows.append([setting.name, method, *numbers, f"{mean['passes'] / 1e6:.3f}", f"{gflop:g}"])
    header = ["setting", "method", "images/s", f"{unit} a run", "epochs", "10^6 images", "passes an image"]
    header += ["10^6 passes", "GFLOP an image"]
    note = (
        "Of training, from the logs; runs side by side share the machine. Passes: looks of student and teacher, and of "
        "the student backwards, a smaller view by its share of pixels. GFLOP: with heads, without looking into a queue."
    )
    return Table("Cost", header, rows, note, texts=2, rules=frozenset(rules))


def option_tables(outcome: Outcome) -> tuple[Table, Table]:
    """Return the options that all methods share, and those that differ, with who says so."""
    runs = first_runs(outcome)
    options = {name: run.config for name, run in runs.items()}
    names = [n for n in next(iter(options.values()), {}) if n not in PLACES]
    values = {n: [options[m].get(n) for m in options] for n in names}
    same = {n: v[0] for n, v in values.items() if all(x == v[0] for x in v) and v[0] is not None}
    shown = [
        n for n in same if n.startswith(("model.", "train.", "data.image", "method.views", "evaluate.bank"))
    ]
    differ = {n: v for n, v in values.items() if n not in same and any(x is not None for x in v)}
    said = outcome.plan.study.methods
    rows = [
        [n, *(_option(x, n in flatten(merge(said[m]))) for m, x in zip(options, v, strict=True))]
        for n, v in differ.items()
    ]
    equal = Table("Equal for all methods", ["option", "value"], [[n, str(same[n])] for n in shown], texts=2)
    note = (
        "Of the first cell of each method. Marked †: set by the study's file; the rest is the method's own or the data "
        "set's."
    )
    return equal, Table("What differs", ["option", *options], rows, note, texts=1 + len(options))


def first_runs(outcome: Outcome) -> dict[str, Run]:
    """Return the first started cell of each method, baseline first."""
    found: dict[str, Run] = {}
    for method in outcome.methods:
        for run in outcome.runs:
            if run.cell.method == method and run.folder.exists("config.yaml"):
                found.setdefault(method, run)
    return found


def failures(outcome: Outcome) -> Table | None:
    """Cells that broke, with their reasons."""
    rows = [[run.cell.name, run.failure or ""] for run in outcome.failed]
    note = "The same command tries them again, and them alone."
    return Table("Cells that failed", ["cell", "why"], rows, note, texts=2) if rows else None


def _option(value: Any, set_by_file: bool) -> str:
    text = NOTHING if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{text} †" if set_by_file else text
