"""What does each method learn in the same few minutes, on the same images, with the same loop?

Trains every method on the embedded long-tailed set as `python jobs/pretrain.py --method.name NAME` would, for a
number of epochs that suits two cores, and prints 20-NN accuracies beside those of the untrained backbone and of
raw pixels. One seed, a small backbone, a short budget: it shows that every method learns, not which is best. Methods
with a frozen teacher learn from the run of isd_plus, which is trained first where it is not there; their column
"teacher" is that network.

    python -m benchmarks.methods                         # all, about a minute each
    python -m benchmarks.methods --methods isd simclr --epochs 40
    python -m benchmarks.methods --methods byol --curve  # accuracy at every quarter of the run

A finished run is not repeated: the same command continues where it was stopped.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import isd_ray
from isd_ray.methods import METHODS
from isd_ray.train.folder import RunFolder, checkpoint_names
from isd_ray.train.trainer import evaluate

NEEDS_TEACHER = {name for name, method in METHODS.items() if "method.teacher" in method.defaults}
TEACHER = "isd_plus"


def options_of_run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The options of one method's run; what is not named is the method's and the data set's own."""
    teacher = {}
    if name in NEEDS_TEACHER:
        teacher = {"method.teacher": isd_ray.pretrain(options_of_run(TEACHER, options))["folder"]}
    return teacher | {
        "method.name": name,
        "name": f"{name}-{options.epochs}",
        "output": str(options.runs),
        "train.epochs": options.epochs,
        "train.seed": options.seed,
        "train.workers": 0,
        "train.keep_checkpoints": 1000 if options.curve else 2,
        "train.checkpoint_seconds": 5 if options.curve else 60,
        "evaluate.protocols": ["knn20"],
    }


def twenty_nn(result: dict[str, Any], network: str) -> float | None:
    """20-NN accuracy [%] of one network, None where the method has no such network."""
    found = result["metrics"].get(network)
    return None if found is None else found["knn20"]


def row(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train, or read what was trained, and return one row of the table."""
    result = isd_ray.pretrain(options_of_run(name, options))
    row = {network: twenty_nn(result, network) for network in ("student", "teacher", "untrained", "pixels")}
    return {"method": name, "seconds": result["seconds"]["train"]} | row


def curve(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """20-NN of the student at about every quarter of a run."""
    uri = f"{options.runs}/{name}-{options.epochs}"
    names = checkpoint_names(RunFolder(uri))
    chosen = sorted({names[(len(names) - 1) * quarter // 4] for quarter in range(5)})
    settings = {"linear": False, "baselines": False}
    return [
        {"checkpoint": c, "student": twenty_nn(evaluate(uri, c, settings, {}), "student")} for c in chosen
    ]


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the table, best student first; a method below the untrained backbone is marked."""
    table = Table(title="20-NN on the embedded set [%]")
    for name in ("method", "student", "teacher", "untrained", "pixels", "training s"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for r in sorted(rows, key=lambda r: -r["student"]):
        mark = " (!)" if r["student"] <= r["untrained"] else ""
        cells = [
            "-" if r[n] is None else f"{r[n]:.1f}" for n in ("student", "teacher", "untrained", "pixels")
        ]
        table.add_row(r["method"] + mark, *cells, f"{r['seconds']:.0f}")
    console.print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), choices=sorted(METHODS), metavar="NAME"
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--curve", action="store_true", help="also the accuracy along the run")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark_methods"))
    parser.add_argument("--out", type=Path, default=Path("results/benchmark_methods.json"))
    return parser.parse_args()


def main() -> None:
    options, console = arguments(), Console(width=120)
    rows, curves = [], {}
    for name in options.methods:
        rows.append(row(name, options))
        if options.curve:
            curves[name] = curve(name, options)
    show(rows, console)
    for name, points in curves.items():
        console.print(name, ", ".join(f"{p['checkpoint']} {p['student']:.1f}" for p in points))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    about |= {"epochs": options.epochs, "seed": options.seed}
    options.out.write_text(json.dumps({"about": about, "rows": rows, "curves": curves}, indent=1))
    console.print(options.out)


if __name__ == "__main__":
    main()
