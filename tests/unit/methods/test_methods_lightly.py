"""Losses and their gradients against lightly 1.6, written by other people (`lightly.loss`).

Every loss that both have is here, but for two that are not the papers' in lightly: its CO2 counts the positive among
the anchors and returns a new tensor, which has no gradient; its NNCLR, `NTXentLoss` of neighbours and predictions, also
contrasts neighbours with each other. Of NNCLR the search for neighbours is compared. lightly has neither ISD, ReSSL,
SCE, mean shift, the debiased loss (its DCL is the decoupled one) nor false negative cancellation; the last two are
compared where they are SimCLR's.
"""

import pytest
import torch
from lightly.loss import (
    BarlowTwinsLoss,
    DINOLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    SwaVLoss,
    VICRegLoss,
)
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn
from lightly.models.modules import NNMemoryBankModule
from lightly.models.utils import update_momentum
from torch import Tensor, nn

from isd_ray.methods import build_method, find_method
from isd_ray.methods.base import encoder
from isd_ray.models.prototypes import Prototypes, sinkhorn
from isd_ray.models.teacher import Teacher
from isd_ray.queue.distributed import DistributedQueue

B, D, P, K = 12, 7, 5, 30
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


class Backbone(nn.Module):
    dim = 8

    def forward(self, x: Tensor) -> Tensor:
        return x


class Shift(nn.Module):
    """Stands for the teacher: another embedding than the student's, of the same view."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.8 * x + 0.3 * x.roll(1, dims=1)


def random(rows: int, seed: int, dtype: torch.dtype, dim: int = D) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(x, dim=1)


def build(name: str, dtype: torch.dtype, **options) -> nn.Module:
    """A method whose views are the student's embeddings already; its predictor is a matrix, its queue full."""
    torch.manual_seed(0)
    queue = None
    if find_method(name).uses_queue:
        queue = DistributedQueue(K, D, dtype=dtype)
        queue.enqueue(unit(random(K, 50, dtype)))
    method = build_method(name, Backbone(), queue, **options)
    method.student = nn.Identity()
    if hasattr(method, "predictor") and not isinstance(method.predictor, nn.Identity):
        method.predictor = nn.Linear(D, D, bias=False).to(dtype)
    if hasattr(method, "teacher"):
        method.teacher.network = Shift()
    return method.to(dtype)


def inputs(count: int, dtype: torch.dtype, dim: int = D) -> tuple[list[Tensor], list[Tensor]]:
    """The same views twice: for the method, and for lightly."""
    views = [random(B, seed, dtype, dim).requires_grad_() for seed in range(count)]
    return views, [view.detach().clone().requires_grad_() for view in views]


def compare(ours: Tensor, theirs: Tensor, leaves: list[Tensor], twins: list[Tensor]) -> None:
    """Equal losses, and equal gradients in all leaves that have one."""
    close = {"atol": 1e-10, "rtol": 1e-9} if ours.dtype == torch.float64 else {"atol": 3e-5, "rtol": 3e-4}
    torch.testing.assert_close(ours, theirs.reshape(()), **close)
    ours.backward()
    theirs.backward()
    assert any(twin.grad is not None for twin in twins)
    for leaf, twin in zip(leaves, twins, strict=True):
        if twin.grad is None:  # seen by the teacher alone
            assert leaf.grad is None
            continue
        assert twin.grad.abs().max() > 1e-3
        torch.testing.assert_close(leaf.grad, twin.grad, **close)


@PRECISIONS
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("simclr", {"temperature": 0.5}),
        ("simclr", {"temperature": 0.1}),
        ("debiased", {"temperature": 0.5, "class_prior": 0.0}),  # nothing to correct
        ("fnc", {"temperature": 0.5, "threshold": 1.001}),  # nothing to cancel
    ],
)
def test_contrast_inside_the_batch(name, options, dtype):
    views, twins = inputs(2, dtype)
    ours = build(name, dtype, **options)(views, torch.arange(B)).loss
    compare(ours, NTXentLoss(options["temperature"])(*twins), views, twins)


@PRECISIONS
@pytest.mark.parametrize("name", ["moco_v1", "moco_v2"])
def test_moco_and_its_queue(name, dtype):
    method = build(name, dtype, exclude_own=False)  # lightly does not know whose image an anchor shows
    criterion = NTXentLoss(method.temperature, memory_bank_size=(K, D)).to(dtype)
    bank = criterion.memory_bank.bank = method.queue.state_dict()["keys"].clone()
    for _ in range(2):  # a third batch would not fit before the end of lightly's bank, which drops the rest
        views, twins = inputs(2, dtype)
        theirs = criterion(twins[0], Shift()(twins[1]).detach())
        compare(method(views, torch.arange(B)).loss, theirs, views, twins)
    oldest_first = bank.roll(-2 * B, dims=0)
    torch.testing.assert_close(oldest_first, method.queue.state_dict()["keys"])


@PRECISIONS
@pytest.mark.parametrize("name", ["byol", "byol_asym", "simsiam"])
def test_prediction_without_negatives(name, dtype):
    method = build(name, dtype)
    views, twins = inputs(2, dtype)
    target = nn.Identity() if name == "simsiam" else Shift()
    first, second = (
        NegativeCosineSimilarity()(method.predictor(one), target(other).detach())
        for one, other in (twins, twins[::-1])
    )
    theirs = {  # |q - k|^2 = 2 - 2 q.k, and BYOL adds both directions
        "byol": 2 + 2 * first + 2 + 2 * second,
        "byol_asym": 2 + 2 * first,
        "simsiam": (first + second) / 2,
    }
    compare(method(views, torch.arange(B)).loss, theirs[name], views, twins)


@PRECISIONS
def test_barlow_twins(dtype):
    views, twins = inputs(2, dtype)
    ours = build("barlow_twins", dtype, weight=0.02, scale=1.0)(views, torch.arange(B)).loss
    compare(ours, BarlowTwinsLoss(lambda_param=0.02)(*twins), views, twins)


@PRECISIONS
def test_vicreg(dtype):
    views, twins = inputs(2, dtype)
    weights = {"weight_invariance": 3.0, "weight_variance": 5.0, "weight_covariance": 0.7}
    ours = build("vicreg", dtype, **weights)(views, torch.arange(B)).loss
    compare(ours, VICRegLoss(*weights.values())(*twins), views, twins)


@PRECISIONS
@pytest.mark.parametrize("small", [0, 2])
@pytest.mark.parametrize("with_queue", [False, True])
def test_swav_with_small_views_and_queue(small, with_queue, dtype):
    older = [unit(random(K, seed, dtype)) for seed in (60, 61)]
    start, count = (0 if with_queue else 9), 2 + small
    method = build_method(
        "swav", Backbone(), None, prototypes=P, freeze=0, queue_start=start, views=["weak"] * count
    )
    method.queue = DistributedQueue(K, 2 * D, dtype=dtype)
    method.queue.enqueue(torch.cat(older, dim=1))
    method.student = encoder(nn.Identity(), nn.Identity())
    method.assign = Prototypes(D, P, "step").to(dtype)
    method.update_teacher(0.0)
    views, twins = inputs(count, dtype)
    weight = method.assign.weight.detach().clone().requires_grad_()
    scores = [unit(twin) @ weight.T for twin in twins]
    past = [(x @ weight.T).detach() for x in older] if with_queue else None
    theirs = SwaVLoss(temperature=0.1, sinkhorn_epsilon=0.05)(scores[:2], scores[2:], past)
    ours = method(views, torch.arange(B)).loss
    compare(ours, theirs, [*views, method.assign.weight], [*twins, weight])


@PRECISIONS
@pytest.mark.parametrize("epsilon", [0.05, 0.3])
def test_sinkhorn(epsilon, dtype):
    scores = random(40, 0, dtype, P).tanh()
    close = {"atol": 1e-12, "rtol": 1e-9} if dtype == torch.float64 else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(sinkhorn(scores, None, epsilon), lightly_sinkhorn(scores, 3, epsilon), **close)


@PRECISIONS
def test_dino_with_a_small_view_and_its_centre(dtype):
    sharp = 1 / 32  # lightly keeps it in float32, which has this number exactly
    method = build("dino", dtype, prototypes=D, centre=0.7, temperature_teacher=sharp)
    criterion = DINOLoss(D, teacher_temp=sharp, student_temp=0.1, center_momentum=0.7).to(dtype)
    for step in range(3):  # the centre is zero in the first
        views, twins = inputs(3, dtype)
        targets = [Shift()(twin).detach() for twin in twins[:2]]
        ours = method([(1 + step) * view for view in views], torch.arange(B)).loss
        theirs = criterion([(1 + step) * x for x in targets], [(1 + step) * x for x in twins])
        compare(ours, theirs, views, twins)
        torch.testing.assert_close(method.mean, criterion.center[0, 0])


@PRECISIONS
def test_neighbours_of_nnclr(dtype):
    method, z = build("nnclr", dtype, exclude_own=False), unit(random(B, 1, dtype))
    search = NNMemoryBankModule(size=(K, D)).to(dtype)
    search.bank = method.queue.state_dict()["keys"]
    torch.testing.assert_close(method.neighbour(z, torch.arange(B)), search(z))


def test_teacher_is_an_average_of_the_same_kind():
    student = nn.Linear(D, P).double()
    ours, theirs = Teacher(student), nn.Linear(D, P).double()
    theirs.load_state_dict(student.state_dict())
    for step in range(3):
        nn.init.constant_(student.weight, step)
        ours.update(student, 0.9)
        update_momentum(student, theirs, 0.9)
    torch.testing.assert_close(ours.network.weight, theirs.weight, atol=1e-12, rtol=1e-12)
