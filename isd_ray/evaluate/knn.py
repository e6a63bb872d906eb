"""Nearest-neighbour accuracy: how good are the features as they are, with nothing trained on top?

Two votes of the field over the same neighbours (cosine similarity, both sides L2-normalised here):

- majority: ISD's 1-NN and 20-NN (`eval_knn.py` of the ISD repository): every neighbour has one vote, ties are
  broken at random. The repository shuffles the votes and takes the first maximum; here the draw is keyed by a
  seed.
- weighted: the 200-NN of NPID (Wu et al., CVPR 2018): a neighbour votes with exp(cosine / temperature).

Memory is bounded by the chunk sizes: one block of similarities is `query_chunk * bank_chunk` floats (64 MiB
by default), beside the features and the `[queries, k]` result.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from isd_ray.errors import UserError

QUERY_CHUNK = 1024
BANK_CHUNK = 16384


def knn(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    k: int,
    *,
    classes: int,
    weighted: bool = False,
    temperature: float = 0.07,
    seed: int = 0,
    query_chunk: int = QUERY_CHUNK,
    bank_chunk: int = BANK_CHUNK,
) -> Tensor:
    """Return the class that the k nearest images of the bank give to each query: int64 [Q].

    bank: float [N, d]; bank_labels: int64 [N] in [0, classes); queries: float [Q, d].
    Raises UserError where k exceeds the bank or a label is out of range.
    """
    check_labels(bank_labels, len(bank), classes, "bank")
    similarity, row = neighbours(bank, queries, k, query_chunk=query_chunk, bank_chunk=bank_chunk)
    labels = bank_labels.cpu()[row]
    if weighted:
        return weighted_vote(similarity, labels, classes, temperature, seed)
    return majority_vote(labels, classes, seed)


@torch.no_grad()
def neighbours(
    bank: Tensor, queries: Tensor, k: int, *, query_chunk: int = QUERY_CHUNK, bank_chunk: int = BANK_CHUNK
) -> tuple[Tensor, Tensor]:
    """Return cosine similarity float32 [Q, k] and bank row int64 [Q, k] of the k nearest, nearest first, on
    the CPU.

    The first j columns are the j nearest, so one call with the largest k serves every smaller one. The
    products run where `queries` lie; the bank may stay in main memory, it is moved block by block. Rows of
    equal similarity come in the order of torch.topk.
    """
    check_k(k, len(bank))
    found = [
        _neighbours(bank, F.normalize(q.float(), dim=1), k, bank_chunk) for q in queries.split(query_chunk)
    ]
    similarity, row = zip(*found, strict=True)
    return torch.cat(similarity), torch.cat(row)


def _neighbours(bank: Tensor, q: Tensor, k: int, bank_chunk: int) -> tuple[Tensor, Tensor]:
    """The k nearest of one chunk of unit queries: a running top k over the blocks of the bank."""
    similarity = q.new_empty(len(q), 0)
    row = torch.empty(len(q), 0, dtype=torch.int64, device=q.device)
    for start in range(0, len(bank), bank_chunk):
        block = F.normalize(bank[start : start + bank_chunk].to(q.device).float(), dim=1)
        near, index = (q @ block.T).topk(min(k, len(block)), dim=1)
        similarity, row = torch.cat([similarity, near], 1), torch.cat([row, index + start], 1)
        similarity, keep = similarity.topk(min(k, similarity.shape[1]), dim=1)
        row = row.gather(1, keep)
    return similarity.cpu(), row.cpu()


def merge(parts: Sequence[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """Return similarity and row [Q, k] of the k nearest of a bank, from those of its parts, nearest first.

    parts: similarity and row of the *whole* bank, [Q, k'] each, where k' is k or all that the part has.
    """
    similarity, row = (torch.cat(columns, 1) for columns in zip(*parts, strict=True))
    similarity, keep = similarity.topk(k, dim=1)
    return similarity, row.gather(1, keep)


def majority_vote(labels: Tensor, classes: int, seed: int = 0) -> Tensor:
    """Return the most frequent class of each row of int64 [Q, k]; ties are broken at random by `seed`."""
    return _vote(torch.ones(labels.shape, dtype=torch.float64), labels, classes, seed)


def weighted_vote(
    similarity: Tensor, labels: Tensor, classes: int, temperature: float = 0.07, seed: int = 0
) -> Tensor:
    """Return argmax_c sum_{j: y_j = c} exp(similarity_j / temperature) for each row of [Q, k]: int64 [Q]."""
    nearest = similarity.max(
        dim=1, keepdim=True
    ).values  # a factor of the whole row: it only keeps exp in range
    return _vote(((similarity - nearest).double() / temperature).exp(), labels, classes, seed)


def _vote(weights: Tensor, labels: Tensor, classes: int, seed: int, chunk: int = 1024) -> Tensor:
    """The class of the greatest sum of weights. A tie falls to a vote drawn at random among those of the tied
    classes: equally many a class where all weights are 1, so every tied class has the same chance.
    """
    chance = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed))
    winners = []
    for w, y, c in zip(weights.split(chunk), labels.split(chunk), chance.split(chunk), strict=True):
        scores = (
            w.new_zeros(len(y), classes).scatter_add_(1, y, w).gather(1, y)
        )  # each vote's class score: Q x k
        tied = scores == scores.max(dim=1, keepdim=True).values
        winners.append(y.gather(1, (tied * (1 + c)).argmax(dim=1, keepdim=True)).squeeze(1))
    return torch.cat(winners)


def check_k(k: int, images: int) -> None:
    """Raise UserError unless a bank of so many images has k neighbours."""
    if not 1 <= k <= images:
        raise UserError(f"k = {k} neighbours of a bank of {images} images: choose k between 1 and {images}.")


def check_labels(labels: Tensor, images: int, classes: int, name: str) -> None:
    """Raise UserError unless there is one label in [0, classes) for each image of the set called `name`."""
    if len(labels) != images:
        raise UserError(f"The {name} has {images} images and {len(labels)} labels: give one label an image.")
    if images == 0:
        raise UserError(f"The {name} is empty: evaluation needs at least one labelled image in it.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise UserError(
            f"The {name} has an image with label {wrong}, outside 0..{classes - 1}: "
            f"leave unlabelled images (-1) out, or correct the number of classes."
        )
