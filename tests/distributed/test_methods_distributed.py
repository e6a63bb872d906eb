"""Two gloo processes with unequal shares of the batch train every method as one process with the whole batch does."""

import socket
import sys
from collections import OrderedDict
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
from isd_ray.queue.bank import Bank
from isd_ray.queue.distributed import DistributedQueue
from isd_ray.queue.exchange import all_gather

sys.path.insert(0, str(Path(__file__).parent))  # spawned processes import this module by its name

SIZE, DIM, K, IMAGES = 6, 5, 14, 20
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


class Puzzle(nn.Sequential):
    """A student for images [b, 3, S, S] of any side."""

    def __init__(self) -> None:
        backbone = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, DIM), nn.Tanh())
        super().__init__(OrderedDict(backbone=backbone))


def build(name: str, group, **options) -> nn.Module:
    """A method in float64 with smooth heads in place of its own; group None: of all processes."""
    torch.manual_seed(0)
    memory: DistributedQueue | Bank | None = None
    dim = 2 * DIM if name in ("swav", "deepcluster_v2", "compress_2q") else DIM
    if METHODS[name].uses_queue:
        memory = DistributedQueue(K, dim, "sharded", group, dtype=torch.float64)
    if METHODS[name].uses_bank:
        memory = Bank(IMAGES, dim, METHODS[name].bank_ids, group=group, dtype=torch.float64)
        memory.written.fill_(True)  # so that every image has a cluster
    options |= {"gather": all_gather} if group is None and "gather" in options_of(name) else {}
    smaller = {
        "prototypes": DIM,
        "freeze": 1,
        "queue_start": 1,
        "negatives": 8,
        "positives": 4,
        "weight_start": 1,
    }
    options |= {option: value for option, value in smaller.items() if option in options_of(name)}
    if "teacher" in options_of(name):
        options |= {"teacher": Frozen(Flat(DIM))}
    method = build_method(name, Flat(), memory, **options)
    method.student = nn.Sequential(method.student.backbone, nn.Linear(Flat.dim, DIM))
    if hasattr(method, "predictor"):
        method.predictor = nn.Sequential(nn.Tanh(), nn.Linear(DIM, DIM))
    if name == "swav":
        method.assign = Prototypes(DIM, DIM, "step", frozen=1)
    if name == "pirl":
        method.student, method.piece, method.puzzle = Puzzle(), nn.Identity(), nn.Linear(9 * DIM, DIM)
    for ema in ("teacher", "average"):
        if isinstance(getattr(method, ema, None), Teacher):
            setattr(method, ema, Teacher(method.student))
    return method.double().train()


def batches(name: str) -> tuple[Tensor, Tensor]:
    """The method's views [V, N, SIZE] and the index [N] of the images of all steps; some images come again."""
    count, rows = len(METHODS[name].defaults["method.views"]), STEPS[-1].stop
    side = (3, 6, 6) if name == "pirl" else (SIZE,)
    generator = torch.Generator().manual_seed(len(name))
    views = torch.randn(count, rows, *side, generator=generator, dtype=torch.float64)
    return views, torch.arange(rows) % IMAGES


def step(model: nn.Module, method, optimizer, views, index, scale: float) -> Tensor:
    """What the training loop does; returns this process's share of the loss over the global batch."""
    method.update_teacher(0.9)
    method.begin_epoch(1)
    loss = model(list(views), index).loss
    optimizer.zero_grad()
    (loss * scale).backward()
    return loss.detach()


def check(name: str, alone, **options) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    method, single = build(name, None, **options), build(name, alone, **options)
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
    if METHODS[name].uses_bank:
        ours, theirs = method.bank.state_dict(), single.bank.state_dict()
        for column in theirs:
            torch.testing.assert_close(
                ours[column], theirs[column], atol=1e-9, rtol=0, msg=f"{name} {column}"
            )


def run(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    alone = [dist.new_group([r]) for r in range(2)][rank]
    check_gather(rank)
    check_bank(alone)
    for name in METHODS:
        check(name, alone)
    check("fnc", alone, false_negatives="eliminate")
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


def check_bank(alone) -> None:
    """Unequal and empty shares; a state saved by two ranks is that of one, and is dealt out again."""
    rank = dist.get_rank()
    for counts in ((3, 1), (0, 4), (4, 0)):
        ours, single = (Bank(9, DIM, 2, 5, group, torch.float64) for group in (None, alone))
        assert torch.equal(ours.draw(7), single.draw(7))
        assert torch.equal(ours.shared(torch.arange(9)), single.keys)
        index = torch.tensor([8, 1, 4, 5])
        z = torch.randn(4, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        ids = torch.arange(8).view(4, 2)
        ours.write(*(x.split(counts)[rank] for x in (index, z, ids)))
        single.write(index, z, ids)
        for name, column in single.state_dict().items():
            assert torch.equal(ours.state_dict()[name], column)
        mine = index.split(counts)[rank]
        assert torch.equal(ours.read(mine), single.read(mine))
        assert torch.equal(ours.read_ids(mine), single.read_ids(mine))
        part, floor = z.split(counts)[rank], torch.zeros(counts[rank], dtype=torch.float64)
        for least in (None, floor):
            torch.testing.assert_close(ours.lse(part, 0.3, mine, least), single.lse(part, 0.3, mine, least))
        for found, expected in zip(ours.nearest(part, 9, mine), single.nearest(part, 9, mine), strict=True):
            torch.testing.assert_close(found, expected)
        again = Bank(9, DIM, 2, 6, dtype=torch.float64)
        again.load_state_dict(single.state_dict())
        assert torch.equal(again.keys, ours.keys)


def test_two_processes_equal_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run, (port,), nprocs=2)


def test_one_process_gathers_its_own_rows():
    rows = torch.randn(3, 2, requires_grad=True)
    assert all_gather(rows) is rows
