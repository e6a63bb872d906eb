"""Schedules equal their formulas at every step; optimisers decay what they are told to."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from isd_ray.config import TrainConfig
from isd_ray.train.optim import build_optimizer, learning_rates, set_rate, teacher_momenta


def test_cosine_changes_once_an_epoch():
    rates = learning_rates(TrainConfig(epochs=4, lr=0.2, schedule="cosine"), steps_per_epoch=3)
    expected = [0.1 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4) for _ in range(3)]
    np.testing.assert_allclose(rates, expected)


def test_step_drops_at_the_published_epochs():
    train = TrainConfig(epochs=200, lr=1.0, schedule="step", milestones=[0.7, 0.9], gamma=0.2)
    rates = learning_rates(train, steps_per_epoch=1)
    assert rates[139] == 1.0
    assert rates[140] == pytest.approx(0.2)
    assert rates[179] == pytest.approx(0.2)
    assert rates[180] == pytest.approx(0.04)


def test_warmup_is_linear():
    train = TrainConfig(epochs=4, lr=1.0, schedule="constant", warmup_epochs=2)
    np.testing.assert_allclose(learning_rates(train, 5)[:11], [*np.arange(1, 11) / 10, 1.0])


def test_teacher_momentum():
    assert set(teacher_momenta(0.99, "constant", 7)) == {0.99}
    rising = teacher_momenta(0.9, "cosine", 100)
    assert rising[0] == pytest.approx(0.9)
    assert np.all(np.diff(rising) > 0)
    assert rising[-1] < 1


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_decay_of_norm_and_bias_is_a_choice(name):
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    net[2].weight.requires_grad_(False)
    groups = build_optimizer(net, TrainConfig(optimizer=name, decay_norm_and_bias=False)).param_groups
    decayed = [p for g in groups if g["weight_decay"] for p in g["params"]]
    assert len(decayed) == 1
    assert decayed[0] is net[0].weight
    together = build_optimizer(net, TrainConfig(optimizer=name)).param_groups
    assert len(together) == 1
    assert len(together[0]["params"]) == 5


@pytest.mark.parametrize("decay", [0.0, 1e-6, 0.1])
@pytest.mark.parametrize("all_decayed", [True, False])
def test_lars_adapts_whatever_the_weight_decay(decay, all_decayed):
    """One step is lr trust |w| / (|g| + wd |w|) (g + wd w), or plain SGD for what is left alone."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    nn.init.normal_(net[0].bias)
    before = [p.detach().clone() for p in net.parameters()]
    train = TrainConfig(optimizer="lars", lr=4.8, weight_decay=decay, decay_norm_and_bias=all_decayed)
    optimizer = build_optimizer(net, train)
    (net(torch.randn(8, 4).double()) * torch.randn(8, 3)).sum().backward()
    optimizer.step()
    for w, p in zip(before, net.parameters(), strict=True):
        g, step = p.grad, train.lr * p.grad
        if w.ndim > 1 or all_decayed:
            ratio = train.trust * w.norm() / (g.norm() + decay * w.norm() + 1e-8) if w.norm() > 0 else 1
            step = train.lr * ratio * (g + decay * w)
        torch.testing.assert_close(p.detach(), w - step, rtol=1e-9, atol=1e-12)


def test_sgd_equals_torch_sgd():
    torch.manual_seed(0)
    net = nn.Linear(4, 2)
    twin = nn.Linear(4, 2)
    twin.load_state_dict(net.state_dict())
    ours = build_optimizer(net, TrainConfig(lr=0.1, weight_decay=1e-2))
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(3):
        x = torch.randn(8, 4)
        for module, optimizer in ((net, ours), (twin, theirs)):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(net.weight, twin.weight)


def test_a_constant_part_keeps_the_peak_rate():
    net = nn.ModuleDict({"student": nn.Linear(2, 2), "predictor": nn.Linear(2, 2)})
    optimizer = build_optimizer(net, TrainConfig(lr=0.3, decay_norm_and_bias=False), constant=("predictor",))
    set_rate(optimizer, 0.1, peak=0.3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in net["student"].parameters()} == {0.1}
    assert {rates[id(p)] for p in net["predictor"].parameters()} == {0.3}
    again = build_optimizer(net, TrainConfig(lr=0.3, decay_norm_and_bias=False), constant=("predictor",))
    again.load_state_dict(optimizer.state_dict())
    set_rate(again, 0.2, peak=0.3)
    assert sorted(group["lr"] for group in again.param_groups) == [0.2, 0.2, 0.3, 0.3]


def test_without_a_teacher_the_momentum_is_one():
    assert set(teacher_momenta(None, None, 5)) == {1.0}
