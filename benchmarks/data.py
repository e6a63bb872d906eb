"""How fast images reach the training process: ours against Ray Data's own way, webdataset and torch's DataLoader.

    python -m benchmarks.data            # --quick: fewer images, one turn

Three cases: CIFAR-10 (32 px) and Imagenette (224 px) decoded to uint8 batches, and photographs of 320 px and more
(Imagewoof) with two `strong` views of 224 px. Every contestant runs in a process of its own, in turns on the same
cores. First batch: seconds from the first request until the batch is there, with Ray running and its workers cold.
Images/s: of whole epochs after the first, their start included; the best turn counts, since other load on a machine
only ever slows a turn down. Memory: peak of the resident memory of the process and all its children (pages that
processes share count once for each). The decoder's row is ours alone, one thread, bytes in memory, times the cores;
"decoding alone" are the stream's tasks on every core, with their reading, but without handing pixels on.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from benchmarks.data_contestants import CONTESTANTS, Case, contestants
from isd_ray.data import index
from isd_ray.data.decode import decode
from isd_ray.data.shards import make_shards
from isd_ray.errors import UserError

REAL_DATA = Path(os.environ.get("ISD_RAY_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
MEMORY, STREAMED, DECODING = "ours, in memory", "ours, streamed", "ours, decoding alone"

PEERS = ("read_webdataset + map_batches", "webdataset + DataLoader", "DataLoader over files")

# name: source, images a shard, copies of the set (so that an epoch lasts seconds), batch, size, views
SETS: dict[str, tuple[str, int, int, int, int, tuple[str, ...]]] = {
    "cifar10": ("cifar10_train_a.parquet", 1000, 1, 256, 32, ()),
    "imagenette": ("imagenette224_part_train.parquet", 250, 4, 64, 224, ()),
    "photographs": ("imagewoof320_mini_train.parquet", 25, 10, 32, 224, ("strong", "strong")),
}
FORMS = (".3f", ".1f", ".1f")  # CPU ms, first batch, memory
QUICK = {"cifar10": ("cifar10_test.parquet", 1), "imagenette": (None, 2), "photographs": (None, 4)}


def prepare(name: str, folder: Path, quick: bool) -> Case:
    """Write shards, index and files of one set under `folder`."""
    source, shard_size, copies, batch, size, views = SETS[name]
    if quick:
        source, copies = QUICK[name][0] or source, QUICK[name][1]
    path = REAL_DATA / source
    if not path.is_file():
        raise UserError(f"no real images at {path}; set ISD_RAY_TEST_DATA to their folder")
    table = make_shards(str(path), str(folder), shard_size=shard_size, workers=0)  # no Ray here
    shards = sorted((folder / "train").glob("*.tar"))
    tables, names = [table], table.column("shard").to_pylist()
    for copy in range(1, copies):
        for shard in shards:
            shutil.copy(shard, shard.with_name(f"copy{copy}-{shard.name}"))
        column = pa.array([f"copy{copy}-{shard}" for shard in names])
        tables.append(table.set_column(table.schema.get_field_index("shard"), "shard", column))
    tables = [t.cast(table.schema) for t in tables]
    index.write_index(pa.concat_tables(tables), str(folder / "train"))
    (folder / "files").mkdir()
    for shard in sorted((folder / "train").glob("*.tar")):
        unpack(shard, folder / "files")
    return Case(name, str(folder), batch, size, views)


def unpack(shard: Path, folder: Path) -> None:
    """Write the images of a shard as files."""
    with tarfile.open(shard) as tar:
        for i, member in enumerate(tar):
            content = tar.extractfile(member)
            if content and member.name.endswith((".jpg", ".webp", ".png")):
                (folder / f"{shard.stem}-{i}{Path(member.name).suffix}").write_bytes(content.read())


def turn(name: str, case: Case, epochs: int, answer: Any) -> None:
    """One contestant's turn, in a process of its own: puts seconds to the first batch and images/s by epoch."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))  # as the training loop on a CPU
    start_epoch = CONTESTANTS[name](case)
    start, first, rates, used = time.perf_counter(), 0.0, [], []
    for number in range(epochs):
        begun, busy, images, total = time.perf_counter(), tree_seconds(os.getpid()), 0, 0.0
        for batch in start_epoch(number):
            first = first or time.perf_counter() - start
            x = batch[0] if case.views else batch
            images, total = (
                images + len(x),
                total + float(x[-1, -1, -1, -1]),
            )  # the last pixel is really there
        rates.append(images / (time.perf_counter() - begun))
        used.append(1000 * (tree_seconds(os.getpid()) - busy) / images)
    answer.put({"first_batch_seconds": first, "rates": rates, "cpu_ms": used, "images": images})


def in_process(name: str, case: Case, epochs: int) -> dict[str, Any]:
    """Run one turn in a fresh process; adds the peak memory of its process tree."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=turn, args=(name, case, epochs, answer))
    process.start()
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.25):
            peak[0] = max(peak[0], tree_memory(process.pid or 0))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        while True:
            try:
                result = answer.get(timeout=5)
                break
            except Exception:  # queue.Empty: is it still alive?
                if not process.is_alive():
                    raise UserError(
                        f"{name} on {case.name} ended without an answer; its error is above"
                    ) from None
    finally:
        done.set()
        watcher.join()
        process.join()
    return result | {"peak_bytes": peak[0]}


def process_tree(root: int) -> dict[int, list[str]]:
    """Return the fields of /proc/PID/stat from the state on, for a process and all its descendants (Linux)."""
    fields: dict[int, list[str]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields[int(entry.name)] = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it has ended
    family, grew = {root}, True
    while grew:
        more = {pid for pid, field in fields.items() if int(field[1]) in family} - family
        family, grew = family | more, bool(more)
    return {pid: fields[pid] for pid in family if pid in fields}


def tree_memory(root: int) -> int:
    """Return the resident bytes of a process and its descendants, each by itself."""
    return sum(int(field[21]) for field in process_tree(root).values()) * os.sysconf("SC_PAGE_SIZE")


def tree_seconds(root: int) -> float:
    """Return the processor seconds that a process and its descendants, also those that ended, have used."""
    ticks = sum(int(t) for field in process_tree(root).values() for t in field[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def decoder_rate(case: Case, images: int = 500) -> float:
    """Return images/s of the decoder alone on one thread, from bytes in memory to an array; the best of three."""
    paths = sorted(Path(case.folder, "files").iterdir())[:images]
    data, best = [path.read_bytes() for path in paths], 0.0
    for _ in range(3):
        start = time.perf_counter()
        for content in data:
            decode(content)
        best = max(best, len(data) / (time.perf_counter() - start))
    return best


def measure(case: Case, turns: int, epochs: int, chosen: list[str]) -> list[dict[str, Any]]:
    """Let the chosen contestants take turns on one case; one row each, and one of the decoder."""
    names = [name for name in contestants(case) if name in chosen]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    decoder = []
    for _ in range(turns):
        decoder.append(decoder_rate(case))
        for name in names:
            result = in_process(name, case, epochs)
            found[name].append(result)
            print(f"{case.name}, {name}: {result['rates'][-1]:,.0f} images/s", file=sys.stderr, flush=True)
    rows: list[dict[str, Any]] = []
    for name, results in found.items():
        rows.append(
            {
                "case": case.name,
                "contestant": name,
                "images_per_second": max(rate for r in results for rate in r["rates"][1:]),
                "first_batch_seconds": statistics.median(r["first_batch_seconds"] for r in results),
                "cpu_ms_per_image": min(ms for r in results for ms in r["cpu_ms"][1:]),
                "peak_gib": max(r["peak_bytes"] for r in results) / 2**30,
                "turns": results,
            }
        )
    cores = os.cpu_count() or 1
    rows.append(
        {"case": case.name, "contestant": "decoder alone x cores", "images_per_second": max(decoder) * cores}
    )
    return rows


def verdicts(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return, for each case, ours against each of the others as ratios of images/s."""
    found: dict[str, dict[str, float]] = {}
    for case in dict.fromkeys(row["case"] for row in rows):
        rate = {row["contestant"]: row["images_per_second"] for row in rows if row["case"] == case}
        found[case] = {}
        if DECODING in rate:
            found[case]["decoding alone / decoder x cores"] = rate[DECODING] / rate["decoder alone x cores"]
        if not rate.keys() >= {STREAMED, *PEERS}:
            continue
        loader = max(rate["webdataset + DataLoader"], rate["DataLoader over files"])
        found[case] |= {
            "ours / read_webdataset": rate[STREAMED] / rate["read_webdataset + map_batches"],
            "ours / best DataLoader": rate[STREAMED] / loader,
        }
        used = {
            row["contestant"]: row["cpu_ms_per_image"]
            for row in rows
            if row["case"] == case and "turns" in row
        }
        best = min(used["webdataset + DataLoader"], used["DataLoader over files"])
        found[case]["CPU an image: ours / best DataLoader"] = used[STREAMED] / best
        if MEMORY in rate:
            found[case]["in memory / best DataLoader"] = rate[MEMORY] / loader
    return found


def print_tables(rows: list[dict[str, Any]], ratios: dict[str, dict[str, float]]) -> None:
    """Print the figures of all contestants, then the ratios."""
    print(
        "| case | contestant | images/s | CPU ms an image | first batch, s | peak memory, GiB |\n"
        "|---|---|---:|---:|---:|---:|"
    )
    for row in rows:
        cells = [row.get(name) for name in ("cpu_ms_per_image", "first_batch_seconds", "peak_gib")]
        print(
            f"| {row['case']} | {row['contestant']} | {row['images_per_second']:,.0f} | "
            + " | ".join(
                "" if cell is None else f"{cell:{form}}" for cell, form in zip(cells, FORMS, strict=True)
            )
            + " |"
        )
    print("\n| case | ratio | value |\n|---|---|---:|")
    for case, values in ratios.items():
        for name, value in values.items():
            print(f"| {case} | {name} | {value:.2f} |")


def main() -> None:
    """Measure every case, print the tables and write one JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--turns", type=int, help="turns of every contestant (2; quick: 1)")
    parser.add_argument("--epochs", type=int, default=2, help="epochs a turn; all but the first count")
    parser.add_argument("--quick", action="store_true", help="fewer images, one turn")
    parser.add_argument("--json", default="results/benchmark_data.json", help="where the JSON goes")
    given = parser.parse_args()
    if given.epochs < 2:
        raise SystemExit(f"--epochs {given.epochs}: the first epoch does not count; use at least 2")
    rows: list[dict[str, Any]] = []
    for name in given.cases:
        with tempfile.TemporaryDirectory() as folder:
            case = prepare(name, Path(folder), given.quick)
            rows += measure(case, given.turns or (1 if given.quick else 2), given.epochs, given.contestants)
            write(Path(given.json), rows, given.quick)
    print_tables(rows, verdicts(rows))


def write(path: Path, rows: list[dict[str, Any]], quick: bool) -> None:
    """Write what is measured so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    setting = {"cores": os.cpu_count(), "torch": torch.__version__, "quick": quick}
    path.write_text(json.dumps({"rows": rows, "ratios": verdicts(rows)} | setting, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
