"""One function a protocol: features of one network in, answers and the stored protocol out.

`MEASURES` names them by family (`isd_ray/evaluate/names.py` reads the names). A protocol whose settings change gets
another version number: numbers of different versions do not compare.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from isd_ray.evaluate import clustering, draws, logistic
from isd_ray.evaluate.knn import majority_vote, neighbours, weighted_vote
from isd_ray.evaluate.linear import (
    BCL_RECIPE,
    ISD_RECIPE,
    SDCLR_FEWSHOT_RECIPE,
    SDCLR_RECIPE,
    LinearRecipe,
    linear,
)
from isd_ray.evaluate.names import Name
from isd_ray.evaluate.transfer_sets import TRANSFER_SETS

TEMPERATURE = 0.07
FEWSHOT_DRAWS = 5
Search = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # queries, k -> similarity and bank row, both [Q, k]


class TransferFeatures(NamedTuple):
    """Features and labels of another labelled set; `validation` where it has a split of its own for that."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int
    validation: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Labelled:
    """What one network makes of a labelled bank [N, d] and a test set [Q, d].

    bank: None where it does not fit into memory; then only kNN is possible, by `search`. k: the most neighbours that a
    protocol will ask for. transfer: features of other sets by their name.
    """

    bank: Tensor | None
    bank_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int
    seed: int = 0
    device: str | torch.device = "cpu"
    k: int = 1
    search: Search | None = None
    transfer: Mapping[str, TransferFeatures] = field(default_factory=dict)
    linear_recipe: LinearRecipe = ISD_RECIPE

    @cached_property
    def nearest(self) -> tuple[Tensor, Tensor]:
        """Similarity and label of the k nearest of the bank for each test image, searched once."""
        if self.search is not None:
            similarity, row = self.search(self.test, self.k)
        else:
            similarity, row = neighbours(self.whole_bank, self.test.to(self.device), self.k)
        return similarity, self.bank_labels.cpu()[row]

    @cached_property
    def clusters(self) -> tuple[Tensor, int]:
        """The cluster of each test image, and how many there are: the classes of the test set."""
        number = len(self.test_labels.unique())
        return clustering.clusters(self.test, number, self.seed), number

    @property
    def whole_bank(self) -> Tensor:
        """The bank, where it is in memory."""
        assert self.bank is not None, "checked before a protocol runs"
        return self.bank


@dataclass(frozen=True)
class Answer:
    """What a protocol found: a number, or a class for each test image, several times where labels were drawn.

    labels, classes: of the images that the predictions are for, where these are not the test set's. by_class_mean: the
    set is reported by the mean over classes. details: what differs between networks, as a chosen penalty.
    """

    protocol: dict[str, Any]
    predictions: Sequence[Tensor] = ()
    value: float | None = None
    labels: Tensor | None = None
    classes: int = 0
    by_class_mean: bool = False
    details: dict[str, Any] = field(default_factory=dict)


def knn_protocol(k: int, weighted: bool, seed: int) -> dict[str, Any]:
    """Return the protocol of a kNN accuracy: ISD's majority vote, or NPID's weighted one."""
    vote: dict[str, Any] = {"name": "isd_knn", "version": 1, "k": k, "vote": "majority, ties at random"}
    if weighted:
        vote |= {
            "name": "npid_knn",
            "vote": "weighted by exp(similarity / temperature)",
            "temperature": TEMPERATURE,
        }
    return vote | {"normalisation": "l2", "similarity": "cosine", "seed": seed}


def knn(data: Labelled, name: Name) -> Answer:
    """Majority vote of the k nearest (ISD's eval_knn.py)."""
    _, labels = data.nearest
    found = majority_vote(labels[:, : name.number], data.classes, data.seed)
    return Answer(knn_protocol(name.number, False, data.seed), [found])


def knn_weighted(data: Labelled, name: Name) -> Answer:
    """Vote of the k nearest weighted by exp(cosine / 0.07) (NPID, Wu et al., CVPR 2018)."""
    similarity, labels = (part[:, : name.number] for part in data.nearest)
    found = weighted_vote(similarity, labels, data.classes, TEMPERATURE, data.seed)
    return Answer(knn_protocol(name.number, True, data.seed), [found])


def _linear(
    data: Labelled, recipe: LinearRecipe, rows: Tensor | None = None, seed: int | None = None
) -> Answer:
    bank, labels = data.whole_bank, data.bank_labels
    if rows is not None:
        bank, labels = bank[rows], labels[rows]
    found, protocol = linear(
        [bank],
        labels,
        data.test,
        classes=data.classes,
        recipe=recipe,
        seed=data.seed if seed is None else seed,
        device=data.device,
    )
    return Answer(protocol, [found])


def linear_isd(data: Labelled, name: Name) -> Answer:
    """The linear head of ISD's eval_linear.py, on the whole bank."""
    return _linear(data, data.linear_recipe)


def linear_sdclr(data: Labelled, name: Name) -> Answer:
    """The linear head of SDCLR (learning rate 30 on raw features), on the whole bank."""
    return _linear(data, SDCLR_RECIPE)


def linear_bcl(data: Labelled, name: Name) -> Answer:
    """The linear head of BCL (Adam, 500 epochs), on the whole bank."""
    return _linear(data, BCL_RECIPE)


def fewshot(data: Labelled, name: Name) -> Answer:
    """SDCLR's few-shot head on n labelled images a class, the mean over five draws of them, as BCL's five lists."""
    answers = []
    for draw in range(FEWSHOT_DRAWS):
        seed = data.seed * FEWSHOT_DRAWS + draw
        rows = draws.balanced(data.bank_labels, name.number, data.classes, seed)
        answers.append(_linear(data, SDCLR_FEWSHOT_RECIPE, rows, seed))
    drawn = {"labels": f"{name.number} a class", "draws": FEWSHOT_DRAWS, "seed": data.seed}
    return Answer(answers[0].protocol | drawn, [answer.predictions[0] for answer in answers])


def labels(data: Labelled, name: Name) -> Answer:
    """The linear head of ISD's eval_linear.py on a share of every class, as the paper's 1 % and 10 % of ImageNet."""
    rows = draws.share(data.bank_labels, name.number, data.classes, data.seed)
    answer = _linear(data, data.linear_recipe, rows)
    return Answer(answer.protocol | {"labels": f"{name.number} % of every class"}, answer.predictions)


def nmi(data: Labelled, name: Name) -> Answer:
    """Normalised mutual information of k-means clusters and labels of the test set."""
    return _clustering(data, name)


def ari(data: Labelled, name: Name) -> Answer:
    """Adjusted Rand index of k-means clusters and labels of the test set."""
    return _clustering(data, name)


def _clustering(data: Labelled, name: Name) -> Answer:
    found, number = data.clusters
    value = clustering.agreement(found, data.test_labels)[name.family]
    return Answer(clustering.describe(number, data.seed), value=value)


def transfer(data: Labelled, name: Name) -> Answer:
    """Logistic regression on another set, by the set's own metric (isd_ray/evaluate/logistic.py)."""
    chosen, other = TRANSFER_SETS[name.target], data.transfer[name.target]
    found, protocol, details = logistic.transfer(
        other.train.to(data.device),
        other.train_labels,
        other.test.to(data.device),
        classes=other.classes,
        metric=chosen.metric,
        validation=None
        if other.validation is None
        else (other.validation[0].to(data.device), other.validation[1]),
        seed=data.seed,
    )
    protocol |= {"set": chosen.torchvision, "test_images": len(other.test_labels)}
    protocol |= {"note": chosen.note} if chosen.note else {}
    return Answer(protocol, [found], None, other.test_labels, other.classes, chosen.by_class_mean, details)


MEASURES: dict[str, Callable[[Labelled, Name], Answer]] = {
    "knn": knn,
    "knn_weighted": knn_weighted,
    "linear": linear_isd,
    "linear_sdclr": linear_sdclr,
    "linear_bcl": linear_bcl,
    "fewshot": fewshot,
    "labels": labels,
    "nmi": nmi,
    "ari": ari,
    "transfer": transfer,
}
NEEDS_WHOLE_BANK = ("linear", "linear_sdclr", "linear_bcl", "fewshot", "labels")
