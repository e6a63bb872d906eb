"""Does the stream leak? Many epochs of a small set through Ray's tasks: memory, open files and speed of each.

    python -m benchmarks.soak

A set of 2,000 images (32 px) in ten shards is streamed from disk (cache none) 200 times: this process takes the
batches, Ray's read. After every epoch the anonymous memory, the open files and the CPU time of this process and of all
those of its Ray are read from /proc (Linux). An early and a late part of the run are compared by their medians; a leak
of a MiB an epoch would add 140 MiB. Speed stands in wall time and in CPU time, which other work disturbs less.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import ray
from PIL import Image

from isd_ray.data import index
from isd_ray.data.shards import make_shards
from isd_ray.data.stream import Stream

MIB = 2**20
COLUMNS = ("images_per_second", "images_per_cpu_second", "driver_mib", "ray_mib", "driver_files", "ray_files")


def make_set(folder: Path, images: int, side: int = 32) -> str:
    """Write noise as ten shards; return their folder."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(images):
        pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i:06d}.png")
    make_shards(str(folder / "images"), str(folder), shard_size=max(1, images // 10), workers=0)
    return str(folder / "train")


def descendants(process: int) -> list[int]:
    """Return the processes below `process`."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                after_name = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            parents.setdefault(int(after_name[1]), []).append(int(entry.name))
    found = [process]
    for one in found:  # grows on the way
        found += parents.get(one, [])
    return found[1:]


def usage(processes: list[int]) -> tuple[float, int, float]:
    """Return the anonymous memory in MiB, the number of open files and the CPU seconds of processes."""
    memory, files, ticks = 0.0, 0, 0
    for process in processes:
        try:
            status = Path(f"/proc/{process}/status").read_text()
            ticks += sum(
                map(int, Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13])
            )
            files += len(os.listdir(f"/proc/{process}/fd"))
        except OSError:  # it has ended
            continue
        memory += (
            sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1024
        )
    return memory, files, ticks / os.sysconf("SC_CLK_TCK")


def soak(folder: str, epochs: int, batch: int = 100) -> list[dict[str, float]]:
    """Stream the set `epochs` times; return what every epoch took."""
    table = index.read_index(folder)
    stream = Stream(table, seed=0, global_batch=batch, size=32, views=["weak"], cache="none")
    rows = []
    for epoch in range(epochs):
        start = time.perf_counter()
        images = sum(len(batch.index) for batch in stream.epoch(epoch))
        seconds = time.perf_counter() - start
        if images != stream.steps * batch:
            raise SystemExit(f"epoch {epoch} had {images} images: {stream.bad[:1]}")
        driver, others = usage([os.getpid()]), usage(descendants(os.getpid()))
        row = {"images": images, "images_per_second": images / seconds, "cpu_seconds": driver[2] + others[2]}
        row |= {
            "driver_mib": driver[0],
            "ray_mib": others[0],
            "driver_files": driver[1],
            "ray_files": others[1],
        }
        rows.append(row)
    return rows


def compare(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the medians of an early part (10 to 30 % of the epochs) and of the late part (the last 20 %)."""
    n = len(rows)
    parts = {"early": rows[n // 10 : 3 * n // 10], "late": rows[n - n // 5 :]}
    return {name: _summary(part) for name, part in parts.items()}


def _summary(part: list[dict[str, float]]) -> dict[str, float]:
    cpu = part[-1]["cpu_seconds"] - part[0]["cpu_seconds"]
    rate = {"images_per_cpu_second": sum(row["images"] for row in part[1:]) / cpu}
    medians = {
        column: statistics.median(row[column] for row in part) for column in COLUMNS if column not in rate
    }
    return {column: round((medians | rate)[column], 1) for column in COLUMNS}


def main() -> None:
    """Run the epochs, print one table and write one JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--json", default="results/benchmark_soak.json", help="where the JSON goes")
    given = parser.parse_args()
    if given.epochs < 10:
        parser.error("at least 10 epochs, so that both parts hold some")
    ray.init(
        "local", num_cpus=2, include_dashboard=False, object_store_memory=256 * MIB, logging_level="warning"
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = soak(make_set(Path(folder), given.images), given.epochs)
    seconds = round(time.perf_counter() - start)
    ray.shutdown()
    parts = compare(rows)
    print("| | early | late | late / early |\n|---|---:|---:|---:|")
    for column in COLUMNS:
        early, late = parts["early"][column], parts["late"][column]
        print(f"| {column.replace('_', ' ')} | {early:,} | {late:,} | {late / early:.3f} |")
    print(f"{given.epochs} epochs of {given.images} images, {seconds} s")
    path = Path(given.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    setting = {
        "epochs": given.epochs,
        "images": given.images,
        "seconds": seconds,
        "ray": ray.__version__,
    }
    path.write_text(json.dumps(setting | {"parts": parts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
