"""Logistic regression by L-BFGS, the solver of transfer: torch's (ours) against scikit-learn's.

python -m benchmarks.logistic

The same objective, from zero, on one thread: CPU seconds, the objective reached (mean cross-entropy + penalty / 2 *
|W|^2, lower is better) and accuracy on held-out images. Features: raw pixels of real digits and of the embedded set.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F

from isd_ray.data import embedded
from isd_ray.evaluate.draws import split
from isd_ray.evaluate.logistic import ITERATIONS, Head, fit

PENALTIES = (1e-5, 1e-3, 1e-1)
CLASSES = 10


def cases() -> dict[str, tuple[Tensor, Tensor]]:
    """Features and labels by name."""
    digits = load_digits()
    images, labels = embedded.make("bank")
    patterns = torch.from_numpy(images[..., 0]).flatten(1).float() / 255
    return {
        "digits, 1797 x 64": (torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)),
        "embedded set, 1500 x 1024": (patterns, torch.from_numpy(labels)),
    }


def scikit_learn(x: Tensor, y: Tensor, classes: int, penalty: float) -> Head:
    """Fit scikit-learn's LogisticRegression with its default tolerance."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where it stops before it converges, the objective says so
        model = LogisticRegression(C=1 / (penalty * len(x)), max_iter=ITERATIONS).fit(x.numpy(), y.numpy())
    return torch.tensor(model.coef_).float(), torch.tensor(model.intercept_).float()


SOLVERS: dict[str, Callable[[Tensor, Tensor, int, float], Head]] = {
    "torch": fit,
    "scikit-learn": scikit_learn,
}


def measure() -> list[dict[str, Any]]:
    """Time every solver on every case."""
    rows = []
    for case, (x, y) in cases().items():
        train, held = split(y, 0.2, CLASSES, seed=0)
        for penalty in PENALTIES:
            for solver, solve in SOLVERS.items():
                start = time.process_time()
                weight, bias = solve(x[train], y[train], CLASSES, penalty)
                seconds = time.process_time() - start
                loss = F.cross_entropy(F.linear(x[train], weight, bias), y[train])
                objective = float(loss + penalty / 2 * weight.square().sum())
                hits = F.linear(x[held], weight, bias).argmax(1) == y[held]
                row = {"case": case, "penalty": penalty, "solver": solver, "cpu_seconds": round(seconds, 3)}
                rows.append(row | {"objective": objective, "accuracy": 100 * float(hits.float().mean())})
    return rows


def main() -> None:
    """Print the table and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", default="results/benchmark_logistic.json", help="where the JSON goes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        rows = measure()
    table = Table("features", "penalty", "solver", "CPU s", "objective", "accuracy, %")
    for r in rows:
        numbers = (f"{r['cpu_seconds']:.2f}", f"{r['objective']:.5f}", f"{r['accuracy']:.1f}")
        table.add_row(r["case"], f"{r['penalty']:g}", r["solver"], *numbers)
    Console(width=100).print(table)
    path = Path(given.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": rows, "torch": torch.__version__}, indent=2) + "\n")


if __name__ == "__main__":
    main()
