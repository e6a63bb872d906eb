"""Losses over a queue of anchors, each a formula over `lse`, `read` and `topk` instead of a B x K matrix.

q [B, D] is the student's and k [B, D] the teacher's embedding, both of unit length; a_j are the anchors of
the queue. Every loss returns one value a row, [B], to be averaged by the caller; gradients flow into q alone
and are known in the forward pass. `exclude` int64 [B] (the rows' own sample index) leaves out anchors of the
same image. A row for which no anchor takes part has loss 0 and gradient 0.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from isd_ray.queue.distributed import DistributedQueue


def similarity_kl(
    queue: DistributedQueue,
    q: Tensor,
    k: Tensor,
    temperature_student: float,
    temperature_teacher: float,
    exclude: Tensor | None = None,
) -> Tensor:
    """ISD (Tejankar et al. 2021): KL(softmax(k.A / t_teacher) || softmax(q.A / t_student)), [B].

    = k.read(k)/t_teacher - lse(k) - q.read(k)/t_student + lse(q); its gradient is (read(q) - read(k)) /
    t_student.
    """
    k = k.detach()
    lse_q, read_k, lse_k, _ = _look_up(queue, q, k, temperature_student, temperature_teacher, exclude)
    return lse_q - lse_k + _dot(k / temperature_teacher - q / temperature_student, read_k)


def similarity_ce(
    queue: DistributedQueue,
    q: Tensor,
    k: Tensor,
    temperature_student: float,
    temperature_teacher: float,
    exclude: Tensor | None = None,
) -> Tensor:
    """ReSSL (Zheng et al. 2021): -sum_j softmax(k.A / t_teacher)_j log softmax(q.A / t_student)_j, [B].

    = lse(q) - q.read(k)/t_student: the KL of ISD plus the teacher's entropy, with the same gradient.
    """
    lse_q, read_k, _, _ = _look_up(queue, q, k, temperature_student, temperature_teacher, exclude)
    return lse_q - _dot(q, read_k) / temperature_student


def info_nce(
    queue: DistributedQueue, q: Tensor, k: Tensor, temperature: float, exclude: Tensor | None = None
) -> Tensor:
    """MoCo (He et al. 2020): -log of the softmax of q.k / t among q.k / t and q.A / t, [B]."""
    positive = _dot(q, k.detach()) / temperature
    return torch.logaddexp(positive, queue.lse(q, temperature, exclude)) - positive


def sce(
    queue: DistributedQueue,
    q: Tensor,
    k: Tensor,
    temperature: float,
    temperature_teacher: float,
    weight: float,
    exclude: Tensor | None = None,
) -> Tensor:
    """SCE (Denize et al. 2023): cross-entropy of p = softmax over [q.k ; q.A] / t with a target of two parts,
    [B].

    The target is `weight` on the positive and 1 - weight on the anchors, dealt out by softmax(k.A /
    t_teacher).
    """
    k = k.detach()
    lse_q, read_k, _, found = _look_up(queue, q, k, temperature, temperature_teacher, exclude)
    positive = _dot(q, k) / temperature
    target = weight * positive + (1 - weight) * _dot(q, read_k) / temperature
    return torch.where(found, torch.logaddexp(positive, lse_q) - target, 0)


def seed(
    queue: DistributedQueue,
    q: Tensor,
    k: Tensor,
    temperature_student: float,
    temperature_teacher: float,
    exclude: Tensor | None = None,
) -> Tensor:
    """SEED (Fang et al. 2021): cross-entropy of softmax over [q.k ; q.A] / t_student with that over [1 ; k.A] /
    t_teacher, [B].

    The teacher gives the image itself the weight w = sigmoid(1 / t_teacher - lse(k)) and deals out 1 - w among
    the anchors.
    """
    k = k.detach()
    lse_q, read_k, lse_k, found = _look_up(queue, q, k, temperature_student, temperature_teacher, exclude)
    weight = torch.sigmoid(1 / temperature_teacher - lse_k)
    positive = _dot(q, k) / temperature_student
    target = weight * positive + (1 - weight) * _dot(q, read_k) / temperature_student
    return torch.where(found, torch.logaddexp(positive, lse_q) - target, 0)


def co2(
    queue: DistributedQueue, q: Tensor, k: Tensor, temperature: float, exclude: Tensor | None = None
) -> Tensor:
    """CO2's consistency term (Wei et al. 2021): (KL(P || Q) + KL(Q || P)) / 2 of P = softmax(q.A / t), Q of
    k, [B].

    = (q - k).(read(q) - read(k)) / 2t. The positive takes no part.
    """
    return _CO2.apply(queue, q, k.detach(), temperature, exclude)


def mean_shift(
    queue: DistributedQueue, q: Tensor, k: Tensor, n: int, exclude: Tensor | None = None
) -> Tensor:
    """Mean shift (Koohpayegani et al. 2021): mean of |q - a_j|^2 over the n anchors nearest to k, [B].

    The paper enqueues k first, so that it is its own nearest anchor; then `exclude` must be left out.
    """
    similarity, key, _, _ = queue.topk(k, n, exclude)
    found = similarity > -torch.inf
    distance = (q[:, None] - key.to(q.dtype)).square().sum(dim=2)
    return torch.where(found, distance, 0).sum(dim=1) / found.sum(dim=1).clamp_min(1)


@torch.no_grad()
def queue_diagnostics(
    queue: DistributedQueue,
    k: Tensor,
    temperature: float,
    index: Tensor | None = None,
    label: Tensor | None = None,
    exclude: Tensor | None = None,
    nearest: int = 5,
) -> dict[str, Tensor]:
    """Return how the teacher k [B, D] spreads its mass over the queue, as means over this rank's rows.

    teacher_entropy: of softmax(k.A / t), divided by log(anchors), 0 ... 1. teacher_top1: mass of the nearest
    anchor. own_mass: mass on anchors of the row's own image if none were excluded (needs index). purity:
    share of the `nearest` anchors that carry the row's label (needs label; ISD's training log). `exclude` as
    in the loss that is watched. Collective like a lookup, at the cost of two or three of them; an empty queue
    has no diagnostics: {}.
    """
    ((read, lse),) = queue.attend([k], [temperature], exclude)
    similarity, _, _, neighbour = queue.topk(k, nearest, exclude)
    found = similarity[:, 0] > -torch.inf
    if queue.fill == 0:
        return {}
    lse = lse.masked_fill(~found, 0)
    entropy = (lse - _dot(k, read) / temperature) / math.log(max(queue.fill, 2))
    top = torch.where(found, torch.exp(similarity[:, 0] / temperature - lse), 0)
    out = {"teacher_entropy": entropy.mean(), "teacher_top1": top.mean()}
    if index is not None:
        everything, others = queue.read(k, temperature)[1], queue.read(k, temperature, exclude=index)[1]
        out["own_mass"] = (-torch.expm1(others - everything)).clamp_min(0).mean() + 0.0  # no "-0"
    if label is not None:
        present = similarity > -torch.inf
        same = (neighbour == label.to(neighbour.device)[:, None]) & (neighbour >= 0) & present
        out["purity"] = same.sum() / present.sum().clamp_min(1)
    return out


class _StudentTeacher(torch.autograd.Function):
    """lse(q) with its gradient, and read(k), lse(k) without one, from one pass over the anchors."""

    @staticmethod
    def forward(ctx, queue, q, k, t_student, t_teacher, exclude):
        (read_q, lse_q), (read_k, lse_k) = queue.attend([q, k], [t_student, t_teacher], exclude)
        ctx.save_for_backward((read_q / t_student).to(q.dtype))
        ctx.mark_non_differentiable(read_k, lse_k)
        return lse_q, read_k, lse_k

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        (slope,) = ctx.saved_tensors
        return None, grad[:, None].to(slope.dtype) * slope, None, None, None, None


class _CO2(torch.autograd.Function):
    """CO2's term with its gradient; with v = q - k and p = softmax(q.A / t) that is

    ((read(q) - read(k)) / t + (sum_j p_j (a_j.v) a_j - (read(q).v) read(q)) / t^2) / 2.
    """

    @staticmethod
    def forward(ctx, queue, q, k, temperature, exclude):
        v = (q - k).to(queue.compute_dtype)
        (both_q, _), (both_k, _) = queue.attend([q, k], [temperature, temperature], exclude, along=v)
        (read_q, moment_q), (read_k, _) = both_q.chunk(2, dim=1), both_k.chunk(2, dim=1)
        spread = moment_q - _dot(read_q, v)[:, None] * read_q
        slope = ((read_q - read_k) / temperature + spread / temperature**2) / 2
        ctx.save_for_backward(slope.to(q.dtype))
        return _dot(v, read_q - read_k) / (2 * temperature)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return None, grad[:, None].to(slope.dtype) * slope, None, None, None


def _look_up(
    queue: DistributedQueue, q: Tensor, k: Tensor, t_q: float, t_k: float, exclude: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return lse(q) (differentiable), read(k), lse(k), all 0 for a row without anchors, and whether it has any."""
    lse_q, read_k, lse_k = _StudentTeacher.apply(queue, q, k, t_q, t_k, exclude)
    found = lse_k > -torch.inf
    return lse_q.masked_fill(~found, 0), read_k, lse_k.masked_fill(~found, 0), found


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise inner product, [B]."""
    return (a * b).sum(dim=1)
