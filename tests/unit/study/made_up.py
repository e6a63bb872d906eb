"""A study whose cells were never run: folders as runs would leave them, with numbers that a test can foresee."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from isd_ray.config import to_yaml
from isd_ray.evaluate.groups import class_groups
from isd_ray.study.check import Plan
from isd_ray.study.pictures import FILE
from isd_ray.study.spec import Cell, Setting, Study, Subset, settings
from isd_ray.study.subsets import Facts
from isd_ray.study.work import cell_folder, cells_folder
from isd_ray.train.folder import RunFolder

NAMES = ["cat", "dog", "owl", "elk", "bee", "ant"]
COUNTS = {False: [100, 80, 40, 20, 10, 4], True: [42] * 6}
BETTER = {"moco_v2": 0.0, "isd": 2.0, "simclr": -1.0}  # over all classes
RARE = {"moco_v2": 0.0, "isd": 6.0, "simclr": 0.0}  # besides, on the two rarest


def made_up(**change: Any) -> Plan:
    """A plan of three methods, two data sets' worth of settings and three seeds, without any data behind it."""
    content = {
        "description": "Made <up> | nothing was run",
        "methods": {"moco_v2": {}, "isd": {"method.temperature": 0.3}, "simclr": {}},
        "data": {"embedded_lt": {}},
        "imbalances": {"exp25": {"scheme": "exponential", "ratio": 25, "control": True}},
        "seeds": [0, 1, 2],
        "baseline": "moco_v2",
        "metrics": ["student.knn20", "student.linear"],
        "config": {"train.epochs": 4},
        "pictures": {"queries": 2, "neighbours": 3, "anchors": 3, "sample": 30},
    } | change
    study = Study(**content)
    facts = {}
    for setting in settings(study):
        splits = study.imbalances[setting.imbalance].splits
        for split in study.seeds if splits == "seeds" else splits:
            counts = COUNTS[setting.control]
            facts[Subset(setting, split)] = Facts(NAMES, counts, [10] * 6, class_groups(counts))
    return Plan(study, {}, facts, {})


def accuracy(cell: Cell, metric: str = "knn20") -> list[float]:
    """What a student has in each class: seeds and splits move all methods alike, up to a little."""
    base = (
        50.0 + 3 * cell.seed + (2.0 if cell.setting.control else 0.0) + (5.0 if metric == "linear" else 0.0)
    )
    base += 4 * int(cell.subset.split)
    own = BETTER[cell.method] + 0.25 * (cell.seed + int(cell.subset.split)) * (cell.method != "moco_v2")
    return [base + own + (RARE[cell.method] if c >= 4 else 0.0) - 5 * c for c in range(6)]


def write_cell(plan: Plan, folder: RunFolder, cell: Cell, pictures: bool = False) -> None:
    """Leave what a finished run leaves, as far as a report reads it."""
    run = cell_folder(folder, cell)
    run.write("config.yaml", to_yaml(plan.config(cell, cells_folder(folder))).encode())
    rows = [
        {"step": s, "epoch": s // 10, "loss": 5 - s / 20, "images_per_second": 640.0} for s in range(2, 41, 2)
    ]
    run.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    networks = {"student": 0.0}
    if plan.config(cell, cells_folder(folder)).evaluate.baselines:
        networks |= {"untrained": -15.0, "pixels": -20.0}
    classes = {
        n: {m: [a + shift for a in accuracy(cell, m)] for m in ("knn20", "linear")}
        for n, shift in networks.items()
    }
    result = result_of(classes, NAMES) | {"collapse": {"student": {"rankme": 12.5, "std": 0.9}}}
    run.write_json("result.json", result)
    if pictures:
        run.write(FILE, picture_arrays(plan, cell))


def result_of(classes: dict[str, dict[str, list[float | None]]], names: list[str]) -> dict[str, Any]:
    """A result.json with these accuracies of every class [%], by network and metric; all classes weigh the same."""
    means = {
        n: {m: float(np.mean([x for x in v if x is not None])) for m, v in metrics.items()}
        for n, metrics in classes.items()
    }
    none = {n: dict.fromkeys(metrics) for n, metrics in classes.items()}
    metrics = list(next(iter(classes.values())))
    protocol: dict[str, Any] = {name: {"name": name, "version": 1} for name in (*metrics, "test", "features")}
    bank = {"name": "balanced", "images": 60, "largest_class": 10, "smallest_class": 10}
    return {
        "name": "run",
        "folder": "/runs/run",
        "seconds": {"train": 1.5},
        "metrics": means,
        "class_mean": means,
        "std": none,
        "groups": none,
        "per_class": classes,
        "classes": names,
        "protocol": protocol | {"bank": bank, "groups": {"by": "thirds", "classes": {}}},
        "images_per_second": 640.0,
        "cost": {"student_forward": 1.0, "teacher_forward": 1.0, "backward": 1.0, "gflop": 0.02},
    }


def picture_arrays(plan: Plan, cell: Cell) -> bytes:
    """Pictures of noise."""
    rng, wanted = np.random.default_rng(0), plan.study.pictures
    noise = lambda *shape: rng.integers(0, 256, (*shape, 3, 8, 8), dtype=np.uint8)  # noqa: E731
    arrays = {
        "query_image": noise(2), "query_label": np.array([5, 4]), "near_image": noise(2, 3),
        "near_label": np.array([[5, 4, 1], [4, 4, 0]]), "near_similarity": np.full((2, 3), 0.9),
        "map_place": rng.normal(size=(30, 2)), "map_label": np.arange(30) % 6,
    }  # fmt: skip
    if cell.method == "isd":
        arrays |= {"anchor_image": noise(2, 3), "anchor_label": np.array([[5, 0, 1], [2, 4, 1]]),
                   "anchor_probability": np.array([[0.6, 0.2, 0.001], [0.3, 0.2, 0.1]]),
                   "anchor_temperature": np.array(0.02)}  # fmt: skip
    buffer = io.BytesIO()
    np.savez(buffer, wanted=np.array(wanted.model_dump_json()), **arrays)
    return buffer.getvalue()


def write_study(plan: Plan, path: Path, pictures: bool = True) -> RunFolder:
    """Finish every cell."""
    folder = RunFolder(str(path / "made_up"))
    for cell in plan.cells:
        first = cell.seed == plan.study.seeds[0] and not cell.setting.control
        write_cell(plan, folder, cell, pictures=pictures and first)
    return folder


EXP25 = Setting("embedded_lt", "exp25")
BALANCED = Setting("embedded_lt", "exp25", control=True)
