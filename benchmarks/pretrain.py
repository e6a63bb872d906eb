"""What the machinery costs: images/s of the whole training loop against the bare one, in one run, as a ratio.

    python -m benchmarks.pretrain

Bare: views, teacher, student forward and backward and the optimiser on uint8 tensors in memory, in one process.
Whole: the same steps through reading tasks, Ray Train, progress, metrics and checkpoints, between the first and the
last line of metrics.jsonl, with the images kept in memory (`--caches memory`) and streamed from shards every epoch
(`none`). All take turns on the same cores with the same number of torch threads; the best turn of each counts, since
other load on a machine only ever slows a turn down. Start-up is reported apart.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from isd_ray.config import Config, resolve

CASES = {
    "resnet20": {"model.backbone": "resnet20", "train.batch_size": 128, "train.epochs": 3},
    "resnet18": {
        "model.backbone": "resnet18",
        "train.batch_size": 64,
        "train.epochs": 1,
        "data.ratio": 1000.0,
    },
}
COMMON = {
    "data.dataset": "embedded_lt",
    "data.image_size": 32,
    "model.stem": "auto",
    "evaluate.enabled": False,
    "queue.size": 256,
    "train.log_every": 2,
    "train.checkpoint_seconds": 10.0,
}


def bare(config: Config, seconds: float, answer: Any) -> None:
    """Train on tensors in memory for about `seconds`; puts images/s into `answer`."""
    from isd_ray.data.augment import make_views
    from isd_ray.data.stream import Batch
    from isd_ray.train.state import build_state

    torch.set_num_threads(config.train.threads)
    b, data = config.train.batch_size, config.data
    state = build_state(config, torch.device("cpu"), images=4 * b)
    state.method.train()
    images = torch.randint(0, 256, (4 * b, 1, 3, data.image_size, data.image_size), dtype=torch.uint8)
    index, done, start = torch.arange(4 * b), 0, 0.0
    while done < 2 or time.perf_counter() - start < seconds:
        rows = torch.arange(done * b, (done + 1) * b) % (4 * b)
        batch = Batch(images[rows], index[rows], torch.full((b,), -1), rows, epoch=0, seed=0)
        views = make_views(
            batch, config.method.views, data.image_size, data.mean, data.std, torch.device("cpu")
        )
        views = [view.contiguous(memory_format=torch.channels_last) for view in views]
        state.method.update_teacher(config.method.momentum)
        state.method(views, batch.index, batch.label).loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        done += 1
        if done == 1:  # the first step allocates
            start = time.perf_counter()
    answer.put((done - 1) * b / (time.perf_counter() - start))


def whole(config: Config, _: float, answer: Any) -> None:
    """Run the job; puts images/s of its loop and the seconds that it spent outside of the loop into `answer`."""
    from isd_ray.train.trainer import pretrain

    start = time.perf_counter()
    result = pretrain(config)
    total = time.perf_counter() - start
    lines = [json.loads(line) for line in Path(result["folder"], "metrics.jsonl").read_text().splitlines()]
    steps, seconds = lines[-1]["step"] - lines[0]["step"], lines[-1]["time"] - lines[0]["time"]
    answer.put((steps * config.train.batch_size / seconds, total - seconds))


def in_process(function: Any, config: Config, seconds: float = 0.0) -> Any:
    """Run one turn in a fresh process and return its answer."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=function, args=(config, seconds, answer))
    process.start()
    value = answer.get()
    process.join()
    return value


def measure(name: str, caches: list[str], turns: int, workers: int, threads: int) -> list[dict[str, Any]]:
    """Take turns between the bare loop and the whole one with each cache, for one backbone."""
    options = COMMON | CASES[name] | {"train.workers": workers, "train.threads": threads}
    rates: dict[str, list[float]] = {kind: [] for kind in ("bare", *caches)}
    outside: dict[str, list[float]] = {cache: [] for cache in caches}
    for turn in range(turns):
        with tempfile.TemporaryDirectory() as folder:
            rates["bare"].append(in_process(bare, resolve(options | {"output": folder}), 15.0))
            for cache in caches:
                given = {"output": folder, "name": f"{cache}-{turn}", "data.cache": cache}
                rate, seconds = in_process(whole, resolve(options | given))
                rates[cache].append(rate)
                outside[cache].append(seconds)
    best = {kind: max(values) for kind, values in rates.items()}
    return [
        {
            "backbone": name,
            "cache": cache,
            "bare": round(best["bare"], 1),
            "whole": round(best[cache], 1),
            "ratio": round(best[cache] / best["bare"], 3),
            "outside_the_loop_seconds": round(min(outside[cache]), 1),
            "turns": {kind: [round(v, 1) for v in rates[kind]] for kind in ("bare", cache)},
        }
        for cache in caches
    ]


def main() -> None:
    """Measure every backbone, print one table and write one JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbones", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--caches", nargs="+", choices=["memory", "none"], default=["memory", "none"])
    parser.add_argument("--turns", type=int, default=3, help="turns of bare and whole loop each")
    parser.add_argument(
        "--workers", type=int, default=1, help="Ray Train workers of the whole loop; 0: in process"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads of both loops")
    parser.add_argument("--json", default="results/benchmark_pretrain.json", help="where the JSON goes")
    given = parser.parse_args()
    rows = []
    for name in given.backbones:
        rows += measure(name, given.caches, given.turns, given.workers, given.threads)
    print("| backbone | cache | bare, images/s | whole, images/s | ratio | outside the loop, s |")
    print("|---|---|---:|---:|---:|---:|")
    for row in rows:
        cells = [row[k] for k in ("backbone", "cache", "bare", "whole", "ratio", "outside_the_loop_seconds")]
        print("| " + " | ".join(map(str, cells)) + " |")
    path = Path(given.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    setting = {"workers": given.workers, "threads": given.threads, "torch": torch.__version__}
    path.write_text(json.dumps({"rows": rows} | setting, indent=2) + "\n")


if __name__ == "__main__":
    main()
