"""What the cells of a study measured: scores by group, one tidy table, and the pairs that tests compare."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from isd_ray.config import flatten
from isd_ray.errors import UserError
from isd_ray.evaluate.groups import means
from isd_ray.evaluate.names import parse as parse_name
from isd_ray.study.check import PASSES, Plan
from isd_ray.study.spec import Cell, Setting
from isd_ray.study.work import RESULT, cell_folder
from isd_ray.train.failure import read_failure
from isd_ray.train.folder import Row, RunFolder, read_lines, saved_config
from isd_ray.train.progress import METRICS
from isd_ray.train.result import read_result
from isd_ray.train.validation import read_rows

FILE, SPEED = "results.parquet", "images_per_second"
ALL, CLASS_MEAN, STD = "all", "class_mean", "std"
SPREAD = {
    "rankme": "dimensions",
    "dim": "dimensions",
    "dead_dimensions": "dimensions",
}  # units; others have none


@dataclass
class Run:
    """One cell as its folder has it. result: of result.json; None for a cell that is not finished."""

    cell: Cell
    folder: RunFolder
    result: dict[str, Any] | None
    failure: str | None
    groups: dict[str, list[int]]

    @cached_property
    def rows(self) -> list[Row]:
        """Rows of metrics.jsonl, but for those without a loss and a speed."""
        rows = read_lines(self.folder, METRICS)
        return [row for row in rows if row.get("loss") is not None and (row.get(SPEED) or 0) > 0]

    @cached_property
    def validation(self) -> list[Row]:
        """Rows of validation.jsonl."""
        return read_rows(self.folder)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Options by dotted name, of a run that was started."""
        return flatten(saved_config(self.folder).model_dump())

    def per_class(self, metric: str) -> list[float | None] | None:
        """Accuracy of each class of the data set [C] in %; None where `network.metric` has none or was not measured."""
        network, name = metric.split(".")
        if not parse_name(name).protocol.by_class:
            return None  # of a transfer set: its classes are not this one's
        return ((self.result or {}).get("per_class", {}).get(network) or {}).get(name)

    def scores(self, metric: str) -> dict[str, float]:
        """Percentages of `network.metric` over all test images, as mean over classes, and by group; and their std.

        Of a metric without classes of this data set (transfer, clusters): over all images alone.
        """
        network, name = metric.split(".")
        over_all = ((self.result or {}).get("metrics", {}).get(network) or {}).get(name)
        if over_all is None:
            return {}
        per_class = self.per_class(metric)
        if per_class is None:
            return {ALL: over_all}
        found = means(per_class, self.groups)
        every = {ALL: over_all, CLASS_MEAN: found["class_mean"], **found["groups"], STD: found["std"]}
        return {group: value for group, value in every.items() if value is not None}

    def cost(self) -> dict[str, float]:
        """Return images/s, device hours, images seen and millions of passes; from the log, so also over restarts."""
        if self.result is None or not self.rows:
            return {}
        batch, seconds, before = self.config["train.batch_size"], 0.0, 0
        for row in self.rows:
            seconds += (row["step"] - before) * batch / row[SPEED]
            before = row["step"]
        cuda = self.config["train.device"] == "cuda"
        share = self.config["train.gpus_per_worker"] if cuda else self.config["train.threads"]
        passes = sum(self.result["cost"][name] for name in PASSES)
        return {
            SPEED: self.result[SPEED],
            "gpu_hours" if cuda else "cpu_hours": seconds
            / 3600
            * max(self.config["train.workers"], 1)
            * share,
            "epochs": self.config["train.epochs"],
            "images": before * batch,
            "passes_per_image": passes,
            "passes": before * batch * passes,
        }


@dataclass
class Outcome:
    """All cells of a study, in its order."""

    plan: Plan
    runs: list[Run]

    @property
    def methods(self) -> list[str]:
        """Names of the methods, the baseline first."""
        study = self.plan.study
        return [study.baseline, *(name for name in study.methods if name != study.baseline)]

    @property
    def finished(self) -> list[Run]:
        """Cells with a result."""
        return [run for run in self.runs if run.result is not None]

    @property
    def failed(self) -> list[Run]:
        """Cells that broke, and those whose pictures did."""
        return [run for run in self.runs if run.failure is not None]

    def of(self, setting: Setting, method: str | None = None) -> list[Run]:
        """Return the finished cells of a setting (and a method)."""
        return [r for r in self.finished if r.cell.setting == setting and method in (None, r.cell.method)]

    def groups(self, setting: Setting) -> list[str]:
        """Return the names of a setting's groups of classes."""
        runs = [run for run in self.runs if run.cell.setting == setting]
        return list(dict.fromkeys(group for run in runs for group in run.groups))

    def columns(self, setting: Setting) -> list[tuple[int | str, int]]:
        """Return the (split, seed) pairs of a setting."""
        return list(
            dict.fromkeys((r.cell.subset.split, r.cell.seed) for r in self.runs if r.cell.setting == setting)
        )

    def units(self, setting: Setting) -> str:
        """Return what a pair of a test is: "split" where there are several, whose seeds are averaged; else "seed"."""
        return "split" if len({split for split, _ in self.columns(setting)}) > 1 else "seed"

    def by_run(self, setting: Setting, method: str, metric: str, group: str) -> dict[tuple[Any, int], float]:
        """Return the score of every finished run, by (split, seed)."""
        found = {
            (r.cell.subset.split, r.cell.seed): r.scores(metric).get(group) for r in self.of(setting, method)
        }
        return {key: score for key, score in found.items() if score is not None}

    def averaged(self, setting: Setting, values: Mapping[tuple[Any, int], float]) -> dict[Any, float]:
        """Return one value a split, averaged over seeds, or one a seed where there is one split."""
        place = 0 if self.units(setting) == "split" else 1
        several: dict[Any, list[float]] = {}
        for key, value in values.items():
            several.setdefault(key[place], []).append(value)
        return {unit: float(np.mean(found)) for unit, found in several.items()}

    def by_unit(self, setting: Setting, method: str, metric: str, group: str) -> dict[Any, float]:
        """Return one score a split, averaged over seeds, or one a seed where there is one split."""
        return self.averaged(setting, self.by_run(setting, method, metric, group))

    def differences(self, setting: Setting, method: str, metric: str, group: str) -> list[float]:
        """Return method minus baseline for each split or seed that both have, averaged over the same seeds."""
        ours, theirs = (self.by_run(setting, m, metric, group) for m in (method, self.plan.study.baseline))
        both = {key: ours[key] - theirs[key] for key in ours if key in theirs}
        return list(self.averaged(setting, both).values())


def collect(plan: Plan, folder: RunFolder) -> Outcome:
    """Read all cells of a study."""
    runs = []
    for cell in plan.cells:
        run = cell_folder(folder, cell)
        result = read_result(run) if run.exists(RESULT) else None
        if result is not None and len(result["classes"]) != len(plan.facts[cell.subset].names):
            raise UserError(
                f"{run.place(RESULT)} has {len(result['classes'])} classes, the data set has "
                f"{len(plan.facts[cell.subset].names)}; remove that file to measure anew"
            )
        runs.append(Run(cell, run, result, read_failure(run), plan.grouping(cell.subset)))
    return Outcome(plan, runs)


def write(outcome: Outcome, folder: RunFolder) -> None:
    """Write results.parquet: a row a cell, network, metric and group, classes among them."""
    rows = [row for run in outcome.finished for row in tidy_rows(outcome.plan, run)]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), sink)
    folder.write(FILE, sink.getvalue())


SCHEMA = pa.schema(
    [
        ("cell", pa.string()), ("data", pa.string()), ("imbalance", pa.string()), ("control", pa.bool_()),
        ("split", pa.string()), ("method", pa.string()), ("seed", pa.int64()), ("network", pa.string()),
        ("metric", pa.string()), ("level", pa.string()), ("group", pa.string()), ("value", pa.float64()),
        ("unit", pa.string()), ("pretraining_images", pa.int64()), ("images_when_unbalanced", pa.int64()),
    ]
)  # fmt: skip


def tidy_rows(plan: Plan, run: Run) -> Iterator[dict[str, Any]]:
    """Yield the rows of one finished cell.

    level: all, class_mean, group, std (of the groups), class, spread (of features) or cost. pretraining_images: of the
    class or group in this cell; images_when_unbalanced: in the unbalanced set of the setting, which groups it.
    """
    cell, result = run.cell, run.result or {}
    facts, usual = plan.facts[cell.subset], plan.frequencies(cell.subset)
    own: dict[str, Any] = {"cell": cell.name, "data": cell.setting.data, "imbalance": cell.setting.imbalance}
    own |= {
        "control": cell.setting.control,
        "split": str(cell.subset.split),
        "method": cell.method,
        "seed": cell.seed,
    }
    everything = list(range(len(facts.names)))
    for network, metrics in result.get("metrics", {}).items():
        for metric in metrics:
            name = f"{network}.{metric}"
            what: dict[str, Any] = own | {"network": network, "metric": metric, "unit": "%"}
            for group, value in run.scores(name).items():
                level = group if group in (ALL, CLASS_MEAN, STD) else "group"
                members = run.groups.get(group, everything)
                yield (
                    what
                    | {"level": level, "group": group, "value": value}
                    | _images(facts.counts, usual, members)
                )
            for c, accuracy in enumerate(run.per_class(name) or ()):
                one = {"level": "class", "group": facts.names[c], "value": accuracy}
                yield what | one | _images(facts.counts, usual, [c])
    for network, spread in result.get("collapse", {}).items():
        for metric, number in flatten(spread).items():
            what = {"network": network, "metric": metric, "unit": SPREAD.get(metric), "level": "spread"}
            yield own | what | {"group": ALL, "value": number} | _images(facts.counts, usual, everything)
    for metric, number in run.cost().items():
        what = {"network": "student", "metric": metric, "level": "cost", "group": ALL, "value": number}
        yield own | what | {"unit": metric} | _images(facts.counts, usual, everything)


def _images(counts: list[int], usual: list[int], members: list[int]) -> dict[str, int]:
    return {
        "pretraining_images": sum(counts[c] for c in members),
        "images_when_unbalanced": sum(usual[c] for c in members),
    }
