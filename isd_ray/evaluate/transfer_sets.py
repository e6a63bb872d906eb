"""Which sets features are transferred to, how each is split, and by which metric it is reported.

The sets and metrics are those of the ISD paper's table 2 and of BYOL's protocol (Grill et al., NeurIPS 2020, after
Kornblith et al., CVPR 2019). Where torchvision has no published split, the rule says what stands in for it.
"""

from dataclasses import dataclass
from typing import Literal

TOP1: Literal["top-1"] = "top-1"
MEAN_PER_CLASS: Literal["mean per class"] = "mean per class"


@dataclass(frozen=True)
class TransferSet:
    """One set.

    torchvision: name of torchvision's class; train, test: its splits; val: split on which the regularisation is
    chosen, None: `VALIDATION_SHARE` of every training class. Where `test` is None, `per_class` training images and at
    most `test_per_class` test images (None: all others) of every class are drawn. note: where the set differs from
    the published one.
    """

    torchvision: str
    metric: Literal["top-1", "mean per class"]
    train: str = "train"
    test: str | None = "test"
    val: str | None = None
    per_class: int = 0
    test_per_class: int | None = None
    note: str = ""

    @property
    def by_class_mean(self) -> bool:
        """Is the set reported by the mean over its classes?"""
        return self.metric == MEAN_PER_CLASS


VALIDATION_SHARE = 0.2
TRANSFER_SETS: dict[str, TransferSet] = {
    "food101": TransferSet("Food101", TOP1),
    "cifar10": TransferSet("CIFAR10", TOP1),
    "cifar100": TransferSet("CIFAR100", TOP1),
    "sun397": TransferSet("SUN397", TOP1, test=None, per_class=50, test_per_class=50,
                          note="50 + 50 images a class drawn by seed: torchvision lacks the published partitions"),
    "cars": TransferSet("StanfordCars", TOP1),
    "aircraft": TransferSet("FGVCAircraft", MEAN_PER_CLASS, val="val", note="100 variants"),
    "dtd": TransferSet("DTD", TOP1, val="val", note="first of the ten published splits"),
    "pets": TransferSet("OxfordIIITPet", MEAN_PER_CLASS),
    "caltech101": TransferSet("Caltech101", MEAN_PER_CLASS, test=None, per_class=30,
                              note="30 training images a class drawn by seed, the others are tested; torchvision "
                                   "leaves out the background class"),
    "flowers102": TransferSet("Flowers102", MEAN_PER_CLASS, val="val"),
    "inaturalist": TransferSet("INaturalist", TOP1, note="the 2021 competition's training and validation set"),
}  # fmt: skip
