"""The collectives of queue and methods: rows of several tensors travel as bytes in one call, whatever their types.

Ranks may hold different numbers of rows; they are padded to the largest. Every function is called by all
ranks of the group in the same order.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def all_gather(rows: Tensor) -> Tensor:
    """The rows [n, ...] of all ranks, in rank order and differentiable; `rows` itself where there is one rank.

    The gradient of `rows` is the sum, over the ranks, of the gradients of these rows in each rank's loss. With
    losses S_r this is the gradient of their sum; DDP then takes the mean over the W ranks, so that training
    descends (sum_r S_r) / W. The loop scales each rank's mean over b_r of B rows to S_r = (b_r W / B) mean_r,
    hence that is the mean over the global batch, and no factor is needed here.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    return _AllGather.apply(rows)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        counts = [n for (n,) in gather_numbers([len(rows)], rows.device, None)]
        ctx.start, ctx.rows = sum(counts[: dist.get_rank()]), len(rows)
        return gather_rows([rows], counts, None)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[ctx.start : ctx.start + ctx.rows]


def all_reduce(x: Tensor) -> Tensor:
    """The sum of x over all ranks, differentiable as `all_gather` is; `x` itself where there is one rank."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    return _AllReduce.apply(x)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


def gather_numbers(
    numbers: list[int], device: torch.device, group: dist.ProcessGroup | None
) -> list[list[int]]:
    """All-gather a list of integers, equally long on every rank; one list a rank comes back."""
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    out = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(out, mine, group=group)
    return [row.tolist() for row in out]


def gather_rows(parts: list[Tensor], counts: list[int], group: dist.ProcessGroup | None) -> list[Tensor]:
    """All-gather the rows of `parts` (each [n, ...]) in rank order; `counts[r]` is the n of rank r."""
    mine = _pack(parts)
    padded = mine.new_zeros(max(counts), mine.shape[1])
    padded[: len(mine)] = mine
    out = [torch.empty_like(padded) for _ in counts]
    if padded.numel():
        dist.all_gather(out, padded, group=group)
    return _unpack(torch.cat([rows[:n] for rows, n in zip(out, counts, strict=True)]), parts)


def broadcast_rows(
    parts: list[Tensor], rows: int, owner: int, group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Return the owner's `parts`, which have `rows` rows, on every rank."""
    packed = _pack(parts)
    if dist.get_rank(group) != owner:
        packed = packed.new_empty(rows, packed.shape[1])
    dist.broadcast(packed, group_src=owner, group=group)
    return _unpack(packed, parts)


def return_rows(parts: list[Tensor], counts: list[int], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Send rows back to their owners: `parts` hold [sum(counts), ...] rows in rank order, computed on this
    rank.

    Each tensor that comes back is [W, own n, ...]: what every rank computed for this rank's rows.
    """
    packed = _pack(parts)
    own = counts[dist.get_rank(group)]
    received = packed.new_empty(len(counts) * own, packed.shape[1])
    dist.all_to_all_single(received, packed, [own] * len(counts), counts, group=group)
    return [part.unflatten(0, (len(counts), own)) for part in _unpack(received, parts)]


def _pack(parts: list[Tensor]) -> Tensor:
    """Lay rows side by side as bytes: uint8 [n, bytes of a row]."""
    flat = [part.detach().reshape(len(part), _width(part)).contiguous() for part in parts]
    return torch.cat([part.view(torch.uint8) for part in flat], dim=1)


def _unpack(packed: Tensor, like: list[Tensor]) -> list[Tensor]:
    out, a = [], 0
    for part in like:
        rows = part.new_empty(len(packed), _width(part))
        b = a + _width(part) * part.element_size()
        if a < b:
            rows.view(torch.uint8).copy_(packed[:, a:b])
        out.append(rows.reshape(len(packed), *part.shape[1:]))
        a = b
    return out


def _width(part: Tensor) -> int:
    """Numbers in one row."""
    return part.shape[1:].numel()
