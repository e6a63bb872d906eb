"""What a sweep costs beside its trials: its time against that of the same runs one after another.

    python -m benchmarks.sweep                    # 4 trials of 12 epochs, a few minutes
    python -m benchmarks.sweep --trials 8 --epochs 16 --turns 2

Both run one run at a time with one torch thread, in a fresh process with a Ray of its own, from its start to its end,
in turns; the best turn of each counts, since other load on a machine only ever slows a turn down. No trial is stopped
and none is confirmed, so both train exactly the same runs. With --concurrent 2 the sweep runs two at once: then the
ratio says what that gains.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from isd_ray.sweep.space import Space


def space_of(options: argparse.Namespace, concurrent: int) -> Space:
    """Return a small space on the embedded set."""
    return Space(
        config={"data.dataset": "embedded_lt", "method.name": "isd_plus"},
        space={"method.temperature": {"loguniform": [0.05, 0.3]}, "train.lr": {"loguniform": [0.02, 0.2]}},
        goals=["student.knn20"],
        validation={"per_class": 50, "every": 4},
        budget={"trials": options.trials, "epochs": options.epochs},
        scheduler={"name": "none"},
        confirm={"best": 0, "seeds": 0},
        resources={"cpus": 1, "concurrent": concurrent},
    )


def run_sweep(folder: str, space: Space, seconds: Any) -> None:
    """One sweep; puts its wall time into `seconds`."""
    from isd_ray.sweep.run import sweep

    start = time.perf_counter()
    sweep(space, "sweep", folder)
    seconds.put(time.perf_counter() - start)


def run_alone(folder: str, _: Space, seconds: Any) -> None:
    """The runs of that sweep one after another, as jobs/pretrain.py does them; puts the wall time into `seconds`."""
    from isd_ray.config import validate
    from isd_ray.train.trainer import pretrain

    start = time.perf_counter()
    for path in sorted(Path(folder, "sweep/trials").glob("*/seed-0/config.yaml")):
        config = validate(yaml.safe_load(path.read_text()))
        config.output, config.name = f"{folder}/alone", path.parts[-3]
        pretrain(config)
    seconds.put(time.perf_counter() - start)


def in_process(function: Any, folder: str, space: Space) -> float:
    """Run one side in a fresh process and return its seconds."""
    context = multiprocessing.get_context("spawn")
    seconds = context.Queue()
    process = context.Process(target=function, args=(folder, space, seconds))
    process.start()
    while process.is_alive() and seconds.empty():
        time.sleep(0.1)
    if seconds.empty():
        raise SystemExit("a side ended without a result; its error stands above")
    value = float(seconds.get())
    process.join()
    return value


def same_results(folder: str) -> bool:
    """Tell whether both sides ended with the same accuracies: else they did not do the same work."""
    pairs = []
    for path in Path(folder, "sweep/trials").glob("*/seed-0/validation.jsonl"):
        other = Path(folder, "alone", path.parts[-3], "validation.jsonl")
        pairs.append([json.loads(p.read_text().splitlines()[-1])["student.knn20"] for p in (path, other)])
    return bool(pairs) and all(a == b for a, b in pairs)


def main() -> None:
    """Measure, print one table and write one JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--turns", type=int, default=1, help="turns of both sides")
    parser.add_argument("--concurrent", type=int, default=1, help="trials of the sweep at once")
    parser.add_argument("--json", default="results/benchmark_sweep.json", help="where the JSON goes")
    given = parser.parse_args()
    times: dict[str, list[float]] = {"sweep": [], "alone": []}
    for _ in range(given.turns):
        with tempfile.TemporaryDirectory() as folder:
            space = space_of(given, given.concurrent)
            times["sweep"].append(in_process(run_sweep, folder, space))
            times["alone"].append(in_process(run_alone, folder, space))
            if not same_results(folder):
                raise SystemExit("the two sides did not end with the same accuracies")
    sweep, alone = (min(times[side]) for side in ("sweep", "alone"))
    print(
        "| trials | epochs | at once | sweep, s | one after another, s | ratio |\n|---|---|---|---|---|---|"
    )
    print(
        f"| {given.trials} | {given.epochs} | {given.concurrent} | {sweep:.1f} | {alone:.1f} | {sweep / alone:.3f} |"
    )
    path = Path(given.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = vars(given) | {"torch": torch.__version__, "cores": os.cpu_count()}
    path.write_text(json.dumps({"seconds": times, "ratio": sweep / alone} | about, indent=2) + "\n")


if __name__ == "__main__":
    main()
