"""What a protocol is: one record, which everything reads that lists, checks, runs or prints protocols.

A protocol is a file in `isd_ray/evaluate/protocols/` and is found there by itself. Neither this module nor a record
imports torch: the configuration checks names quickly. What computes is imported inside of `run`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from isd_ray.evaluate.linear import LinearRecipe

T = TypeVar("T")
Search = Callable[["Tensor", int], tuple["Tensor", "Tensor"]]  # queries, k -> similarity and bank row [Q, k]


def always(name: Name, bank: Sequence[int], test: Sequence[int]) -> str | None:
    """Return None: the protocol can run on any sets."""
    return None


@dataclass(frozen=True)
class Protocol:
    """A protocol, or several whose names differ in a number or a target.

    form: as it is listed, "knnK"; pattern: of the whole name, with the groups `number` or `target`; examples: names
    that a misspelt one may mean. help: what it is, in a line. title: in tables, of {number} and {target}; a line break
    divides it. A protocol whose settings change gets another `version`: numbers of different versions do not compare.

    why_impossible: why a name cannot run on sets with so many images a class (bank [C], test set [C]), else None.
    cheap: it may be measured every few epochs, and be the goal of a sweep. main: it stands beside the groups of
    classes. by_class: it answers for each test image, so there are means over classes and groups. bank, whole_bank,
    test, labels, other_set: it needs the bank, all of it in memory, the test set, labels, the set that is its target.
    """

    form: str
    pattern: str
    examples: tuple[str, ...]
    help: str
    title: str
    run: Callable[[Labelled, Name], Answer]
    version: int = 1
    why_impossible: Callable[[Name, Sequence[int], Sequence[int]], str | None] = always
    cheap: bool = False
    main: bool = False
    by_class: bool = True
    bank: bool = True
    whole_bank: bool = False
    test: bool = True
    labels: bool = True
    other_set: bool = False


class Name(NamedTuple):
    """A protocol's name in parts: `number` is 0 and `target` "" where its record has none."""

    protocol: Protocol
    number: int = 0
    target: str = ""

    @property
    def title(self) -> str:
        """What it is called on a page, e.g. "20-NN"; a line break divides it."""
        return self.protocol.title.format(number=self.number, target=self.target)

    def impossible(self, bank: Sequence[int], test: Sequence[int]) -> str | None:
        """Return why it cannot run on sets with so many images a class, None where it can."""
        return self.protocol.why_impossible(self, bank, test)


class TransferFeatures(NamedTuple):
    """Features and labels of another labelled set; `validation` where it has a split of its own for that."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int
    validation: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """What one network makes of a labelled bank [N, d] and a test set [Q, d].

    asked: what will run on it. bank: None where it does not fit into memory; then `search` finds neighbours in it.
    transfer: features of other sets by their name.
    """

    asked: Sequence[Name]
    bank: Tensor | None
    bank_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int
    seed: int
    device: str | torch.device
    search: Search | None
    transfer: Mapping[str, TransferFeatures]
    linear_recipe: LinearRecipe
    found: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, find: Callable[[Labelled], T]) -> T:
        """Return find(self), computed at the first call: what several protocols share."""
        if find not in self.found:
            self.found[find] = find(self)
        return self.found[find]

    @property
    def whole_bank(self) -> Tensor:
        """The bank, where it is in memory."""
        assert self.bank is not None, "checked before a protocol runs"
        return self.bank


@dataclass(frozen=True)
class Answer:
    """What a protocol found: a number, or a class for each test image, several times where labels were drawn.

    settings: stored beside it. labels, classes: of the images that the predictions are for, where these are not the
    test set's. by_class_mean: the set is reported by the mean over classes. details: what differs between networks, as
    a chosen penalty.
    """

    settings: dict[str, Any]
    predictions: Sequence[Tensor] = ()
    value: float | None = None
    labels: Tensor | None = None
    classes: int = 0
    by_class_mean: bool = False
    details: dict[str, Any] = field(default_factory=dict)
