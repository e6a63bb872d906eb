"""Transfer: multinomial logistic regression on frozen features, its regularisation chosen on validation images.

The protocol of Kornblith et al. (CVPR 2019) as BYOL (Grill et al., NeurIPS 2020) describes it: L-BFGS, an L2
penalty from 45 values spaced evenly in the logarithm from 1e-6 to 1e5, chosen on validation images, then fitted again
on training and validation images together. The penalty here is lambda / 2 * |W|^2 beside the *mean* cross-entropy, so
that a value means the same on sets of any size; scikit-learn's C is 1 / (lambda N). Biases are not penalised.

torch's L-BFGS does the work, on the device of the features, where scikit-learn's cannot follow to a GPU. On a CPU both
give nearly the same accuracy; torch's takes longer on small sets and ends lower (benchmarks/logistic.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from isd_ray.evaluate.draws import split
from isd_ray.evaluate.groups import scores
from isd_ray.evaluate.transfer_sets import MEAN_PER_CLASS, VALIDATION_SHARE

LAMBDAS = tuple(10.0**e for e in torch.linspace(-6, 5, 45, dtype=torch.float64).tolist())
ITERATIONS = 1000
Head = tuple[Tensor, Tensor]  # weight [C, d], bias [C]


def fit(
    x: Tensor,
    y: Tensor,
    classes: int,
    penalty: float,
    start: Head | None = None,
    iterations: int = ITERATIONS,
) -> Head:
    """Minimise mean cross-entropy + penalty / 2 * |W|^2 over features x [N, d] and labels y int64 [N].

    start: where to begin (default: zero). Returns weight [C, d] and bias [C], on the device of x.
    """
    weight, bias = start or (x.new_zeros(classes, x.shape[1]), x.new_zeros(classes))
    parameters = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    optimiser = torch.optim.LBFGS(
        parameters, max_iter=iterations, tolerance_grad=1e-5, tolerance_change=1e-9, history_size=10,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(F.linear(x, *parameters), y) + penalty / 2 * parameters[0].square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    weight, bias = (p.detach() for p in parameters)
    return weight, bias


def transfer(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    *,
    classes: int,
    metric: str,
    validation: tuple[Tensor, Tensor] | None = None,
    lambdas: Sequence[float] = LAMBDAS,
    seed: int = 0,
) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
    """Choose the penalty, fit on all labelled images; return predictions int64 [Q] for `test`, settings and details.

    train [N, d], test [Q, d]: features as they are, not normalised; validation: features and labels, where the set
    has its own (default: a fifth of every training class, drawn by `seed`). metric: "top-1" or "mean per class", by
    which the penalty is chosen. Of equally good penalties the middle one is taken. The details say which it was.
    """
    if validation is None:
        rest, held = split(train_labels, VALIDATION_SHARE, classes, seed)
        parts = (train[rest], train_labels[rest]), (train[held], train_labels[held])
    else:
        parts = (train, train_labels), validation
    shown = choose(*parts[0], *parts[1], classes, metric, lambdas)
    best = middle_of_best(shown)
    x, y = (torch.cat([a, b]) for a, b in zip(*parts, strict=True))
    weight, bias = fit(x, y.to(x.device), classes, best)
    predictions = F.linear(test.to(x.device), weight, bias).argmax(1).cpu()
    details = {"lambda": best, "validation_accuracy": shown[best]}
    return predictions, describe(len(y), metric, seed, lambdas, validation is not None), details


def middle_of_best(shown: dict[float, float]) -> float:
    """Return the middle one of the penalties with the best accuracy: small validation sets have many, and at the
    ends of the range a fit is decided by rounding.
    """
    best = sorted(penalty for penalty, accuracy in shown.items() if accuracy == max(shown.values()))
    return best[(len(best) - 1) // 2]


def choose(
    x: Tensor,
    y: Tensor,
    held: Tensor,
    held_labels: Tensor,
    classes: int,
    metric: str,
    lambdas: Sequence[float],
) -> dict[float, float]:
    """Return the accuracy in % on held-out images for each penalty; every fit begins where the last one ended."""
    key = "class_mean" if metric == MEAN_PER_CLASS else "accuracy"
    y, head, shown = y.to(x.device), None, {}
    for penalty in sorted(lambdas, reverse=True):
        head = fit(x, y, classes, penalty, head)
        answer = F.linear(held, *head).argmax(1).cpu()
        shown[penalty] = scores(answer, held_labels.cpu(), classes, {})[key]
    return shown


def describe(images: int, metric: str, seed: int, lambdas: Sequence[float], own: bool) -> dict[str, Any]:
    """Return the settings."""
    return {
        "name": "logistic_lbfgs",
        "normalisation": "none",
        "solver": "torch L-BFGS, strong Wolfe",
        "iterations": ITERATIONS,
        "lambdas": {"from": min(lambdas), "to": max(lambdas), "number": len(lambdas)},
        "chosen_on": "the set's validation split" if own else f"{VALIDATION_SHARE:g} of every training class",
        "refit": "training and validation images",
        "train_images": images,
        "view": "centre",
        "metric": metric,
        "seed": seed,
    }
