"""Which classes gain and which lose: accuracy for many/medium/few, large/small, and for every class.

A method for unbalanced data may help the rare classes and cost the frequent ones; one number hides that.
Groups are always formed from the class counts of the *pretraining subset*, also for a model that was
pretrained on something else, and the accuracy of a group is the mean over its classes. Balancedness (`std`)
is the population standard deviation of the group accuracies, as the long-tail literature (SDCLR and later)
defines it: lower is better.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isd_ray.errors import UserError, nearest

GROUPINGS = ("thirds", "thresholds", "large_small")
Groups = dict[str, list[int]]  # name of the group -> its classes, largest group counts first


def class_groups(
    train_counts: Sequence[int] | Tensor,
    by: str = "thirds",
    *,
    many: int = 100,
    few: int = 20,
    inclusive: bool = False,
) -> Groups:
    """Divide the classes by their number of pretraining images [C]; empty groups are left out.

    - "thirds" (CIFAR-LT): the lowest floor(C/3) classes are few, the next floor(C/3) medium, the rest many.
      Of equally frequent classes the later label counts as the rarer one.
    - "thresholds" (ImageNet-LT and the like): many > 100, few < 20 images, medium between; `inclusive` moves
      the two border counts outwards (many >= 100, few <= 20), as OLTR's code does.
    - "large_small" (ISD's 8 large and 30 small classes): cut at the geometric mean of the largest and
      smallest count.

    Where all counts are equal no class is rarer than another: thirds and large_small then give no groups, {}.
    """
    counts = np.asarray(train_counts)
    if by not in GROUPINGS:
        raise UserError(f"No grouping of classes is called '{by}' (there are {', '.join(GROUPINGS)})."
                        + nearest(by, GROUPINGS))  # fmt: skip
    if by == "thresholds":
        groups = _thresholds(counts, many, few, inclusive)
    elif len(counts) == 0 or counts.min() == counts.max():
        groups = {}
    else:
        groups = _thirds(counts) if by == "thirds" else _large_small(counts)
    return {name: sorted(int(c) for c in members) for name, members in groups.items() if len(members)}


def _thirds(counts: np.ndarray) -> dict[str, np.ndarray]:
    third = len(counts) // 3
    rarest_first = np.lexsort((-np.arange(len(counts)), counts))
    return {
        "many": rarest_first[2 * third :],
        "medium": rarest_first[third : 2 * third],
        "few": rarest_first[:third],
    }


def _thresholds(counts: np.ndarray, many: int, few: int, inclusive: bool) -> dict[str, np.ndarray]:
    if few > many:
        raise UserError(f"The threshold few = {few} lies above many = {many}: few must be the smaller one.")
    is_many = counts >= many if inclusive else counts > many
    is_few = (counts <= few if inclusive else counts < few) & ~is_many
    return {
        "many": np.flatnonzero(is_many),
        "medium": np.flatnonzero(~is_many & ~is_few),
        "few": np.flatnonzero(is_few),
    }


def _large_small(counts: np.ndarray) -> dict[str, np.ndarray]:
    is_large = counts > np.sqrt(float(counts.min()) * float(counts.max()))
    return {"large": np.flatnonzero(is_large), "small": np.flatnonzero(~is_large)}


def scores(predictions: Tensor, labels: Tensor, classes: int, groups: Groups) -> dict[str, Any]:
    """Return percentages: `accuracy` (over images), `class_mean`, `per_class` [C], `groups` {name: mean},
    `std`.

    predictions, labels: int64 [Q]. A class without test images has None, not 0, and takes no part in any
    mean; a group of such classes has None. `std` is None where a group has None or there are fewer than two
    groups.
    """
    tested = torch.bincount(labels, minlength=classes)
    hit = torch.bincount(labels[predictions == labels], minlength=classes)
    per_class = [100 * h / n if n else None for h, n in zip(hit.tolist(), tested.tolist(), strict=True)]
    return {"accuracy": 100 * int(hit.sum()) / len(labels), **means(per_class, groups)}


def means(per_class: Sequence[float | None], groups: Groups) -> dict[str, Any]:
    """Return what follows from the accuracies of the classes [C]: the other numbers of `scores`."""
    by_group = {name: _mean([per_class[c] for c in members]) for name, members in groups.items()}
    values = [v for v in by_group.values() if v is not None]
    complete = len(values) == len(by_group) >= 2
    return {
        "class_mean": _mean(per_class),
        "per_class": per_class,
        "groups": by_group,
        "std": float(np.std(values)) if complete else None,
    }


def mean_of(draws: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of several results of `scores` for the same test images, number by number."""
    first = draws[0]
    if len(draws) == 1:
        return dict(first)
    mean = {key: _mean([draw[key] for draw in draws]) for key in ("accuracy", "class_mean", "std")}
    per_class = [_mean(list(values)) for values in zip(*(draw["per_class"] for draw in draws), strict=True)]
    groups = {name: _mean([draw["groups"][name] for draw in draws]) for name in first["groups"]}
    return {**mean, "per_class": per_class, "groups": groups}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
