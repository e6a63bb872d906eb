"""Linear accuracy: how well does a linear classifier separate the classes on frozen features?

Three published forms, whose numbers do not compare; each recipe belongs to its own normalisation:

- ISD (`eval_linear.py` of the ISD repository): x / |x|, then standardisation by the mean and variance of the
  L2-normalised training features, then one linear layer; SGD with learning rate 0.01, which only suits inputs
  normalised like this.
- SDCLR (Jiang et al., ICML 2021, its linear evaluation): raw features, SGD with learning rate 30 and no weight decay,
  weights drawn from N(0, 0.01); a longer form for few labelled images.
- BCL (Zhou et al., ICML 2022): raw features, Adam with a learning rate that falls exponentially from 1e-2 to 1e-6.

Differences, stated in the protocol: the features are those of the centre view (ISD and SDCLR augment the training
images), and the last epoch is reported (ISD: the best on the test set, SDCLR: the best on validation images).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from isd_ray.errors import UserError
from isd_ray.evaluate.knn import check_labels

EPSILON = 1e-5
CHUNK = 4096  # rows at a time where all features are looked at


@dataclass(frozen=True)
class LinearRecipe:
    """How the linear layer is trained; the defaults are ISD's.

    normalise: L2-normalise and standardise the features, else take them as they are. The learning rate falls to a
    tenth at each milestone, or, with `final_lr`, by the same factor every epoch and towards that value. momentum is
    SGD's. init_std: weights begin as N(0, init_std) and biases as 0; None: as nn.Linear begins.
    """

    epochs: int = 40
    batch_size: int = 256
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    milestones: tuple[int, ...] = (15, 30)
    optimiser: Literal["sgd", "adam"] = "sgd"
    final_lr: float | None = None
    normalise: bool = True
    init_std: float | None = None


ISD_RECIPE = LinearRecipe()
SDCLR_RECIPE = LinearRecipe(
    epochs=30, batch_size=128, lr=30, weight_decay=0, milestones=(10, 20), normalise=False, init_std=0.01
)
SDCLR_FEWSHOT_RECIPE = LinearRecipe(
    epochs=100, batch_size=128, lr=30, weight_decay=0, milestones=(40, 60), normalise=False, init_std=0.01
)
BCL_RECIPE = LinearRecipe(
    epochs=500, batch_size=1000, lr=1e-2, momentum=0, weight_decay=5e-6, milestones=(), optimiser="adam",
    final_lr=1e-6, normalise=False,
)  # fmt: skip
NAMES = {
    ISD_RECIPE: "isd_linear",
    SDCLR_RECIPE: "sdclr_linear",
    SDCLR_FEWSHOT_RECIPE: "sdclr_fewshot",
    BCL_RECIPE: "bcl_linear",
}


def linear(
    train_features: Sequence[Tensor],
    train_labels: Tensor,
    test_features: Tensor,
    *,
    classes: int,
    reference: Tensor | None = None,
    recipe: LinearRecipe = ISD_RECIPE,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Train the linear head; return its predictions int64 [Q] for `test_features` [Q, d], and the settings.

    train_features: one copy [N, d] of the training features or several (one an augmented view); epoch e uses
    copy e mod len(train_features). `reference` [N, d] gives mean and variance (default: the first copy); pass
    the features of the plain centre view where the copies are augmented. The work is done on `device` (default: where
    the first copy lies); features that lie elsewhere are moved there batch by batch. Raises UserError where labels
    and features do not fit.
    """
    for copy in train_features:
        check_labels(train_labels, len(copy), classes, "linear protocol's training set")
    if len(train_labels) < 2:
        raise UserError("The linear protocol needs at least 2 labelled training images, this set has 1.")
    where = torch.device(train_features[0].device if device is None else device)
    standard = (
        standardisation(train_features[0] if reference is None else reference) if recipe.normalise else None
    )
    copies = [_Rows(copy, standard, where) for copy in train_features]
    weight, bias = _train(copies, train_labels, classes, recipe, seed)
    test = _Rows(test_features, standard, where)
    logits = [F.linear(test.rows(i), weight, bias) for i in torch.arange(len(test_features)).split(CHUNK)]
    return torch.cat(logits).argmax(dim=1).cpu(), _describe(recipe, len(copies), len(train_labels), seed)


def _describe(recipe: LinearRecipe, copies: int, images: int, seed: int) -> dict[str, Any]:
    decay = {"gamma": 0.1} if recipe.final_lr is None else {"gamma": "final_lr, exponentially"}
    return {
        "name": NAMES.get(recipe, "linear"),
        "normalisation": "l2, then standardised by the training features" if recipe.normalise else "none",
        **asdict(recipe),
        **decay,
        "view": "centre, not augmented",
        "train_images": images,
        "train_copies": copies,
        "selection": "last epoch",
        "seed": seed,
    }


def standardisation(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and 1 / sqrt(var + 1e-5), both [d], of the L2-normalised rows (unbiased variance).

    Two passes in float64, a chunk at a time: no second copy of the features.
    """
    width, n = features.shape[1], len(features)
    mean = torch.zeros(width, dtype=torch.float64, device=features.device)
    for x in features.split(CHUNK):
        mean += F.normalize(x.double(), dim=1).sum(0) / n
    variance = torch.zeros_like(mean)
    for x in features.split(CHUNK):
        variance += (F.normalize(x.double(), dim=1) - mean).square().sum(0) / (n - 1)
    return mean.float(), (variance + EPSILON).rsqrt().float()


class _Rows:
    """Rows of features as the linear layer sees them, made on its device when needed: no second copy of the set."""

    def __init__(self, features: Tensor, standard: tuple[Tensor, Tensor] | None, device: torch.device):
        self.features, self.device = features, device
        self.standard = None if standard is None else tuple(part.to(device) for part in standard)

    def rows(self, index: Tensor) -> Tensor:
        x = self.features.index_select(0, index.to(self.features.device)).to(self.device).float()
        if self.standard is None:
            return x
        mean, scale = self.standard
        return (F.normalize(x, dim=1) - mean) * scale


def _train(
    copies: list[_Rows], labels: Tensor, classes: int, recipe: LinearRecipe, seed: int
) -> tuple[Tensor, Tensor]:
    """Minimise the cross-entropy; returns weight [C, d] and bias [C] after the last epoch."""
    width, device = copies[0].features.shape[1], copies[0].device
    weight, bias = (p.to(device) for p in initial_head(width, classes, seed, recipe.init_std))
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimiser, schedule = _optimiser(parameters, recipe)
    labels = labels.to(device)
    for epoch in range(recipe.epochs):
        copy = copies[epoch % len(copies)]
        for index in epoch_order(len(labels), epoch, seed).to(device).split(recipe.batch_size):
            loss = F.cross_entropy(F.linear(copy.rows(index), weight, bias), labels[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
    return weight.detach(), bias.detach()


def _optimiser(
    parameters: list[Tensor], recipe: LinearRecipe
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    decay = recipe.weight_decay
    optimiser: torch.optim.Optimizer
    if recipe.optimiser == "adam":
        optimiser = torch.optim.Adam(parameters, lr=recipe.lr, weight_decay=decay)
    else:
        optimiser = torch.optim.SGD(parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=decay)
    if recipe.final_lr is None:
        milestones = list(recipe.milestones)
        return optimiser, torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones, gamma=0.1)
    factor = (recipe.final_lr / recipe.lr) ** (1 / recipe.epochs)
    return optimiser, torch.optim.lr_scheduler.ExponentialLR(optimiser, factor)


def initial_head(width: int, classes: int, seed: int, std: float | None = None) -> tuple[Tensor, Tensor]:
    """Weight [classes, width] and bias [classes], drawn on the CPU by `seed`.

    As nn.Linear begins (uniform in +-1/sqrt(width)), or with `std` N(0, std) and 0.
    """
    generator = torch.Generator().manual_seed(seed)
    if std is not None:
        return torch.empty(classes, width).normal_(0, std, generator=generator), torch.zeros(classes)
    bound = width**-0.5
    weight = torch.empty(classes, width).uniform_(-bound, bound, generator=generator)
    return weight, torch.empty(classes).uniform_(-bound, bound, generator=generator)


def epoch_order(images: int, epoch: int, seed: int) -> Tensor:
    """The order int64 [images] in which epoch `epoch` visits the training images."""
    return torch.randperm(images, generator=torch.Generator().manual_seed((seed + 1) * 1_000_003 + epoch))
