"""Two gloo processes with unequal shares of the batch train every method as one process with the whole batch does."""

import copy
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from isd_ray.errors import UserError
from isd_ray.methods import METHODS, build_method, options_of
from isd_ray.models.frozen import Frozen
from isd_ray.queue.bank import Bank
from isd_ray.queue.distributed import DistributedQueue
from isd_ray.queue.exchange import all_gather
from isd_ray.train.batch_norm import shuffle, spread_batch_norm, to_global

sys.path.insert(0, str(Path(__file__).parent))  # spawned processes import this module by its name

SIZE, DIM, K, IMAGES = 6, 5, 14, 20
SHARES = [(5, 3), (2, 6), (7, 1)]  # rows of both ranks, step by step: the queue wraps
SMALLER = {"prototypes": 5, "freeze": 1, "queue_start": 1, "negatives": 8, "positives": 4, "weight_start": 1}
STEPS = [slice(sum(map(sum, SHARES[:i])), sum(map(sum, SHARES[: i + 1]))) for i in range(len(SHARES))]


class Flat(nn.Module):
    """A backbone with batch norm for rows [b, SIZE] and for images."""

    arch, stem_kind = "flat", "none"

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.dim = dim
        self.body = nn.Sequential(nn.LazyLinear(dim), nn.BatchNorm1d(dim), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(F.adaptive_avg_pool2d(x, 2).flatten(1) if x.ndim == 4 else x)


def build(name: str, group, **options) -> nn.Module:
    """A method in float64; group None: of all processes, with one batch norm for them."""
    torch.manual_seed(0)
    backbone, teacher = Flat(), Flat(DIM)
    for network in (backbone, teacher):
        network(batches(name)[0][0, :3].float())  # gives the lazy layer its width
    if "teacher" in options_of(name):
        options |= {"teacher": Frozen(teacher)}
    widths = [8] if "teacher" not in options else [8, DIM]
    memory: DistributedQueue | Bank | None = None
    if METHODS[name].uses_queue:
        dim = METHODS[name].embedding_dim(*widths)
        memory = DistributedQueue(K, dim, "sharded", group, dtype=torch.float64)
    if METHODS[name].uses_bank:
        dim = METHODS[name].embedding_dim(*widths)
        memory = Bank(IMAGES, dim, METHODS[name].bank_ids, group=group, dtype=torch.float64)
        memory.written.fill_(True)  # so that every image has a cluster
    if group is None and "gather" in options_of(name):
        options |= {"gather": all_gather}
    options |= {option: value for option, value in SMALLER.items() if option in options_of(name)}
    method = build_method(name, backbone, memory, **options).double().train()
    return method if group is not None else spread_batch_norm(method, "sync", torch.device("cpu"))


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
    check_batch_norm(rank)
    check_shuffle(rank)
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


def check_batch_norm(rank: int) -> None:
    """Outputs, gradients and running statistics are those of one batch norm over all rows."""
    for shape, counts in (((4, 5), (3, 1)), ((6, 5, 2, 3), (2, 4))):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3 + 7
        plain = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(5).double()
        plain.weight.data.copy_(torch.arange(1, 6))  # the same on both ranks
        ours = to_global(nn.Sequential(copy.deepcopy(plain)))[0]
        whole, part = x.clone().requires_grad_(), x.split(counts)[rank].clone().requires_grad_()
        expected, out = plain(whole), ours(part)
        torch.testing.assert_close(out, expected.split(counts)[rank])
        expected.pow(3).sum().backward()
        out.pow(3).sum().backward()
        torch.testing.assert_close(part.grad, whole.grad.split(counts)[rank])
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value)
        ours.eval()
        torch.testing.assert_close(ours(part), plain.eval()(part))


def check_shuffle(rank: int) -> None:
    """Each image gets its own embedding back, but was in a batch with images of the other rank."""
    x, counts = torch.arange(12.0).view(6, 2), (4, 2)
    torch.manual_seed(5 + rank)
    own = x.split(counts)[rank]
    assert torch.equal(shuffle(nn.Identity(), own), own)
    seen = []
    shuffle(lambda images: seen.append(images) or images, own)
    assert len(seen[0]) == counts[rank]
    mixed = all_gather(seen[0])
    assert not torch.equal(mixed, x)
    assert torch.equal(mixed.sort(dim=0).values, x)
    method = spread_batch_norm(build("moco_v2", None), "shuffle", torch.device("cpu"))
    assert method.teacher.shuffle is shuffle


def test_shuffling_needs_a_teacher():
    simclr = build_method("simclr", Flat())
    with pytest.raises(UserError, match="no moving teacher"):
        spread_batch_norm(simclr, "shuffle", torch.device("cpu"))


def test_two_processes_equal_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run, (port,), nprocs=2)


def test_one_process_gathers_its_own_rows():
    rows = torch.randn(3, 2, requires_grad=True)
    assert all_gather(rows) is rows
