"""Extraction: order, modes, batches; and the measures of collapse."""

import math

import pytest
import torch
from torch import nn

from isd_ray.evaluate.collapse import alignment, normalised_std, rankme, uniformity
from isd_ray.evaluate.features import extract, pixels

IMAGES = torch.randint(256, (11, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def view(x: torch.Tensor) -> torch.Tensor:
    return x.float() / 255 - 0.5


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    )


@pytest.mark.parametrize(
    "images",
    [IMAGES, list(IMAGES.split(4)), (b for b in IMAGES.split(3))],
    ids=["tensor", "list", "iterator"],
)
def test_features_do_not_depend_on_the_batches(images) -> None:
    net = small_net()
    features = extract(net, images, view, batch_size=5)
    with torch.no_grad():
        expected = net.eval()(view(IMAGES)).flatten(1)
    assert features.shape == (11, 6)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected)


def test_modes_and_running_statistics_are_left_as_they_were() -> None:
    net = small_net().train()
    net[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    features = extract(net, IMAGES, view)
    assert (net.training, net[0].training, net[1].training, net[2].training) == (True, True, False, True)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not features.requires_grad
    assert not features.is_inference()  # so that a linear head can train on it


def test_modes_are_restored_after_an_error() -> None:
    net = small_net().train()
    with pytest.raises(RuntimeError):
        extract(net, IMAGES[:, :1], view)
    assert all(m.training for m in net.modules())


def test_pixels() -> None:
    torch.testing.assert_close(pixels(IMAGES, batch_size=4), IMAGES.flatten(1).float() / 255)
    flat = torch.full((2, 3, 8, 8), 51, dtype=torch.uint8)
    torch.testing.assert_close(pixels(flat, 4), torch.full((2, 48), 0.2))


def test_collapse_measures_at_their_extremes() -> None:
    g = torch.Generator().manual_seed(0)
    spread, point = torch.randn(2000, 16, generator=g), torch.randn(1, 16, generator=g).expand(2000, 16)
    assert normalised_std(spread) == pytest.approx(1, abs=0.02)
    assert normalised_std(point) == pytest.approx(0, abs=1e-6)
    assert rankme(spread) == pytest.approx(16, rel=0.01)
    assert rankme(point) == pytest.approx(1, abs=0.01)
    assert uniformity(point) == pytest.approx(0, abs=1e-6)
    assert uniformity(spread) < -3
    assert alignment(spread, 3 * spread) == pytest.approx(0, abs=1e-6)
    assert alignment(spread, -spread) == pytest.approx(4, abs=1e-5)


def test_rankme_of_known_singular_values() -> None:
    singular = torch.tensor([4.0, 2.0, 2.0])
    p = [0.5, 0.25, 0.25]
    expected = math.exp(-sum(x * math.log(x) for x in p))
    for x in (torch.diag(singular), torch.cat([torch.diag(singular), torch.zeros(5, 3)])):
        assert rankme(x) == pytest.approx(expected, rel=1e-4)
        assert rankme(x.T) == pytest.approx(expected, rel=1e-4)


def test_uniformity_of_two_opposite_points() -> None:
    assert uniformity(torch.tensor([[1.0, 0.0], [-5.0, 0.0]])) == pytest.approx(-8)  # exp(-2 * 2^2)
