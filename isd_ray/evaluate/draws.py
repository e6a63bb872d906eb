"""Labelled subsets of a bank: what a protocol with few labels may look at, drawn by a seed.

All draws are prefixes of one shuffled list a class, so the rows for 10 labelled images a class lie among those for 20
of the same seed.
"""

import torch
from torch import Tensor

from isd_ray.evaluate.protocols.labels import share_of


def shuffled_by_class(labels: Tensor, classes: int, seed: int) -> list[Tensor]:
    """Return for each class its rows of `labels` int64 [N], in an order drawn by `seed`."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = order[labels.cpu()[order].argsort(stable=True)]
    return list(by_class.split(torch.bincount(labels.cpu(), minlength=classes).tolist()))


def balanced(labels: Tensor, images: int, classes: int, seed: int) -> Tensor:
    """Return rows int64 [M], ascending: `images` of every class that has any (all of a class with fewer)."""
    return torch.cat([rows[:images] for rows in shuffled_by_class(labels, classes, seed)]).sort().values


def share(labels: Tensor, percent: int, classes: int, seed: int) -> Tensor:
    """Return rows int64 [M], ascending: `percent` % of every class, halves rounded up."""
    lists = shuffled_by_class(labels, classes, seed)
    return torch.cat([rows[: share_of(len(rows), percent)] for rows in lists]).sort().values


def split(labels: Tensor, part: float, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return two disjoint sets of rows, ascending: `part` of every class (at least one image, never all of it but for
    a class of one, which stays in the first set whole), and the rest in the first set: (rest, part).
    """
    lists = shuffled_by_class(labels, classes, seed)
    sizes = [min(max(round(len(rows) * part), 1), len(rows) - 1) if len(rows) else 0 for rows in lists]
    chosen = torch.cat([rows[:n] for rows, n in zip(lists, sizes, strict=True)])
    rest = torch.cat([rows[n:] for rows, n in zip(lists, sizes, strict=True)])
    return rest.sort().values, chosen.sort().values
