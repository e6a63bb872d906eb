"""What one rank of the distributed queue tests does; every check compares with a single process that saw everything."""

import os
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import normalize

from isd_ray.errors import UserError
from isd_ray.queue import DistributedQueue, losses

DIM, SIZE = 8, 60
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
LAYOUTS = ("replicated", "sharded")


def run(rank: int, port: int, folder: str) -> None:
    """Run every check on one of four processes, in groups of 4, 1, 2 and 3 of them, then of 4 again."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    alone = [dist.new_group([r]) for r in range(4)][rank]
    groups = {world: dist.new_group(list(range(world))) for world in (1, 2, 3, 4)}
    for world in (4, 1, 2, 3):
        if rank < world:
            check_all(groups[world], alone, folder)
        dist.barrier()
    check_states(groups[4], alone, folder)
    dist.destroy_process_group()


def check_all(group, alone, folder: str) -> None:
    """Every check of one group; `alone` is the group of this process only."""
    for layout in LAYOUTS:
        for dtype in TOLERANCE:
            check_equals_single_process(layout, dtype, group, alone)
        check_gradient_through_the_merge(layout, group)
        check_nonfinite_keys_are_refused(layout, group)
    check_unevenness_is_held_exactly(group, alone)
    check_states(group, alone, folder)
    save_state(group, folder)


class Steps:
    """The global batches of 30 steps, dealt unevenly: own(step) is this rank's part."""

    def __init__(self, group, dtype: torch.dtype, steps: int = 30) -> None:
        world, self.rank = dist.get_world_size(group), dist.get_rank(group)
        generator = torch.Generator().manual_seed(world)
        self.counts = torch.randint(0, 9, (steps, world), generator=generator)
        self.counts[steps // 2, -1] = SIZE + 7  # more than the queue holds
        self.counts[3] = 0
        self.batches = []
        for rows in self.counts.sum(1).tolist():
            q, k = (normalize(torch.randn(2, rows, DIM, generator=generator, dtype=torch.float64), dim=2)).to(
                dtype
            )
            index = torch.randint(0, 45, (rows,), generator=generator)
            self.batches.append((q, k, index, index % 5))

    def own(self, step: int) -> slice:
        ends = [0, *self.counts[step].cumsum(0).tolist()]
        return [slice(a, b) for a, b in pairwise(ends)][self.rank]


def loss_and_gradient(queue, q, k, index, rows: int):
    """The loss of an ISD step as this part of a global batch of `rows` rows adds to it, and its gradient."""
    q = q.clone().requires_grad_()
    exclude = index if queue.steps % 3 else None
    loss = losses.similarity_kl(queue, q, k, 0.2, 0.1, exclude).sum() / max(rows, 1)
    loss = loss + losses.info_nce(queue, q, k, 0.2, exclude).sum() / max(rows, 1)
    if queue.steps % 5 == 0:
        loss = loss + losses.co2(queue, q, k, 0.2, exclude).sum() / max(rows, 1)
    loss.backward()
    return loss.detach(), q.grad


def check_equals_single_process(layout: str, dtype: torch.dtype, group, alone) -> None:
    """30 steps: loss, gradient, content, age and search as in one process that saw the whole batches."""
    steps, tolerance = Steps(group, dtype), TOLERANCE[dtype]
    queue = DistributedQueue(SIZE, DIM, layout, group, dtype=dtype)
    single = DistributedQueue(SIZE, DIM, group=alone, dtype=dtype)
    for step, (q, k, index, label) in enumerate(steps.batches):
        own = steps.own(step)
        loss, gradient = loss_and_gradient(queue, q[own], k[own], index[own], len(q))
        dist.all_reduce(loss, group=group)
        expected, whole = loss_and_gradient(single, q, k, index, len(q))
        torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(gradient, whole[own], rtol=tolerance, atol=tolerance)
        if step % 5 == 2:
            found, wanted = queue.topk(k[own], 4, index[own]), single.topk(k[own], 4, index[own])
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
        queue.enqueue(k[own], index[own], label[own])
        single.enqueue(k, index, label)
        if step % 4 == 0:  # in between, batches wait for their numbers
            assert_same_state(queue.state_dict(), single.state_dict())
            assert queue.fill == single.fill
    assert_same_state(queue.state_dict(), single.state_dict())


def check_unevenness_is_held_exactly(group, alone) -> None:
    """Many enqueues without a lookup, all of them on the last rank: nothing is lost, nothing stays too long."""
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    queue = DistributedQueue(SIZE, DIM, "sharded", group)
    single = DistributedQueue(SIZE, DIM, group=alone)
    for step in range(25):
        keys = torch.full((7, DIM), float(step))
        queue.enqueue(keys if last else keys[:0])
        single.enqueue(keys)
    assert_same_state(queue.state_dict(), single.state_dict())


def check_gradient_through_the_merge(layout: str, group) -> None:
    """gradcheck in float64: all ranks perturb their own rows in step, none feels another's."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    queue = DistributedQueue(SIZE, DIM, layout, group, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    keys = normalize(torch.randn(SIZE + 5, DIM, generator=generator, dtype=torch.float64), dim=1)[rank::world]
    queue.enqueue(keys, torch.arange(len(keys)))
    q, k = normalize(torch.randn(4, 2, 2, DIM, generator=generator, dtype=torch.float64), dim=3)[rank]
    q.requires_grad_()
    own = torch.tensor([3, 11])
    assert torch.autograd.gradcheck(lambda q: queue.lse(q, 0.3, own), q, fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda q: losses.similarity_kl(queue, q, k, 0.3, 0.1, own), q, fast_mode=True
    )


def check_nonfinite_keys_are_refused(layout: str, group) -> None:
    """The culprit is named; in the replicated layout by every rank."""
    queue = DistributedQueue(SIZE, DIM, layout, group)
    culprit = dist.get_world_size(group) - 1
    keys = torch.ones(3, DIM)
    if dist.get_rank(group) == culprit:
        keys[1, 1] = float("nan")
    elif layout == "sharded":
        return
    with pytest.raises(UserError, match=rf"\(step 0, rank {culprit}\)"):
        queue.enqueue(keys)


def check_states(group, alone, folder: str) -> None:
    """Load what other numbers of ranks saved in the middle of a wrap, also into another size, and go on."""
    generator = torch.Generator().manual_seed(1)
    batch = (
        normalize(torch.randn(20, DIM, generator=generator), dim=1),
        torch.arange(20),
        torch.arange(20) % 3,
    )
    for name in sorted(os.listdir(folder)):
        state = torch.load(os.path.join(folder, name), weights_only=True)
        for layout, size in ((LAYOUTS[0], SIZE), (LAYOUTS[1], SIZE), (LAYOUTS[1], 33), (LAYOUTS[1], 90)):
            queue = DistributedQueue(size, DIM, layout, group)
            single = DistributedQueue(size, DIM, group=alone)
            queue.load_state_dict(state)
            single.load_state_dict(state)
            assert_same_state(queue.state_dict(), single.state_dict())
            go_on_alike(queue, single, batch, group)
    dist.barrier(group)


def save_state(group, folder: str) -> None:
    """Save a queue whose anchors have wrapped around; the global batches are the same for every group."""
    queue = DistributedQueue(SIZE, DIM, "sharded", group)
    generator = torch.Generator().manual_seed(7)
    for rows in (20, 30, 27):
        keys = normalize(torch.randn(rows, DIM, generator=generator), dim=1)
        part = torch.arange(rows).tensor_split(dist.get_world_size(group))[dist.get_rank(group)]
        queue.enqueue(keys[part], part, part % 3)
    state = queue.state_dict()
    if dist.get_rank(group) == 0:
        torch.save(state, os.path.join(folder, f"saved_by_{dist.get_world_size(group)}.pt"))


def go_on_alike(queue, single, batch, group) -> None:
    """One more step after loading: the next loss and the content after it."""
    k, index, label = batch
    part = torch.arange(20).tensor_split(dist.get_world_size(group))[dist.get_rank(group)]
    loss, _ = loss_and_gradient(queue, k[part], k[part].flip(1), index[part], 20)
    dist.all_reduce(loss, group=group)
    expected, _ = loss_and_gradient(single, k, k.flip(1), index, 20)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    queue.enqueue(k[part], index[part], label[part])
    single.enqueue(k, index, label)
    assert_same_state(queue.state_dict(), single.state_dict())


def assert_same_state(a, b) -> None:
    """Equal to the last bit, whatever the layout."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
