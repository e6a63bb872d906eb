"""False negative cancellation: against a float64 reading of the paper, and what follows from its definition."""

import pytest
import torch
from plain_losses import plain_fnc, plain_nt_xent, unit
from torch import Tensor, nn

from isd_ray.config import resolve
from isd_ray.errors import UserError
from isd_ray.methods import build_method

B, D = 8, 4
MODES = ("eliminate", "attract")


class Backbone(nn.Module):
    dim = 6

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(D, self.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def build(**options):
    """The method on views that are embeddings already; views of one image are alike, as after some training."""
    support = len(options.pop("support", ()))
    method = build_method("fnc", Backbone(), views=["weak"] * (2 + support), **options)
    method.student = nn.Identity()
    return method


def views(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(B, D, generator=generator, dtype=torch.float64)
    return [image + 0.4 * torch.randn(B, D, generator=generator, dtype=torch.float64) for _ in range(count)]


def found(method, seen: list[Tensor]) -> Tensor:
    """The false negatives [B, 2B] of images whose unit embeddings are `seen`."""
    index = torch.arange(B)
    return method.find(seen, torch.cat(seen[:2]), index[:, None] == index.repeat(2))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("support", "neighbours", "threshold"), [(0, 3, 0.2), (2, 3, 0.7), (2, 100, 0.5), (5, 2, -2.0)]
)
def test_loss_and_gradient_equal_a_plain_reading(mode, support, neighbours, threshold):
    options = {"false_negatives": mode, "neighbours": neighbours, "threshold": threshold, "temperature": 0.3}
    method = build(support=range(support), **options)
    ours = [view.requires_grad_() for view in views(2 + support)]
    twins = [view.detach().clone().requires_grad_() for view in ours]
    z = [unit(twin) for twin in twins]
    count = found(method, [x.detach() for x in z]).sum(dim=1)
    assert count.max() > 0  # otherwise this would test SimCLR
    expected = plain_fnc(*z[:2], z[2:], 0.3, mode, neighbours, threshold)
    loss = method(ours, torch.arange(B)).loss
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-10)
    loss.backward()
    expected.backward()
    for own, twin in zip(ours[:2], twins[:2], strict=True):
        assert twin.grad.abs().max() > 1e-3
        torch.testing.assert_close(own.grad, twin.grad, atol=1e-10, rtol=1e-10)
    assert all(view.grad is None for view in ours[2:])


@pytest.mark.parametrize("mode", MODES)
def test_a_threshold_above_one_is_simclr(mode):
    method, seen = build(false_negatives=mode, threshold=1.001, support=range(2)), views(4)
    expected = plain_nt_xent(unit(seen[0]), unit(seen[1]), 0.1)
    simclr = build_method("simclr", Backbone(), temperature=0.1)
    simclr.student = nn.Identity()
    loss = method(seen, torch.arange(B)).loss
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(loss, simclr(seen[:2], torch.arange(B)).loss, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_elimination_never_raises_the_loss(seed):
    seen, losses = views(4, seed), []
    for neighbours in (1, 2, 4, 8, 2 * B):
        method = build(false_negatives="eliminate", neighbours=neighbours, threshold=0.3, support=range(2))
        losses.append(method(seen, torch.arange(B)).loss.item())
    assert losses[0] < plain_nt_xent(unit(seen[0]), unit(seen[1]), 0.1).item()
    assert losses == sorted(losses, reverse=True)


def test_without_a_negative_left_elimination_is_zero():
    method = build(false_negatives="eliminate", neighbours=2 * B, threshold=-1.1)
    seen = [view.requires_grad_() for view in views(2)]
    loss = method(seen, torch.arange(B)).loss
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert all(view.grad.abs().max() < 1e-12 for view in seen)


def test_own_views_are_never_cancelled_and_no_more_than_asked():
    seen = [unit(view) for view in views(4)]
    own = torch.eye(B, dtype=torch.bool).repeat(1, 2)
    everything = found(build(neighbours=100, threshold=-torch.inf), seen)
    assert torch.equal(everything, ~own)
    three = found(build(neighbours=3, threshold=-1.1), seen)
    assert torch.equal(three.sum(dim=1), torch.full((B,), 3))
    assert not (three & own).any()
    twice = torch.arange(B) // 2  # every image is twice in the batch
    same = twice[:, None] == twice.repeat(2)
    assert not (build(neighbours=100, threshold=-1.1).find(seen, torch.cat(seen[:2]), same) & same).any()


def test_support_views_only_add_false_negatives_and_do_not_enter_the_loss():
    method, seen = build(neighbours=100, threshold=0.8, support=range(6)), [unit(view) for view in views(8)]
    few, many = found(method, seen[:2]), found(method, seen)
    assert (few <= many).all()
    assert many.sum() > few.sum()
    calm = build(neighbours=100, threshold=1.1, support=range(6))
    other = [*seen[:2], *views(6, seed=9)]
    assert torch.equal(calm(seen, torch.arange(B)).loss, calm(other, torch.arange(B)).loss)


def test_diagnostics_count_what_was_found_and_its_class():
    method, seen = build(neighbours=3, threshold=-1.1), views(2)
    index, label = torch.arange(B), torch.arange(B) % 2
    numbers = method(seen, index, label, diagnose=True).diagnostics
    false = found(method, [unit(view) for view in seen])
    same = label[:, None] == label.repeat(2)
    assert numbers["cancelled"] == 3
    assert numbers["cancelled_purity"] == (false & same).sum() / (3 * B)
    assert method(seen, index, torch.full((B,), -1), diagnose=True).diagnostics["cancelled_purity"] == 0
    assert "cancelled_purity" not in method(seen, index, diagnose=True).diagnostics


def test_autocast_leaves_every_weight_its_gradient():
    method = build_method("fnc", Backbone())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = method([view.float() for view in views(4)], torch.arange(B)).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in method.parameters() if p.requires_grad)


def test_a_wrong_mode_is_refused_and_the_config_knows_both():
    with pytest.raises(UserError, match=r"method\.false_negatives: eliminate or attract, not 'drop'"):
        build(false_negatives="drop")
    config = resolve({"method.name": "fnc", "method.false_negatives": "eliminate"})
    assert config.method.false_negatives == "eliminate"
    assert len(config.method.views) == 4  # the data set's own views, support included
    with pytest.raises(UserError, match=r"method\.false_negatives"):
        resolve({"method.name": "fnc", "method.false_negatives": "drop"})
