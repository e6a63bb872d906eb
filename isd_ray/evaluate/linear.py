"""Linear accuracy: how well does a linear classifier separate the classes on frozen features?

The head and the recipe of ISD's `eval_linear.py`: x / |x|, then standardisation by the mean and variance of
the L2-normalised training features, then one linear layer; SGD with learning rate 0.01, which only suits
inputs normalised like this (the learning rate of 30 of other protocols belongs to raw features). One
difference, stated in the protocol: the repository reports the best epoch on the test set, this the last one.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isd_ray.errors import UserError
from isd_ray.evaluate.knn import check_labels

EPSILON = 1e-5


@dataclass(frozen=True)
class LinearRecipe:
    """How the linear layer is trained; the defaults are ISD's. The learning rate falls to a tenth at each
    milestone.
    """

    epochs: int = 40
    batch_size: int = 256
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    milestones: tuple[int, ...] = (15, 30)


ISD_RECIPE = LinearRecipe()


def linear(
    train_features: Sequence[Tensor],
    train_labels: Tensor,
    test_features: Tensor,
    *,
    classes: int,
    reference: Tensor | None = None,
    recipe: LinearRecipe = ISD_RECIPE,
    seed: int = 0,
) -> tuple[Tensor, dict[str, Any]]:
    """Train the linear head; return its predictions int64 [Q] for `test_features` [Q, d], and the protocol.

    train_features: one copy [N, d] of the training features or several (one an augmented view); epoch e uses
    copy e mod len(train_features). `reference` [N, d] gives mean and variance (default: the first copy); pass
    the features of the plain centre view where the copies are augmented. All features lie on one device; the
    work is done there. Raises UserError where labels and features do not fit.
    """
    for copy in train_features:
        check_labels(train_labels, len(copy), classes, "linear protocol's training set")
    if len(train_labels) < 2:
        raise UserError("The linear protocol needs at least 2 labelled training images, this set has 1.")
    mean, scale = standardisation(train_features[0] if reference is None else reference)
    copies = [_Standardised(copy, mean, scale) for copy in train_features]
    weight, bias = _train(copies, train_labels, classes, recipe, seed)
    test = _Standardised(test_features, mean, scale)
    logits = [F.linear(test.rows(i), weight, bias) for i in torch.arange(len(test_features)).split(4096)]
    return torch.cat(logits).argmax(dim=1).cpu(), _describe(recipe, len(copies), len(train_labels), seed)


def _describe(recipe: LinearRecipe, copies: int, images: int, seed: int) -> dict[str, Any]:
    return {
        "name": "isd_linear" if recipe == ISD_RECIPE else "linear",
        "version": 1,
        "normalisation": "l2, then standardised by the training features",
        "optimiser": "sgd",
        **asdict(recipe),
        "gamma": 0.1,
        "train_images": images,
        "train_copies": copies,
        "selection": "last epoch",
        "seed": seed,
    }


def standardisation(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and 1 / sqrt(var + 1e-5), both [d], of the L2-normalised rows (unbiased variance)."""
    variance, mean = torch.var_mean(F.normalize(features, dim=1), dim=0, correction=1)
    return mean, (variance + EPSILON).rsqrt()


class _Standardised:
    """Rows of features as the linear layer sees them, made when needed: no second copy of the set."""

    def __init__(self, features: Tensor, mean: Tensor, scale: Tensor):
        self.features, self.mean, self.scale = features, mean, scale

    def rows(self, index: Tensor) -> Tensor:
        x = self.features.index_select(0, index.to(self.features.device))
        return (F.normalize(x, dim=1) - self.mean) * self.scale


def _train(
    copies: list[_Standardised], labels: Tensor, classes: int, recipe: LinearRecipe, seed: int
) -> tuple[Tensor, Tensor]:
    """SGD on the cross-entropy; returns weight [C, d] and bias [C] after the last epoch."""
    weight, bias = initial_head(copies[0].features, classes, seed)
    optimiser = torch.optim.SGD(
        [weight, bias], lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, list(recipe.milestones), gamma=0.1)
    labels = labels.to(weight.device)
    for epoch in range(recipe.epochs):
        copy = copies[epoch % len(copies)]
        for index in epoch_order(len(labels), epoch, seed).to(weight.device).split(recipe.batch_size):
            loss = F.cross_entropy(F.linear(copy.rows(index), weight, bias), labels[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
    return weight.detach(), bias.detach()


def initial_head(features: Tensor, classes: int, seed: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight [C, d] and bias [C] as nn.Linear starts (uniform in +-1/sqrt(d)), drawn on the CPU by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    bound = features.shape[1] ** -0.5
    weight = torch.empty(classes, features.shape[1]).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(classes).uniform_(-bound, bound, generator=generator)
    return nn.Parameter(weight.to(features)), nn.Parameter(bias.to(features))


def epoch_order(images: int, epoch: int, seed: int) -> Tensor:
    """The order int64 [images] in which epoch `epoch` visits the training images."""
    return torch.randperm(images, generator=torch.Generator().manual_seed((seed + 1) * 1_000_003 + epoch))
