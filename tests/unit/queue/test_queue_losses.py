"""The losses: printed values in float64, gradients, and behaviour where no anchor takes part."""

from functools import partial

import pytest
import torch
from torch.nn.functional import normalize

from isd_ray.queue import DistributedQueue, losses

Q = normalize(torch.tensor([[1, 0.2, 0], [0.1, 1, 0.3]], dtype=torch.float64), dim=1)
K = normalize(torch.tensor([[0.8, 0.6, 0.1], [0.2, 0.9, -0.4]], dtype=torch.float64), dim=1)
A = normalize(
    torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [-1, 0.5, 0.2]], dtype=torch.float64), dim=1
)

LOSSES = {
    "isd": (partial(losses.similarity_kl, temperature_student=0.2, temperature_teacher=0.2), 0.230644),
    "isd_plus": (partial(losses.similarity_kl, temperature_student=0.1, temperature_teacher=0.05), 0.778555),
    "ressl": (partial(losses.similarity_ce, temperature_student=0.1, temperature_teacher=0.04), 0.945876),
    "sce": (partial(losses.sce, temperature=0.1, temperature_teacher=0.07, weight=0.5), 1.499915),
    "moco": (partial(losses.info_nce, temperature=0.2), 1.382355),
    "co2": (partial(losses.co2, temperature=0.05), 1.598307),
}
EVERY = {name: loss for name, (loss, _) in LOSSES.items()} | {"mean_shift": partial(losses.mean_shift, n=2)}


def queue_of(anchors: torch.Tensor, index: torch.Tensor | None = None) -> DistributedQueue:
    queue = DistributedQueue(len(anchors), anchors.shape[1], dtype=anchors.dtype)
    queue.enqueue(anchors, index)
    return queue


@pytest.mark.parametrize("name", LOSSES)
def test_loss_equals_the_published_formula(name):
    loss, expected = LOSSES[name]
    assert round(loss(queue_of(A), Q, K).mean().item(), 6) == expected


def test_mean_shift_enqueues_first():
    queue = queue_of(torch.cat([A[2:], K]))  # K overwrote the two oldest anchors
    assert round(losses.mean_shift(queue, Q, K, n=2).mean().item(), 6) == 0.384844


@pytest.mark.parametrize("name", EVERY)
def test_gradient_is_that_of_the_value(name):
    queue = queue_of(A, index=torch.arange(5))
    exclude = torch.tensor([3, 7])
    q = Q.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda q: EVERY[name](queue, q, K, exclude=exclude), q)


@pytest.mark.parametrize("name", EVERY)
def test_a_row_without_anchors_has_no_loss_and_no_gradient(name):
    empty = DistributedQueue(4, 3, dtype=torch.float64)
    own_only = queue_of(A[:2], index=torch.tensor([7, 7]))
    for queue, exclude, rows in ((empty, None, [0, 1]), (own_only, torch.tensor([7, 8]), [0])):
        q = Q.clone().requires_grad_()
        loss = EVERY[name](queue, q, K, exclude=exclude)
        loss.sum().backward()
        assert loss[rows].tolist() == [0.0] * len(rows)
        assert q.grad[rows].abs().max() == 0
        assert torch.isfinite(loss).all()
        assert torch.isfinite(q.grad).all()


def test_kl_is_zero_where_student_and_teacher_agree():
    q = K.clone().requires_grad_()
    loss = losses.similarity_kl(queue_of(A), q, K, 0.1, 0.1)
    loss.sum().backward()
    assert loss.abs().max() < 1e-13
    assert q.grad.abs().max() < 1e-13


def test_isd_and_ressl_differ_by_the_teachers_entropy_alone():
    grads, values = [], []
    for loss in (losses.similarity_kl, losses.similarity_ce):
        q = Q.clone().requires_grad_()
        value = loss(queue_of(A), q, K, 0.1, 0.05)
        value.sum().backward()
        grads.append(q.grad)
        values.append(value.detach())
    p = (K @ A.T / 0.05).softmax(1)
    torch.testing.assert_close(values[1] - values[0], -(p * p.log()).sum(1), rtol=0, atol=1e-13)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-13)


def test_diagnostics_describe_the_teachers_distribution():
    index, label = torch.tensor([0, 3, 9, 9, 1]), torch.tensor([0, 1, 0, 1, -1])
    queue = DistributedQueue(5, 3, dtype=torch.float64)
    queue.enqueue(A, index, label)
    found = losses.queue_diagnostics(queue, K, 0.1, torch.tensor([9, 1]), torch.tensor([0, 1]), nearest=2)
    p = (K @ A.T / 0.1).softmax(1)
    near = label[(K @ A.T).topk(2, dim=1).indices]
    expected = {
        "teacher_entropy": -(p * p.log()).sum(1).mean() / torch.log(torch.tensor(5.0, dtype=torch.float64)),
        "teacher_top1": p.amax(1).mean(),
        "own_mass": (p[0, 2] + p[0, 3] + p[1, 4]) / 2,
        "purity": (near == torch.tensor([[0], [1]])).double().mean(),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), abs=1e-7), name


def test_diagnostics_of_an_empty_queue_are_none():
    assert losses.queue_diagnostics(DistributedQueue(5, 3), torch.rand(2, 3), 0.1) == {}


def test_own_mass_is_one_where_the_queue_holds_nothing_else():
    queue = queue_of(A[:2], index=torch.tensor([7, 7]))
    assert losses.queue_diagnostics(queue, K, 0.1, index=torch.tensor([7, 7]))["own_mass"] == 1


def test_mixed_precision_does_not_reach_the_scores():
    queue = queue_of(A.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = losses.similarity_kl(queue, Q.float(), K.float(), 0.1, 0.05)
    torch.testing.assert_close(inside, losses.similarity_kl(queue, Q.float(), K.float(), 0.1, 0.05))


def test_a_half_precision_query_gets_a_half_precision_gradient():
    q = Q.bfloat16().requires_grad_()
    losses.similarity_kl(queue_of(A.float()), q, K, 0.1, 0.05).sum().backward()
    assert q.grad.dtype == torch.bfloat16
    assert torch.isfinite(q.grad).all()
