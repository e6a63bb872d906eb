"""Projectors and predictors of all methods have one shape: linear layers, with a norm and a ReLU between."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from isd_ray.errors import UserError


def mlp(
    sizes: Sequence[int],
    norm: str = "bn",
    bias: bool = True,
    last_bias: bool = True,
    last_norm: str = "none",
) -> nn.Sequential:
    """Linear layers `sizes[0] -> sizes[1] -> ...`, with [norm, ReLU] after each but the last.

    norm: "bn" | "none", after the hidden layers; bias: of the hidden layers.
    last_bias: of the last layer; last_norm: "none" | "bn" | "bn_no_affine", after the last layer.
    Input [b, sizes[0]], output [b, sizes[-1]]. Raises UserError for fewer than two sizes or an unknown norm.

    >>> predictor = mlp([512, 512, 512], bias=False)     # ISD
    >>> projector = mlp([512, 1024, 128])                # ISD-plus
    >>> projector = mlp([512, 512, 128], norm="none")    # MoCo v2
    """
    if len(sizes) < 2:
        raise UserError(f"a head needs at least an input and an output size, not {list(sizes)}.")
    layers: list[nn.Module] = []
    for size_in, size in pairwise(sizes[:-1]):
        layers += [nn.Linear(size_in, size, bias=bias), *_norm(norm, size), nn.ReLU(inplace=True)]
    layers += [nn.Linear(sizes[-2], sizes[-1], bias=last_bias), *_norm(last_norm, sizes[-1])]
    return nn.Sequential(*layers)


def _norm(kind: str, size: int) -> list[nn.Module]:
    if kind == "none":
        return []
    if kind in ("bn", "bn_no_affine"):
        return [nn.BatchNorm1d(size, affine=kind == "bn")]
    raise UserError(f"unknown norm '{kind}' of a head: choose 'bn', 'bn_no_affine' or 'none'.")
