"""SwAV and DINO against float64 readings of their papers."""

import pytest
import torch
from plain_losses import plain_dino, plain_sinkhorn, plain_swav, unit
from torch import Tensor, nn

from isd_ray.methods import build_method
from isd_ray.methods.base import encoder
from isd_ray.methods.dino import DINO
from isd_ray.models.prototypes import Prototypes, sinkhorn
from isd_ray.queue.bank import Bank
from isd_ray.queue.distributed import DistributedQueue

B, D, P, K = 6, 5, 7, 9


class Backbone(nn.Module):
    dim = 8

    def forward(self, x: Tensor) -> Tensor:
        return x


def random(rows: int, seed: int, dim: int = D) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sinkhorn_of_known_scores():
    scores = [[0.9, 0.1, -0.3], [0.2, 0.8, 0.1], [0.3, 0.4, 0.2], [0.7, 0.6, -0.1]]
    codes = sinkhorn(torch.tensor(scores, dtype=torch.float64))
    known = [
        [0.999937, 1e-6, 6.2e-5],
        [1e-6, 0.860809, 0.139190],
        [4e-6, 0.000281, 0.999715],
        [0.428304, 0.492121, 0.079574],
    ]
    torch.testing.assert_close(codes, torch.tensor(known, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("iterations", [1, 3, 200])
def test_sinkhorn_is_the_papers_listing_and_balances(iterations):
    scores = random(40, 0, P).tanh()
    codes = sinkhorn(scores, None, 0.2, iterations)
    torch.testing.assert_close(codes, plain_sinkhorn(scores, 0.2, iterations), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(codes.sum(1), torch.ones(40).double())
    if iterations == 200:
        torch.testing.assert_close(codes.sum(0), torch.full((P,), 40 / P).double(), atol=1e-6, rtol=0)
    part = sinkhorn(scores[5:9], scores, 0.2, iterations)
    torch.testing.assert_close(part, codes[5:9], atol=1e-12, rtol=1e-9)


def test_sinkhorn_does_not_overflow():
    assert sinkhorn(torch.randn(8, 4) * 100, None, 0.01).isfinite().all()


@pytest.mark.parametrize("with_queue", [False, True])
def test_swav_equals_a_plain_reading(with_queue):
    queue = DistributedQueue(K, 2 * D, dtype=torch.float64)
    older = [unit(random(K, seed)) for seed in (5, 6)]
    queue.enqueue(torch.cat(older, dim=1))
    method = build_method(
        "swav", Backbone(), queue, prototypes=P, freeze=0, queue_start=0 if with_queue else 9
    )
    method.student = encoder(nn.Identity(), nn.Identity())
    method.assign = Prototypes(D, P, "step").double()
    method.update_teacher(0.0)
    views = [random(B, seed).requires_grad_() for seed in (3, 4)]
    twins = [view.detach().clone().requires_grad_() for view in views]
    weight = method.assign.weight.detach().clone().requires_grad_()
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(P).double())
    old = older if with_queue else [random(0, 0)] * 2
    expected = plain_swav([unit(x) for x in twins], weight, old, 0.1, 0.05)
    loss = method(views, torch.arange(B)).loss
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-10)
    loss.backward()
    expected.backward()
    for own, twin in zip([*views, method.assign.weight], [*twins, weight], strict=True):
        assert twin.grad.abs().max() > 1e-3
        torch.testing.assert_close(own.grad, twin.grad, atol=1e-10, rtol=1e-10)
    newest = torch.cat([unit(x) for x in views], dim=1)
    torch.testing.assert_close(queue.anchors()[-B:], newest.detach())
    assert queue.fill == K


def test_dino_equals_a_plain_reading_and_moves_its_centre_afterwards():
    method = build_method("dino", Backbone(), prototypes=P, centre=0.7).double()
    shift = random(1, 2, P)
    method.student, method.teacher.network = nn.Identity(), Shift(shift)
    method.mean.copy_(random(1, 9, P)[0])
    before = method.mean.clone()
    views = [
        random(B, seed, P).requires_grad_() for seed in (3, 4, 5)
    ]  # the third is small: the student's alone
    twins = [view.detach().clone().requires_grad_() for view in views]
    targets = [twin + shift for twin in twins[:2]]
    expected = plain_dino(twins, targets, before, 0.1, 0.04)
    loss = method(views, torch.arange(B)).loss
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-10)
    loss.backward()
    expected.backward()
    for view, twin in zip(views, twins, strict=True):
        torch.testing.assert_close(view.grad, twin.grad, atol=1e-10, rtol=1e-10)
    now = torch.cat(targets).mean(0).detach()
    torch.testing.assert_close(method.mean, 0.7 * before + 0.3 * now)


class Shift(nn.Module):
    def __init__(self, by: Tensor) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


class Small(nn.Module):
    """A backbone with batch norm for images of any size; it keeps the batches that pass it."""

    dim = 8

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.passed: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.passed.append(x.detach())
        return self.body(x).mean((2, 3))


def memory_of(name: str):
    if name == "swav":
        return DistributedQueue(K, 256)
    return Bank(20, 256, 3) if name == "deepcluster_v2" else None


@pytest.mark.parametrize("sides", [(8, 8), (8, 8, 6, 6, 6)])
@pytest.mark.parametrize("name", ["swav", "deepcluster_v2", "dino"])
def test_views_of_one_size_share_a_pass_and_its_batch_statistics(name, sides):
    """As in the authors' codes: one batch a size through the backbone, in order of the views."""
    torch.manual_seed(0)
    method = build_method(name, Small(), memory_of(name), prototypes=P, views=["weak"] * len(sides)).train()
    views = [torch.randn(B, 3, side, side) for side in sides]
    before = {key: value.clone() for key, value in method.encoders()["student"].state_dict().items()}
    method.update_teacher(0.9)
    method(views, torch.arange(B)).loss.backward()
    expected = [torch.cat(views[:2]), *([torch.cat(views[2:])] if len(sides) > 2 else [])]
    backbone = method.encoders()["student"]
    assert len(backbone.passed) == len(expected)
    for passed, whole in zip(backbone.passed, expected, strict=True):
        assert torch.equal(passed, whole)
    alone = Small()
    alone.load_state_dict(before)
    for whole in expected:
        alone(whole)
    torch.testing.assert_close(backbone.state_dict(), alone.state_dict())
    if name == "dino":
        (seen,) = method.encoders()["teacher"].passed
        assert torch.equal(seen, torch.cat(views[:2]))


@pytest.mark.parametrize("name", ["swav", "deepcluster_v2"])
def test_the_projector_sees_all_views_at_once(name):
    torch.manual_seed(0)
    method = build_method(name, Small(), memory_of(name), prototypes=P, views=["weak"] * 3).train()
    rows = []
    method.student.projector.register_forward_hook(lambda _, inputs, out: rows.append(len(inputs[0])))
    method([torch.randn(B, 3, side, side) for side in (8, 8, 6)], torch.arange(B))
    assert rows == [3 * B]


def test_the_head_of_dino_starts_small():
    torch.manual_seed(0)
    head = DINO.head(64, P, 0)
    layers = [layer for layer in head if isinstance(layer, nn.Linear)]
    assert len(layers) == 3
    for layer in layers:
        assert layer.weight.abs().max() <= 2
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert not layer.bias.any()


@pytest.mark.parametrize("norm", ["weight", "step"])
def test_frozen_prototypes_get_a_gradient_of_zero_and_their_input_its_own(norm):
    layer = Prototypes(D, P, norm, frozen=2).double()
    grads = []
    for _ in range(3):
        layer.begin_step()
        x = random(B, 1).requires_grad_()
        layer.zero_grad()
        layer(x).square().sum().backward()
        grads.append(layer.weight.grad.abs().max().item())
        assert x.grad.abs().max() > 0.01
    assert grads[:2] == [0, 0]
    assert grads[2] > 0.01


def test_prototypes_have_length_one():
    x = unit(random(B, 1))
    for norm in ("weight", "step"):
        layer = Prototypes(D, P, norm).double()
        layer.weight.data.mul_(3)
        layer.begin_step()
        expected = x @ unit(layer.weight.detach()).T
        torch.testing.assert_close(layer(x), expected)
