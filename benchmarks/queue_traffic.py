"""Bytes that one rank sends in a step of the queue: counted at the collectives of a gloo group, and predicted."""

import json
import socket
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from isd_ray.queue import DistributedQueue, losses


def predicted_bytes(world: int, b: int, dim: int, layout: str) -> int:
    """The formula: float32, b rows on every rank, one lookup of q and k with their sample index, one enqueue of k.

    replicated: (W-1) (8 + b (4D + 16))              the row count; key, index and label of every row
    sharded:    (W-1) (16 + b (8D + 8) + b (8D + 8))  two row counts; q, k and index out; two reads and lse back
    """
    if layout == "replicated":
        return (world - 1) * (8 + b * (4 * dim + 16))
    return (world - 1) * (16 + 2 * b * (8 * dim + 8))


def measured_bytes(world: int, b: int, dim: int) -> dict[str, int]:
    """Return the bytes that rank 0 of `world` gloo processes sends in one step, for both layouts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, port, b, dim, folder), nprocs=world)
        return json.loads((Path(folder) / "bytes.json").read_text())


def _rank(rank: int, world: int, port: int, b: int, dim: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    counted = {}
    for layout in ("replicated", "sharded"):
        queue = DistributedQueue(8 * b * world, dim, layout)
        q, k, index = torch.rand(b, dim).requires_grad_(), torch.rand(b, dim), torch.arange(b)
        _step(queue, q, k, index)  # the second step is counted: like all later ones it has a batch to number
        with _Counter() as counter:
            _step(queue, q, k, index)
        counted[layout] = counter.sent
    if rank == 0:
        (Path(folder) / "bytes.json").write_text(json.dumps(counted))
    dist.destroy_process_group()


def _step(queue: DistributedQueue, q: Tensor, k: Tensor, index: Tensor) -> None:
    losses.similarity_kl(queue, q, k, 0.1, 0.05, exclude=index).mean().backward()
    queue.enqueue(k, index)


class _Counter:
    """Counts what this rank hands to other ranks in the collectives that the queue uses."""

    NAMES = ("all_gather", "all_to_all_single", "broadcast", "all_reduce")

    def __enter__(self) -> "_Counter":
        self.sent, self.original = 0, {name: getattr(dist, name) for name in self.NAMES}
        dist.all_gather = self._all_gather
        dist.all_to_all_single = self._all_to_all_single
        dist.broadcast = dist.all_reduce = self._unexpected
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self.original.items():
            setattr(dist, name, function)

    def _all_gather(self, out: list[Tensor], mine: Tensor, **options: object) -> None:
        self.sent += mine.nbytes * (len(out) - 1)
        self.original["all_gather"](out, mine, **options)

    def _all_to_all_single(
        self, out: Tensor, mine: Tensor, out_rows: list[int], rows: list[int], **options: object
    ) -> None:
        self.sent += mine.nbytes * (sum(rows) - rows[dist.get_rank()]) // sum(rows)
        self.original["all_to_all_single"](out, mine, out_rows, rows, **options)

    def _unexpected(self, *_: object, **__: object) -> None:
        raise AssertionError("the formula knows no such collective")
