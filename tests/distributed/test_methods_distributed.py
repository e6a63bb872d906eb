"""Two gloo processes with unequal shares of the batch train every method as one process with the whole batch does."""

import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from isd_ray.methods import METHODS, build_method, options_of
from isd_ray.models.frozen import Frozen
from isd_ray.models.prototypes import Prototypes
from isd_ray.models.teacher import Teacher
from isd_ray.queue.distributed import DistributedQueue
from isd_ray.queue.exchange import all_gather

sys.path.insert(0, str(Path(__file__).parent))  # spawned processes import this module by its name

SIZE, DIM, K = 6, 5, 14
SHARES = [(5, 3), (2, 6), (7, 1)]  # rows of both ranks, step by step: the queue wraps
STEPS = [slice(sum(map(sum, SHARES[:i])), sum(map(sum, SHARES[: i + 1]))) for i in range(len(SHARES))]


class Flat(nn.Module):
    """A backbone without batch norm: its statistics would differ from those of the whole batch."""

    dim, arch, stem = 8, "flat", "own"

    def __init__(self, dim: int = dim) -> None:
        super().__init__()
        self.dim = dim
        self.body = nn.Sequential(nn.Linear(SIZE, self.dim), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def build(name: str, group) -> nn.Module:
    """A method in float64 with smooth heads in place of its own; group None: of all processes."""
    torch.manual_seed(0)
    queue = None
    if METHODS[name].uses_queue:
        dim = 2 * DIM if name in ("swav", "compress_2q") else DIM
        queue = DistributedQueue(K, dim, "sharded", group, dtype=torch.float64)
    distributed = {"gather": all_gather} if group is None and "gather" in options_of(name) else {}
    if "prototypes" in options_of(name):
        distributed |= {"prototypes": DIM, "freeze": 1}
    if name == "swav":
        distributed |= {"queue_start": 1}
    if "teacher" in options_of(name):
        distributed |= {"teacher": Frozen(Flat(DIM))}
    method = build_method(name, Flat(), queue, **distributed)
    method.student = nn.Sequential(method.student.backbone, nn.Linear(Flat.dim, DIM))
    if hasattr(method, "predictor"):
        method.predictor = nn.Sequential(nn.Tanh(), nn.Linear(DIM, DIM))
    if name == "swav":
        method.assign = Prototypes(DIM, DIM, "step", frozen=1)
    for ema in ("teacher", "average"):
        if isinstance(getattr(method, ema, None), Teacher):
            setattr(method, ema, Teacher(method.student))
    return method.double().train()


def batches(name: str) -> tuple[Tensor, Tensor]:
    """Two views [2, N, SIZE] and the index [N] of the images of all steps; some images come again."""
    rows = STEPS[-1].stop
    views = torch.randn(
        2, rows, SIZE, generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64
    )
    return views, torch.arange(rows) % 20


def step(model: nn.Module, method, optimizer, views, index, scale: float) -> Tensor:
    """What the training loop does; returns this process's share of the loss over the global batch."""
    method.update_teacher(0.9)
    loss = model(list(views), index).loss
    optimizer.zero_grad()
    (loss * scale).backward()
    return loss.detach()


def check(name: str, alone) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    method, single = build(name, None), build(name, alone)
    model = DistributedDataParallel(method, broadcast_buffers=False)
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1) for m in (method, single)
    ]
    views, index = batches(name)
    for rows, shares in zip(STEPS, SHARES, strict=True):
        start = rows.start + sum(shares[:rank])
        own = slice(start, start + shares[rank])
        share = shares[rank] / sum(shares)
        loss = share * step(model, method, optimizers[0], views[:, own], index[own], share * world)
        dist.all_reduce(loss)
        expected = step(single, single, optimizers[1], views[:, rows], index[rows], 1.0)
        where = f"{name}, rows {rows}"
        assert (loss - expected).abs() < 1e-9, where
        gradients = [p.grad for p in single.parameters() if p.requires_grad]
        assert max(g.abs().max() for g in gradients) > 1e-4 or rows.start == 0, where
        for own_grad, grad in zip(
            (p.grad for p in method.parameters() if p.requires_grad), gradients, strict=True
        ):
            assert (own_grad - grad).abs().max() < 1e-9, where
        for optimizer in optimizers:
            optimizer.step()
    if METHODS[name].uses_queue:
        ours, theirs = method.queue.state_dict(), single.queue.state_dict()
        assert torch.equal(ours["index"], theirs["index"]), name
        torch.testing.assert_close(ours["keys"], theirs["keys"], atol=1e-9, rtol=0)


def run(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    alone = [dist.new_group([r]) for r in range(2)][rank]
    check_gather(rank)
    for name in METHODS:
        check(name, alone)
    dist.destroy_process_group()


def check_gather(rank: int) -> None:
    """Unequal, empty and integer rows; the gradient is the sum over the ranks."""
    for counts in ((3, 1), (0, 2), (2, 0)):
        whole = torch.randn(sum(counts), 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        part = whole.split(counts)[rank].clone().requires_grad_()
        every = all_gather(part)
        assert torch.equal(every, whole)
        (every.square().sum() * (rank + 1)).backward()
        torch.testing.assert_close(part.grad, 2 * part.detach() * 3)
        numbers = torch.arange(sum(counts))
        assert torch.equal(all_gather(numbers.split(counts)[rank]), numbers)


def test_two_processes_equal_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run, (port,), nprocs=2)


def test_one_process_gathers_its_own_rows():
    rows = torch.randn(3, 2, requires_grad=True)
    assert all_gather(rows) is rows
