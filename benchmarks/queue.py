"""What does it cost to read a queue of K anchors without its B x K matrix?

Compares forward and backward of the ISD loss, as published code computes it (two B x K matrices, softmax, KL,
autograd), with `isd_ray.queue.losses.similarity_kl`: time, peak extra memory and error of the gradient against
float64. Then counts the bytes that both layouts send. Prints one table each and writes one JSON.

    python -m benchmarks.queue                   # one CPU thread, about 7 minutes
    python -m benchmarks.queue --quick           # small queues, under a minute
    python -m benchmarks.queue --full            # every anchor of every cell; hours at D = 512
    python -m benchmarks.queue --device cuda --dtype bfloat16 --batches 256 1024 4096 --dims 128 256 512

On a GPU the plain formula also runs under `torch.compile` (`--compiled` asks for it on a CPU too), and ours is compared
with the card's own rate of bfloat16 matrix products.
"""

import argparse
import ctypes
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, normalize, softmax

from benchmarks.queue_traffic import measured_bytes, predicted_bytes
from isd_ray.queue import DistributedQueue, losses

T_STUDENT, T_TEACHER = 0.1, 0.05
PLAIN_MATRICES = 7  # B x K matrices alive at the peak of the plain formula, for judging whether it fits
CPU_RATE = 5e10  # multiplications and additions a second of one thread, for judging how long a cell takes


def plain(q: Tensor, k: Tensor, anchors: Tensor) -> Tensor:
    """The gradient of the ISD loss as published code computes it: clone the queue, hold B x K matrices."""
    q = q.clone().requires_grad_()
    queue = anchors.clone().to(q.dtype)
    student, teacher = q @ queue.T / T_STUDENT, k @ queue.T / T_TEACHER
    kl_div(log_softmax(student, dim=1), softmax(teacher, dim=1), reduction="batchmean").backward()
    assert q.grad is not None
    return q.grad


def compiled_plain() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The plain formula, its forward and backward fused by `torch.compile`, anchors in their stored type."""

    def loss(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
        student, teacher = (x.to(queue.dtype) @ queue.T for x in (q, k))
        teacher = softmax(teacher.float() / T_TEACHER, dim=1)
        return kl_div(log_softmax(student.float() / T_STUDENT, dim=1), teacher, reduction="batchmean")

    fused = torch.compile(loss)

    def run(q: Tensor, k: Tensor, anchors: Tensor) -> Tensor:
        q = q.clone().requires_grad_()
        fused(q, k, anchors).backward()
        assert q.grad is not None
        return q.grad

    return run


def matrix_rate(device: str) -> float:
    """Floating-point operations a second of the device's library product of 8,192 x 8,192 bfloat16 matrices."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        begin = clock(device)
        torch.mm(a, b)
        best = min(best, clock(device) - begin)
    return 2 * 8192**3 / best


def ours(q: Tensor, k: Tensor, queue: DistributedQueue) -> Tensor:
    """The same gradient from one pass over the anchors."""
    q = q.clone().requires_grad_()
    losses.similarity_kl(queue, q, k, T_STUDENT, T_TEACHER).mean().backward()
    assert q.grad is not None
    return q.grad


def measure(b: int, size: int, dim: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    generator = torch.Generator().manual_seed(0)
    q, k = (normalize(torch.randn(b, dim, generator=generator), dim=1).to(options.device) for _ in range(2))
    fits = b * size * 4 * PLAIN_MATRICES <= options.memory * 2**30
    part = timed_anchors(b, size, dim, options)
    queue = filled_queue(part, dim, options, generator)
    cell: dict[str, Any] = {"B": b, "K": size, "D": dim, "plain_fits": fits, "timed_anchors": part}
    runs = {"ours": lambda: ours(q, k, queue)}
    if fits:
        runs["plain"] = lambda: plain(q, k, anchors_of(queue))
    if fits and options.compiled:
        fused = compiled_plain()
        fused(q, k, anchors_of(queue))  # compiles: not timed
        runs["compiled"] = lambda: fused(q, k, anchors_of(queue))
    seconds = best_seconds(runs, options)
    cell |= {f"{name}_seconds": value * size / part for name, value in seconds.items()}
    # Two queries a row, each multiplied with the anchors for its scores and again for its read.
    cell["ours_rate"] = 8 * b * size * dim / cell["ours_seconds"]
    cell |= errors(q, k, queue, fits)
    if fits and part < size:  # memory is measured on all anchors wherever it can be compared
        queue = filled_queue(size, dim, options, generator)
    cell |= {f"{name}_bytes": peak_bytes(run, options.device) for name, run in runs.items()}
    return cell | {"memory_anchors": queue.fill}


def filled_queue(
    size: int, dim: int, options: argparse.Namespace, generator: torch.Generator
) -> DistributedQueue:
    queue = DistributedQueue(size, dim, dtype=getattr(torch, options.dtype), device=options.device)
    for rows in torch.empty(size).split(1 << 16):
        queue.enqueue(normalize(torch.randn(len(rows), dim, generator=generator), dim=1))
    return queue


def anchors_of(queue: DistributedQueue) -> Tensor:
    """The stored anchors as one tensor, without a copy."""
    ((keys, _, _),) = queue._ring.segments()
    return keys


def timed_anchors(b: int, size: int, dim: int, options: argparse.Namespace) -> int:
    """Anchors to time a cell on: all, unless that takes too long. Both formulas cost the same for every anchor."""
    if options.full or options.device != "cpu":
        return size
    while 8 * b * size * dim / CPU_RATE > options.seconds and size > 16384:
        size //= 4
    return size


def best_seconds(runs: dict[str, Callable[[], Tensor]], options: argparse.Namespace) -> dict[str, float]:
    """Least time of each, in turns, so that what else the machine does meets both.

    On a CPU it is the time that the process spent computing, in its one thread: waiting for a core does not count.
    """
    best = dict.fromkeys(runs, float("inf"))
    spent, turns = 0.0, 0
    while turns < 2 or (spent < options.seconds and turns < 20):
        for name, run in runs.items():
            begin = clock(options.device)
            run()
            seconds = clock(options.device) - begin
            best[name] = min(best[name], seconds)
            spent += seconds
        turns += 1
        if spent > 2 * options.seconds:
            break
    return best


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(run: Callable[[], Tensor], device: str) -> int:
    """Memory that `run` takes at its peak beyond what was held before."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # hand memory that is kept for reuse back, so that using it again shows
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident memory (Linux)
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def errors(q: Tensor, k: Tensor, queue: DistributedQueue, fits: bool) -> dict[str, float]:
    """Largest error of the gradient of 4 rows, divided by the largest gradient, against float64."""
    q, k, anchors = q[:4], k[:4], anchors_of(queue)
    exact = plain(q.double(), k.double(), anchors)
    out = {"ours_error": ours(q, k, queue)}
    if fits:
        out["plain_error"] = plain(q, k, anchors)
    return {name: float((grad - exact).abs().max() / exact.abs().max()) for name, grad in out.items()}


def storage_errors() -> dict[str, float]:
    """Largest error of the gradient that storing anchors in a type costs: B 64, K 16,384, D 128, against float64."""
    generator = torch.Generator().manual_seed(0)
    q, k, anchors = (normalize(torch.randn(n, 128, generator=generator), dim=1) for n in (64, 64, 16384))
    exact, out = plain(q.double(), k.double(), anchors), {}
    for dtype in ("float32", "float16", "bfloat16"):
        queue = DistributedQueue(16384, 128, dtype=getattr(torch, dtype))
        queue.enqueue(anchors)
        out[dtype] = float((ours(q, k, queue) - exact).abs().max() / exact.abs().max())
    return out


def show(cells: list[dict[str, Any]], console: Console) -> None:
    """Print the comparison; ~ marks a time measured on fewer anchors and scaled, or a memory measured on fewer."""
    table = Table(title="ISD loss, forward and backward")
    for name in (
        "B",
        "K",
        "D",
        "plain s",
        "ours s",
        "ours/plain",
        "plain MiB",
        "ours MiB",
        "plain err",
        "ours err",
    ):
        table.add_column(name, justify="right")
    for c in cells:
        scaled, fewer = ("~" if c[name] < c["K"] else "" for name in ("timed_anchors", "memory_anchors"))
        ratio = f"{c['ours_seconds'] / c['plain_seconds']:.2f}" if c["plain_fits"] else "-"
        table.add_row(
            *(str(c[name]) for name in "BKD"),
            f"{scaled}{c['plain_seconds']:.3f}" if c["plain_fits"] else "does not fit",
            f"{scaled}{c['ours_seconds']:.3f}",
            ratio,
            *(f"{fewer}{c[n] / 2**20:.0f}" if n in c else "-" for n in ("plain_bytes", "ours_bytes")),
            *(f"{c[n]:.0e}" if n in c else "-" for n in ("plain_error", "ours_error")),
        )
    console.print(table)


def show_rates(cells: list[dict[str, Any]], rate: float | None, console: Console) -> None:
    """Print how ours stands against the plain formula under torch.compile and the device's matrix rate."""
    table = Table(title="ours against torch.compile and the device's bfloat16 matrix products")
    for name in ("B", "K", "D", "compiled s", "compiled / ours", "TFLOP/s", "of the matrix rate"):
        table.add_column(name, justify="right")
    for c in cells:
        seconds = c.get("compiled_seconds")
        table.add_row(
            *(str(c[name]) for name in "BKD"),
            f"{seconds:.4f}" if seconds else "-",
            f"{seconds / c['ours_seconds']:.2f}" if seconds else "-",
            f"{c['ours_rate'] / 1e12:.3f}",
            f"{c['ours_rate'] / rate:.0%}" if rate else "-",
        )
    console.print(table)


def show_traffic(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="bytes that a rank sends in one step (a lookup of q and k, an enqueue of k)")
    for name in ("W", "rows a rank", "D", "layout", "formula", "counted"):
        table.add_column(name, justify="right")
    for r in rows:
        table.add_row(*(str(r[n]) for n in ("W", "b", "D", "layout", "predicted")), str(r.get("counted", "")))
    console.print(table)


def traffic(quick: bool) -> list[dict[str, Any]]:
    """Counted bytes for groups of 2 and 4 processes, the formula for larger ones at a global batch of 4096."""
    rows = []
    for world in (2,) if quick else (2, 4):
        for layout, counted in measured_bytes(world, b=64, dim=128).items():
            predicted = predicted_bytes(world, 64, 128, layout)
            rows.append(
                {"W": world, "b": 64, "D": 128, "layout": layout, "predicted": predicted, "counted": counted}
            )
    for world in (8, 16, 32, 64, 128, 256):
        for layout in ("replicated", "sharded"):
            b = 4096 // world
            rows.append(
                {
                    "W": world,
                    "b": b,
                    "D": 128,
                    "layout": layout,
                    "predicted": predicted_bytes(world, b, 128, layout),
                }
            )
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[4**n for n in range(6, 12)], help="K, anchors"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 4096], help="B, rows of a batch")
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 512], help="D, numbers of an anchor")
    parser.add_argument("--dtype", default="float32", help="of the stored anchors")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--compiled", action="store_true", help="also the plain formula under torch.compile (GPU: always)"
    )
    parser.add_argument("--memory", type=float, default=8, help="GiB that the plain formula may take")
    parser.add_argument("--seconds", type=float, default=4, help="about so long each cell is timed")
    parser.add_argument("--quick", action="store_true", help="small queues only")
    parser.add_argument(
        "--full", action="store_true", help="time every cell on all its anchors, however long it takes"
    )
    parser.add_argument("--out", type=Path, default=Path("results/benchmark_queue.json"))
    options = parser.parse_args()
    options.compiled |= options.device != "cpu"
    if options.quick:
        options.sizes, options.batches, options.seconds = [4096, 65536], [256], 1
    return options


def main() -> None:
    options, console = arguments(), Console(width=120)
    torch.set_num_threads(1)
    began, cells = time.time(), []
    for dim in options.dims:
        for b in options.batches:
            for size in options.sizes:
                cells.append(measure(b, size, dim, options))
                console.print(f"B {b}, K {size}, D {dim}: done after {time.time() - began:.0f} s")
    sent = traffic(options.quick)
    stored = storage_errors()
    rate = matrix_rate(options.device) if options.device != "cpu" else None
    show(cells, console)
    if options.compiled:
        show_rates(cells, rate, console)
    console.print(
        "gradient error by stored type:", ", ".join(f"{name} {e:.0e}" for name, e in stored.items())
    )
    show_traffic(sent, console)
    device = (
        torch.cuda.get_device_name()
        if options.device != "cpu"
        else platform.processor() or platform.machine()
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "device": device,
        "threads": 1,
        "torch": torch.__version__,
        "dtype": options.dtype,
        "matrix_rate": rate,
    }
    options.out.write_text(
        json.dumps({"about": about, "loss": cells, "traffic": sent, "stored": stored}, indent=1)
    )
    console.print(f"{options.out}, {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
