"""What an optimiser remembers comes back whole, or is refused before a step is made with it."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from isd_ray.config import TrainConfig
from isd_ray.train.optim import build_optimizer, load_optimizer

OPTIMIZERS = ("sgd", "lars", "adamw")


def trained(name: str, steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer = build_optimizer(net, TrainConfig(optimizer=name, lr=0.1))
    for _ in range(steps):
        net(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_after_loading_is_the_step_without_a_stop(name):
    net, optimizer = trained(name)
    weights, kept = deepcopy(net.state_dict()), deepcopy(optimizer.state_dict())
    other, again = trained(name, steps=0)
    other.load_state_dict(weights)
    load_optimizer(again, kept)
    for module, stepper in ((net, optimizer), (other, again)):
        module(torch.ones(1, 3)).sum().backward()
        stepper.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_settings_in_a_checkpoint_are_not_obeyed(name):
    kept = deepcopy(trained(name)[1].state_dict())
    for group in kept["param_groups"]:
        group |= {"lr": "much", "weight_decay": None}
    optimizer = trained(name)[1]
    load_optimizer(optimizer, kept)
    assert optimizer.param_groups[0]["lr"] == 0.1
    optimizer.step()


def of_first(change):
    def changed(kept):
        part = kept["state"][0]
        part |= change(next(iter(part)), next(iter(part.values())))

    return changed


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "change",
    [
        lambda kept: kept.pop("state"),
        lambda kept: kept.update(state=[1]),
        lambda kept: kept["state"].update({99: kept["state"][0]}),
        lambda kept: kept["state"].update({"a": kept["state"][0]}),
        lambda kept: kept["state"].update({0: 5}),
        lambda kept: kept["param_groups"][0]["params"].pop(),
        lambda kept: kept.update(param_groups=None),
        of_first(lambda k, x: {"other": x}),
        of_first(lambda k, x: {k: torch.zeros(7)}),
        of_first(lambda k, x: {k: torch.zeros(2, 3, dtype=torch.int64)}),
        of_first(lambda k, x: {k: torch.zeros(2, 3).to_sparse()}),
        of_first(lambda k, x: {k: torch.zeros(2, 3, device="meta")}),
        of_first(lambda k, x: {k: "x"}),
    ],
)
def test_what_is_of_something_else_is_refused(name, change):
    kept = deepcopy(trained(name)[1].state_dict())
    change(kept)
    with pytest.raises((ValueError, TypeError, LookupError, AttributeError)):
        load_optimizer(trained(name)[1], kept)
