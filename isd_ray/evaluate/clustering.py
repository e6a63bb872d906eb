"""Clusters without labels: do the features fall into groups that are the classes?

k-means on L2-normalised features, with as many clusters as the test set has classes, compared with the labels by
normalised mutual information (arithmetic mean of the entropies) and by the adjusted Rand index; both from scikit-learn.
On a long-tailed test set k-means tends to split large classes: read these numbers on a balanced one.
"""

from typing import Any

import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor
from torch.nn import functional as F

STARTS = 10


def clusters(features: Tensor, number: int, seed: int = 0) -> Tensor:
    """Return the k-means cluster of each of the features [N, d], int64 [N]; the best of 10 starts (k-means++)."""
    x = F.normalize(features.float(), dim=1).cpu().numpy()
    found = KMeans(number, n_init=STARTS, random_state=seed).fit_predict(x)
    return torch.from_numpy(found).to(torch.int64)


def agreement(found: Tensor, labels: Tensor) -> dict[str, float]:
    """Return {"nmi": .., "ari": ..} of clusters and labels, both int64 [N], times 100; ari of chance is 0."""
    a, b = labels.cpu().numpy(), found.cpu().numpy()
    return {
        "nmi": 100 * float(normalized_mutual_info_score(a, b)),
        "ari": 100 * float(adjusted_rand_score(a, b)),
    }


def describe(number: int, seed: int) -> dict[str, Any]:
    """Return the settings of both numbers."""
    return {
        "name": "kmeans",
        "features": "test set",
        "normalisation": "l2",
        "clusters": number,
        "starts": STARTS,
        "scale": "times 100",
        "seed": seed,
    }
