"""k-means clusters of the test features, compared with the labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from isd_ray.evaluate.protocol import Answer, Labelled, Name, Protocol

if TYPE_CHECKING:
    from torch import Tensor


def run(data: Labelled, name: Name) -> Answer:
    """The agreement that is called like the protocol."""
    from isd_ray.evaluate.clustering import agreement, describe

    found, number = data.once(clusters)
    value = agreement(found, data.test_labels)[name.protocol.form]
    return Answer(describe(number, data.seed), value=value)


def clusters(data: Labelled) -> tuple[Tensor, int]:
    """Return the cluster of each test image int64 [Q], and how many there are: the classes of the test set."""
    from isd_ray.evaluate.clustering import clusters

    number = len(data.test_labels.unique())
    return clusters(data.test, number, data.seed), number


def why_impossible(name: Name, bank: Sequence[int], test: Sequence[int]) -> str | None:
    """One cluster says nothing."""
    number = sum(1 for n in test if n)
    few = number < 2
    return f"the test set has {number} classes; clusters are compared with at least 2" if few else None


NMI = Protocol(
    form="nmi",
    pattern="nmi",
    examples=("nmi",),
    help="normalised mutual information of k-means clusters and labels, times 100",
    title="NMI",
    run=run,
    why_impossible=why_impossible,
    cheap=True,
    by_class=False,
    bank=False,
)
ARI = Protocol(
    form="ari",
    pattern="ari",
    examples=("ari",),
    help="adjusted Rand index of the same clusters and the labels, times 100",
    title="ARI",
    run=run,
    why_impossible=why_impossible,
    cheap=True,
    by_class=False,
    bank=False,
)
