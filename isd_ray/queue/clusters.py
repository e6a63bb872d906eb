"""Spherical k-means over the rows of a bank, each rank with its own rows."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from isd_ray.queue.bank import Bank

SCORES = 1 << 24  # similarities held at a time


@torch.no_grad()
def spherical_kmeans(
    bank: Bank, columns: slice, clusters: int, iterations: int = 10
) -> tuple[Tensor, Tensor]:
    """Cluster the bank's written embeddings, columns `columns` of each, by cosine (DeepCluster-v2, Caron et al. 2020).

    Returns centroids [clusters, d] of length 1, the same on all ranks, and the cluster int64 [rows] of each row that
    this rank holds; -1 where none was ever written. Centroids start at rows drawn by the bank; a cluster that loses all
    its rows keeps its centroid. Collective; costs rows x clusters x d multiplications an iteration and rank.
    """
    centroids = _first(bank, columns, clusters)
    rows = F.normalize(bank.keys[bank.written][:, columns], dim=1)
    nearest = _assign(rows, centroids)
    for _ in range(iterations):
        sums = torch.zeros_like(centroids).index_add_(0, nearest, rows)
        sizes = torch.bincount(nearest, minlength=clusters)
        if bank.world > 1:
            dist.all_reduce(sums, group=bank.group)
            dist.all_reduce(sizes, group=bank.group)
        centroids = torch.where(sizes[:, None] > 0, F.normalize(sums, dim=1), centroids)
        nearest = _assign(rows, centroids)
    ids = torch.full((len(bank.keys),), -1, device=bank.device)
    ids[bank.written] = nearest
    return centroids, ids


def _first(bank: Bank, columns: slice, clusters: int) -> Tensor:
    """Embeddings of images drawn from the whole set, no two alike, the same for any number of ranks.

    (Of two equal centroids rounding would choose, and not alike on every number of ranks.)
    """
    return F.normalize(bank.shared(bank.draw_distinct(clusters))[:, columns], dim=1)


def _assign(rows: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid of each row."""
    step = max(SCORES // len(centroids), 1)
    parts = [(part @ centroids.T).argmax(dim=1) for part in rows.split(step)]
    return torch.cat([torch.zeros(0, dtype=torch.int64, device=rows.device), *parts])
