"""What a protocol is called and what it needs of the data, known without features, so that faults show before training.

A name is a family and, in some, a number: `knn20`, `knn200_weighted`, `fewshot10` (labelled images a class), `labels1`
(percent of the labelled images), `transfer/cifar10`. Imports no torch: the configuration checks names.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from isd_ray.errors import UserError, nearest, shown
from isd_ray.evaluate.transfer_sets import TRANSFER_SETS

DEFAULT = ("knn1", "knn20", "knn200_weighted", "linear")
FAMILIES = {  # pattern of the whole name -> family
    r"knn([1-9]\d{0,8})": "knn",
    r"knn([1-9]\d{0,8})_weighted": "knn_weighted",
    r"linear": "linear",
    r"linear_sdclr": "linear_sdclr",
    r"linear_bcl": "linear_bcl",
    r"fewshot([1-9]\d{0,8})": "fewshot",
    r"labels([1-9]\d?|100)": "labels",
    r"nmi": "nmi",
    r"ari": "ari",
    r"transfer/(.+)": "transfer",
}
EXAMPLES = (
    *DEFAULT, "linear_sdclr", "linear_bcl", "fewshot10", "labels1", "labels10", "nmi", "ari",
    *(f"transfer/{name}" for name in TRANSFER_SETS),
)  # fmt: skip


class Name(NamedTuple):
    """A protocol's name in parts; `number` is 0 in a family without one, `target` "" but for transfer."""

    family: str
    number: int = 0
    target: str = ""


def parse(name: str) -> Name:
    """Read a protocol's name; raises UserError with the nearest one."""
    for pattern, family in FAMILIES.items():
        match = re.fullmatch(pattern, name)
        if match and family == "transfer":
            if match[1] not in TRANSFER_SETS:
                break
            return Name(family, target=match[1])
        if match:
            return Name(family, int(match[1]) if match.groups() else 0)
    sets = f", SET one of {', '.join(TRANSFER_SETS)}" if name.startswith("transfer") else ""
    raise UserError(
        f"unknown protocol {shown(name)}.{nearest(name, EXAMPLES)} There are knnK, knnK_weighted, "
        f"linear, linear_sdclr, linear_bcl, fewshotN, labelsP (percent), nmi, ari, transfer/SET"
        f"{sets}"
    )


def check_protocols(
    names: Sequence[str],
    bank_counts: Sequence[int],
    test_counts: Sequence[int],
    *,
    transfer_root: str | None = None,
) -> list[str]:
    """Return every fault of the protocols on this data, a sentence each; [] where all can run.

    bank_counts, test_counts [C]: labelled images of each class in bank and test set. Unknown and repeated names, a k
    beyond the bank, few-shot beyond the smallest class, a share of labels that is no image, transfer without
    `transfer_root`, and classes that only bank or test set have.
    """
    return [
        *name_faults(names),
        *transfer_faults(names, transfer_root),
        *_size_faults(names, bank_counts, test_counts),
        *class_faults(bank_counts, test_counts),
    ]


def name_faults(names: Sequence[str]) -> list[str]:
    """Return a fault for each name that is unknown or stands there twice, and one where there is no name."""
    faults = [] if names else [f"no protocol is named: choose some of {', '.join(EXAMPLES)}"]
    for name in dict.fromkeys(names):
        if list(names).count(name) > 1:
            faults.append(f"protocol {shown(name)} is named twice")
        try:
            parse(name)
        except UserError as error:
            faults.append(str(error))
    return faults


def transfer_faults(names: Sequence[str], root: str | None) -> list[str]:
    """Return a fault where transfer is asked for and nobody says where the sets lie."""
    asked = [name for name in names if name.startswith("transfer/")]
    if not asked or root is not None:
        return []
    return [f"{', '.join(asked)}: give --evaluate.transfer_root, the folder that holds torchvision's files"]


def _size_faults(names: Sequence[str], bank: Sequence[int], test: Sequence[int]) -> Iterator[str]:
    for name in dict.fromkeys(names):
        try:
            fault = impossible(parse(name), bank, test)
        except UserError:
            continue
        if fault:
            yield f"{name}: {fault}"


def impossible(name: Name, bank: Sequence[int], test: Sequence[int]) -> str | None:
    """Return why a protocol cannot run on sets with so many images a class, None where it can."""
    images, sizes = int(sum(bank)), {c: int(n) for c, n in enumerate(bank) if n}
    if name.family in ("knn", "knn_weighted") and name.number > images:
        return f"the bank has {images} images, fewer than k = {name.number}"
    if name.family.startswith("linear") and images < 2:
        return f"the bank has {images} images; a classifier needs at least 2"
    rarest = min(sizes, key=lambda c: sizes[c], default=0)
    if name.family == "fewshot" and name.number > sizes.get(rarest, 0):
        return f"class {rarest} has {sizes.get(rarest, 0)} images in the bank, fewer than {name.number}"
    if name.family == "labels" and share_of(sizes.get(rarest, 0), name.number) < 1:
        return (
            f"class {rarest} has {sizes.get(rarest, 0)} images in the bank, of which {name.number} % is none"
        )
    if name.family in ("nmi", "ari"):
        clusters = sum(1 for n in test if n)
        if clusters < 2:
            return f"the test set has {clusters} classes; clusters are compared with at least 2"
    return None


def share_of(images: int, percent: int) -> int:
    """Return `percent` % of a number of images, halves rounded up."""
    return (images * percent + 50) // 100


def class_faults(bank_counts: Sequence[int], test_counts: Sequence[int]) -> list[str]:
    """Return a fault for the classes that only the bank has, and one for those that only the test set has."""
    pairs = list(zip(bank_counts, test_counts, strict=True))
    untested = [c for c, (bank, test) in enumerate(pairs) if bank and not test]
    unlabelled = [c for c, (bank, test) in enumerate(pairs) if test and not bank]
    faults = []
    if untested:
        faults.append(
            f"{_classes(untested)} labelled images and no test image: there is no accuracy to report"
        )
    if unlabelled:
        faults.append(f"{_classes(unlabelled)} test images and none in the bank: no answer can be right")
    return faults


def _classes(numbers: Sequence[int], shown: int = 8) -> str:
    some = ", ".join(map(str, numbers[:shown])) + (", ..." if len(numbers) > shown else "")
    return f"class {some} has" if len(numbers) == 1 else f"classes {some} have"
