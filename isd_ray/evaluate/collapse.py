"""Did the features collapse? Measures that need no labels.

A method may reach a low loss by mapping all images to one point or to a few directions; these numbers show it
before any accuracy does.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

DEAD = 0.01  # of the std of a dimension that is spread as on the sphere


@torch.no_grad()
def describe_spread(features: Tensor) -> dict[str, Any]:
    """Return dimension and label-free measures of collapse of features [N, d].

    `std` is the mean and `std_by_dimension` minimum, median and maximum of `dimension_std`; `dead_dimensions` of d
    have less than 1 % of what an even spread gives.
    """
    std = dimension_std(features)
    ends = torch.quantile(std, torch.tensor([0.0, 0.5, 1.0], dtype=std.dtype)).tolist()
    return {
        "dim": features.shape[1],
        "std": float(std.mean()),
        "std_by_dimension": dict(zip(("min", "median", "max"), ends, strict=True)),
        "dead_dimensions": int((std < DEAD).sum()),
        "rankme": rankme(features),
        "uniformity": uniformity(features),
    }


@torch.no_grad()
def dimension_std(features: Tensor) -> Tensor:
    """Return the std of each dimension of the L2-normalised features [N, d], times sqrt(d): float64 [d].

    1 for features spread evenly over the sphere, 0 for a dimension that never changes.
    """
    return F.normalize(features.double(), dim=1).std(dim=0).cpu() * features.shape[1] ** 0.5


@torch.no_grad()
def normalised_std(features: Tensor) -> float:
    """Mean over dimensions of the std of the L2-normalised features [N, d], times sqrt(d).

    1 for features spread evenly over the sphere, 0 for one point (SimSiam, Chen and He, CVPR 2021, section
    4.1).
    """
    return float(dimension_std(features).mean())


@torch.no_grad()
def rankme(features: Tensor, epsilon: float = 1e-7) -> float:
    """Effective rank of features [N, d]: exp of the entropy of the normalised singular values, in [1, min(N,
    d)].

    RankMe (Garrido et al., ICML 2023, equation 1). The singular values come from the smaller Gram matrix in
    float64.
    """
    x = features.double()
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = singular / singular.sum().clamp(min=epsilon) + epsilon
    return float(torch.exp(-(p * p.log()).sum()))


@torch.no_grad()
def alignment(x: Tensor, y: Tensor, alpha: float = 2) -> float:
    """Mean |x - y|^alpha of the L2-normalised features [N, d] of two views of the same images: 0 is perfect.

    Wang and Isola, ICML 2020, equation 5.
    """
    return float((F.normalize(x, dim=1) - F.normalize(y, dim=1)).norm(dim=1).pow(alpha).mean())


@torch.no_grad()
def uniformity(features: Tensor, t: float = 2, rows: int = 4096, seed: int = 0) -> float:
    """log of the mean exp(-t |x - y|^2) over pairs of L2-normalised features [N, d]: 0 is collapse, lower is
    better.

    Wang and Isola, ICML 2020, equation 6. Of more than `rows` features a random sample of `rows` is used.
    """
    if len(features) > rows:
        features = features[
            torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:rows]
        ]
    distance = F.pdist(F.normalize(features.double(), dim=1))
    return float(distance.square().mul(-t).exp().mean().log())
