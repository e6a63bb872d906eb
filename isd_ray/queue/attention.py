"""Reading the queue like attention: `(read, lse)` of many queries over many anchors without the B x K matrix.

For a query x (already divided by its temperature) and anchors a_j

    lse(x) = log sum_j exp(x.a_j)          read(x) = sum_j softmax_j(x.a_j) a_j = d lse / dx

One pass over slices of the anchors with an online softmax yields both (Milakov & Gimelshein 2018;
FlashAttention, Dao et al. 2022). Queries of different temperature go into the same pass, so teacher and
student load each anchor once.
"""

import importlib.util
from types import ModuleType

import torch
from torch import Tensor

Pairs = tuple[Tensor, Tensor] | None  # rows and slots that are excluded
EAGER = 1 << 20  # scores; so few fit into one slice: the plain formula needs no more memory
SLICE = 1 << 20  # scores held at a time by the chunked kernel on a CPU; 2^18 ... 2^22 differ by 3 %
GPU_SLICE = 1 << 26  # on a GPU few large products keep all processors busy


def attend(
    x: Tensor,
    keys: Tensor,
    own: Tensor | None = None,
    index: Tensor | None = None,
    along: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return read [M, D] and lse [M] of queries x [M, D] (divided by their temperature) over keys [K, D].

    own int64 [M] and index int64 [K]: an anchor whose index equals the query's own takes no part; -1 matches
    nothing. A query without any anchor left has read 0 and lse -inf. With along = v [M, D], read is [M, 2D]:
    behind it stands sum_j softmax_j(x.a_j) (v.a_j) a_j.
    """
    kernel = _triton(x, keys) if along is None else None
    if kernel is not None:
        return merge(*kernel.attend_splits(x, keys, own, index))
    pairs = excluded_pairs(own, index)
    with torch.autocast(x.device.type, enabled=False):
        if x.shape[0] * keys.shape[0] <= EAGER:
            return _eager(x, keys, pairs, along)
        return _chunked(x, keys, pairs, along)


def _triton(x: Tensor, keys: Tensor) -> ModuleType | None:
    """The GPU kernel, where it can take the job: bf16 or fp16 anchors on a GPU, and Triton is installed."""
    if not x.is_cuda or importlib.util.find_spec("triton") is None:
        return None
    from isd_ray.queue import triton_attention

    return triton_attention if triton_attention.supports(x, keys) else None


def merge(reads: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Join partial results over disjoint sets of anchors: reads [P, M, D], lses [P, M] -> read [M, D], lse
    [M].

    The weights are the softmax of the partial lse, as in split-K attention (Flash-Decoding, Dao et al. 2023).
    """
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - lse.clamp_min(torch.finfo(lse.dtype).min))  # -inf - -inf would be nan
    with torch.autocast(reads.device.type, enabled=False):
        return torch.einsum("pm,pmd->md", weights, reads), lse


def excluded_pairs(own: Tensor | None, index: Tensor | None) -> Pairs:
    """Return (rows, slots), sorted by slot, of the queries and anchors that share a sample; None where none
    do.

    Few anchors are excluded, so they are looked up once instead of comparing B x K indices.
    """
    if own is None or index is None:
        return None
    slots = torch.nonzero(torch.isin(index, own) & (index >= 0)).flatten()
    found, rows = torch.nonzero(index[slots, None] == own, as_tuple=True)
    return (rows, slots[found]) if len(rows) else None


def _eager(x: Tensor, keys: Tensor, pairs: Pairs, along: Tensor | None) -> tuple[Tensor, Tensor]:
    """Hold all scores [M, K]: the plain formula."""
    keys = keys.to(x.dtype)
    scores = x @ keys.T
    _mask(scores, pairs, 0)
    lse = torch.logsumexp(scores, dim=1)
    weights = scores.sub_(lse.clamp_min(torch.finfo(lse.dtype).min)[:, None]).exp_()
    read = weights @ keys
    if along is not None:
        read = torch.cat([read, weights.mul_(along @ keys.T) @ keys], dim=1)
    return read, lse


def _chunked(x: Tensor, keys: Tensor, pairs: Pairs, along: Tensor | None) -> tuple[Tensor, Tensor]:
    """Hold the scores of a slice of anchors; the sums so far are rescaled whenever a row's maximum grows.

    A fixed maximum (1/t for unit vectors) would save its search, 1 to 3 % of the time on a CPU, and underflow for
    t < 0.02: not worth it.
    """
    rows, dim = x.shape
    step = _slice(x)
    top = x.new_full((rows,), torch.finfo(x.dtype).min)
    total = x.new_zeros(rows)
    read = x.new_zeros(rows, dim if along is None else 2 * dim)
    buffer = x.new_empty(rows * min(step, len(keys)))
    for a in range(0, len(keys), step):
        part = keys[a : a + step].to(x.dtype)
        scores = buffer[: rows * len(part)].view(rows, len(part))
        torch.mm(x, part.T, out=scores)
        _mask(scores, pairs, a)
        new = torch.maximum(top, scores.amax(dim=1))
        decay = torch.exp(top - new)
        scores.sub_(new[:, None]).exp_()
        total.mul_(decay).add_(scores.sum(dim=1))
        read.mul_(decay[:, None])[:, :dim].addmm_(scores, part)
        if along is not None:
            read[:, dim:].addmm_(scores.mul_(along @ part.T), part)
        top = new
    empty = total == 0
    return read / total.masked_fill(empty, 1)[:, None], (total.log() + top).masked_fill(empty, -torch.inf)


def _slice(x: Tensor) -> int:
    """Anchors in a slice, for queries x [M, D]."""
    return max(256, (GPU_SLICE if x.is_cuda else SLICE) // max(len(x), 1))


def _mask(scores: Tensor, pairs: Pairs, first: int) -> None:
    """Set the excluded scores of the slice of anchors that begins at slot `first` to -inf, in place."""
    if pairs is None:
        return
    rows, slots = pairs
    a, b = torch.searchsorted(
        slots, torch.tensor([first, first + scores.shape[1]], device=slots.device)
    ).tolist()
    if a < b:
        scores[rows[a:b], slots[a:b] - first] = -torch.inf


def topk(
    x: Tensor, keys: Tensor, n: int, own: Tensor | None = None, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the n largest scores [M, n] of x [M, D] over keys [K, D] and their slots int64 [M, n].

    Excluded anchors (see `attend`) and missing ones have score -inf, and slot 0.
    """
    rows = x.shape[0]
    pairs = excluded_pairs(own, index)
    best = x.new_full((rows, n), -torch.inf)
    slot = torch.zeros(rows, n, dtype=torch.int64, device=x.device)
    step = _slice(x)
    for a in range(0, len(keys), step):
        part = keys[a : a + step].to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            scores = x @ part.T
        _mask(scores, pairs, a)
        value, place = scores.topk(min(n, len(part)), dim=1)
        best, chosen = torch.cat([best, value], 1).topk(n, dim=1)
        slot = torch.cat([slot, place + a], 1).gather(1, chosen)
    return best, slot.masked_fill(best == -torch.inf, 0)
