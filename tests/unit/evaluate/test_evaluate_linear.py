"""The linear head against a plain float64 loop of the same steps."""

import math

import pytest
import torch

from isd_ray.errors import UserError
from isd_ray.evaluate.linear import LinearRecipe, epoch_order, initial_head, linear, standardisation

SHORT = LinearRecipe(epochs=3)


def separable(n: int, d: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(7))
    return centres[y] + 0.4 * torch.randn(n, d, generator=g), y


def plain_head(copies, y, test, classes, epochs, batch_size, milestones, seed):
    """SGD with momentum and weight decay by hand, in float64; the gradient of the loss in closed form."""
    unit = [c.double() / c.double().norm(dim=1, keepdim=True) for c in copies]
    mean = unit[0].sum(0) / len(y)
    variance = (unit[0] - mean).square().sum(0) / (len(y) - 1)
    x_all = [(u - mean) / (variance + 1e-5).sqrt() for u in unit]
    w, b = (p.double() for p in initial_head(copies[0].shape[1], classes, seed))
    vw, vb = torch.zeros_like(w), torch.zeros_like(b)
    for epoch in range(epochs):
        lr = 0.01 * 0.1 ** sum(epoch >= m for m in milestones)
        order = epoch_order(len(y), epoch, seed)
        for start in range(0, len(y), batch_size):
            i = order[start : start + batch_size]
            x = x_all[epoch % len(copies)][i]
            error = (x @ w.T + b).softmax(1) - torch.eye(classes, dtype=torch.float64)[y[i]]
            vw = 0.9 * vw + error.T @ x / len(i) + 0.5 * w
            vb = 0.9 * vb + error.mean(0) + 0.5 * b
            w, b = w - lr * vw, b - lr * vb
    t = test.double() / test.double().norm(dim=1, keepdim=True)
    return ((t - mean) / (variance + 1e-5).sqrt()) @ w.T + b


@pytest.mark.parametrize("copies", [1, 3])
def test_equals_a_plain_float64_loop(copies: int) -> None:
    x, y = separable(50, 6, 4)
    g = torch.Generator().manual_seed(1)
    views = [x, *[x + 0.2 * torch.randn(x.shape, generator=g) for _ in range(copies - 1)]]
    test = 3 * torch.randn(400, 6, generator=g)
    recipe = LinearRecipe(epochs=7, batch_size=16, weight_decay=0.5, milestones=(3, 5))
    got, protocol = linear(views, y, test, classes=4, recipe=recipe, seed=5)
    logits = plain_head(views, y, test, 4, 7, 16, (3, 5), 5)
    top = logits.topk(2).values
    clear = top[:, 0] - top[:, 1] > 1e-4  # float32 rounding may swap what is closer than this
    assert clear.sum() > 390
    assert torch.equal(got[clear], logits.argmax(1)[clear])
    assert (protocol["name"], protocol["epochs"]) == ("linear", 7)
    assert protocol["train_copies"] == copies


def test_separable_classes_are_learnt_and_the_seed_repeats() -> None:
    x, y = separable(200, 16, 4)
    test, wanted = separable(100, 16, 4, seed=3)
    first, _ = linear([x], y, test, classes=4, recipe=LinearRecipe(epochs=10))
    again, _ = linear([x], y, test, classes=4, recipe=LinearRecipe(epochs=10))
    assert (first == wanted).float().mean() > 0.95
    assert torch.equal(first, again)


def test_standardisation_is_of_the_normalised_features_with_unbiased_variance() -> None:
    mean, scale = standardisation(torch.tensor([[3.0, 4.0], [8.0, 6.0]]))  # unit rows (.6, .8) and (.8, .6)
    torch.testing.assert_close(mean, torch.tensor([0.7, 0.7]))
    torch.testing.assert_close(scale, torch.full((2,), 1 / math.sqrt(0.02 + 1e-5)))


def test_reference_features_set_the_standardisation() -> None:
    x, y = separable(60, 6, 3)
    noisy = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    test = torch.randn(300, 6, generator=torch.Generator().manual_seed(3))
    plain, _ = linear([noisy], y, test, classes=3, recipe=SHORT)
    same, _ = linear([noisy], y, test, classes=3, recipe=SHORT, reference=noisy)
    other, _ = linear([noisy], y, test, classes=3, recipe=SHORT, reference=x)
    assert torch.equal(plain, same)
    assert not torch.equal(plain, other)


def test_the_default_is_the_published_recipe() -> None:
    x, y = separable(8, 4, 2)
    _, protocol = linear([x], y, x, classes=2)
    published = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4, "batch_size": 256, "epochs": 40}
    assert protocol.items() >= published.items()
    assert protocol["milestones"] == (15, 30)
    assert protocol["name"] == "isd_linear"


def test_bad_input_is_named() -> None:
    x, y = separable(6, 4, 3)
    with pytest.raises(UserError, match="6 images and 5 labels"):
        linear([x], y[:5], x, classes=3)
    with pytest.raises(UserError, match=r"label 2, outside 0\.\.1"):
        linear([x], y, x, classes=2)
    with pytest.raises(UserError, match="at least 2"):
        linear([x[:1]], y[:1], x, classes=3)
