"""The vote of the nearest neighbours in the bank: nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from isd_ray.evaluate.protocol import Answer, Labelled, Name, Protocol

if TYPE_CHECKING:
    from torch import Tensor

TEMPERATURE = 0.07


def majority(data: Labelled, name: Name) -> Answer:
    """Every one of the k nearest has one vote (ISD's eval_knn.py)."""
    from isd_ray.evaluate.knn import majority_vote

    _, labels = data.once(nearest)
    found = majority_vote(labels[:, : name.number], data.classes, data.seed)
    vote = {"name": "isd_knn", "k": name.number, "vote": "majority, ties at random"}
    return Answer(vote | _alike(data), [found])


def weighted(data: Labelled, name: Name) -> Answer:
    """A vote weighs exp(cosine / 0.07) (NPID, Wu et al., CVPR 2018)."""
    from isd_ray.evaluate.knn import weighted_vote

    similarity, labels = (part[:, : name.number] for part in data.once(nearest))
    found = weighted_vote(similarity, labels, data.classes, TEMPERATURE, data.seed)
    vote = {"name": "npid_knn", "k": name.number, "vote": "weighted by exp(similarity / temperature)"}
    return Answer(vote | {"temperature": TEMPERATURE} | _alike(data), [found])


def nearest(data: Labelled) -> tuple[Tensor, Tensor]:
    """Return similarity and label [Q, k] of the nearest of the bank, for the largest k that is asked for."""
    from isd_ray.evaluate.knn import neighbours

    k = max(name.number for name in data.asked if name.protocol in (KNN, KNN_WEIGHTED))
    if data.search is not None:
        similarity, row = data.search(data.test, k)
    else:
        similarity, row = neighbours(data.whole_bank, data.test.to(data.device), k)
    return similarity, data.bank_labels.cpu()[row]


def _alike(data: Labelled) -> dict[str, Any]:
    return {"normalisation": "l2", "similarity": "cosine", "seed": data.seed}


def why_impossible(name: Name, bank: Sequence[int], test: Sequence[int]) -> str | None:
    """A vote of fewer neighbours is another metric, so k is never changed silently."""
    images = sum(bank)
    return f"the bank has {images} images, fewer than k = {name.number}" if name.number > images else None


KNN = Protocol(
    form="knnK",
    pattern=r"knn(?P<number>[1-9][0-9]{0,8})",
    examples=("knn1", "knn20"),
    help="majority vote of the K nearest of the bank",
    title="{number}-NN",
    run=majority,
    why_impossible=why_impossible,
    cheap=True,
    main=True,
)
KNN_WEIGHTED = Protocol(
    form="knnK_weighted",
    pattern=r"knn(?P<number>[1-9][0-9]{0,8})_weighted",
    examples=("knn200_weighted",),
    help="vote of the K nearest, weighted by exp(cosine / 0.07)",
    title="{number}-NN\nweighted",
    run=weighted,
    why_impossible=why_impossible,
    cheap=True,
    main=True,
)
