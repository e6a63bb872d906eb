"""torchvision's classification sets name their splits in many ways: one table maps "train" and "test" to
arguments.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torchvision import datasets

from isd_ray.data.files import AbsentError, read_bytes
from isd_ray.data.samples import Sample
from isd_ray.data.sources import png
from isd_ray.errors import UserError, nearest, printable

_BY_TRAIN: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
_BY_SPLIT: dict[str, dict[str, Any]] = {"train": {"split": "train"}, "test": {"split": "test"}}
_BY_VAL: dict[str, dict[str, Any]] = {"train": {"split": "train"}, "test": {"split": "val"}}
_WITH_VAL: dict[str, dict[str, Any]] = {**_BY_SPLIT, "val": {"split": "val"}}
_WHOLE: dict[str, dict[str, Any]] = {"train": {}}

SETS: dict[str, dict[str, dict[str, Any]]] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "QMNIST", "USPS"), _BY_TRAIN),
    **dict.fromkeys(("Food101", "GTSRB", "StanfordCars", "FER2013", "LFWPeople"), _BY_SPLIT),
    **dict.fromkeys(("Flowers102", "DTD", "PCAM", "FGVCAircraft", "RenderedSST2"), _WITH_VAL),
    **dict.fromkeys(("ImageNet", "Imagenette", "CLEVRClassification"), _BY_VAL),
    **dict.fromkeys(("Caltech101", "Caltech256", "EuroSAT", "SUN397", "SEMEION"), _WHOLE),
    "Country211": {"train": {"split": "train"}, "val": {"split": "valid"}, "test": {"split": "test"}},
    "EMNIST": {s: {"split": "balanced", "train": s == "train"} for s in ("train", "test")},
    "FakeData": {"train": {"size": 1000}, "test": {"size": 200, "random_offset": 1000}},
    "INaturalist": {
        "train": {"version": "2021_train"},
        "test": {"version": "2021_valid"},
        "2018": {"version": "2018"},
    },
    "Omniglot": {"train": {"background": True}, "test": {"background": False}},
    "OxfordIIITPet": {"train": {"split": "trainval"}, "test": {"split": "test"}},
    "Places365": {
        "train": {"split": "train-standard", "small": True},
        "test": {"split": "val", "small": True},
    },
    "STL10": {**_BY_SPLIT, "unlabeled": {"split": "unlabeled"}},
    "SVHN": {**_BY_SPLIT, "extra": {"split": "extra"}},
}


def build(name: str, split: str, root: str | None, download: bool) -> Any:
    """Return the torchvision set.

    Args:
        root: folder that holds (or gets) torchvision's files.
        download: fetch the files where they are missing.

    Raises:
        UserError: unknown name or split, missing files, or no network.
    """
    if name not in SETS:
        raise UserError(
            f"unknown torchvision set '{printable(name)}'.{nearest(name, SETS)} Known: {', '.join(sorted(SETS))}"
        )
    if split not in SETS[name]:
        raise UserError(f"torchvision:{name} has no split '{split}': there are {', '.join(SETS[name])}")
    kind = getattr(datasets, name)
    known = inspect.signature(kind).parameters
    arguments = dict(SETS[name][split])
    if "root" in known:
        if root is None:
            raise UserError(f"torchvision:{name} needs a root: the folder that holds torchvision's files")
        arguments["root"] = root
    if "download" in known or issubclass(kind, datasets.MNIST):  # whose relatives pass it on unseen
        arguments["download"] = download
    return _construct(kind, name, arguments, download)


def _construct(kind: Any, name: str, arguments: dict[str, Any], download: bool) -> Any:
    try:
        return kind(**arguments)
    except OSError as error:
        if download:
            fault = f"cannot download torchvision:{name} ({_line(error)}): is there a network? "
            place = f"Otherwise put its files under '{arguments.get('root')}'"
            raise UserError(printable(fault + place)) from error
        raise _missing(name, arguments, error) from error
    except (RuntimeError, ValueError, ImportError) as error:
        raise _missing(name, arguments, error) from error


def _missing(name: str, arguments: dict[str, Any], error: Exception) -> AbsentError:
    remedy = "" if arguments.get("download") else ", or allow the download (--download)"
    fault = f"torchvision:{name} cannot be read under '{arguments.get('root')}' ({_line(error)})"
    return AbsentError(printable(f"{fault}: put its files there{remedy}"))


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def class_names(data: Any) -> list[str]:
    """Return the class names of a torchvision set, or [] where it has none."""
    names = getattr(data, "classes", None) or getattr(data, "categories", None)
    names = names or getattr(data, "all_categories", None)  # of iNaturalist: their folders
    if isinstance(names, list | tuple) and all(isinstance(n, str | tuple) for n in names):
        return [n if isinstance(n, str) else n[0] for n in names]
    return [str(i) for i in range(getattr(data, "num_classes", 0))]


def item(data: Any, i: int) -> tuple[Any, int | None]:
    """Return (the bytes of the image file, or a PIL image where there is no file; label or None)."""
    if isinstance(data, datasets.INaturalist):
        label, name = data.index[i]
        return read_bytes(str(Path(data.root, data.all_categories[label], name))), int(label)
    files = getattr(data, "samples", None) or getattr(data, "_samples", None)
    if isinstance(files, list) and isinstance(files[i][0], str | Path):
        path, label = files[i]
        return read_bytes(str(path)), int(label)
    image, label = data[i]
    return image, None if label is None or int(label) < 0 else int(label)


@dataclass(frozen=True)
class TorchvisionSource:
    """Items [start, stop) of a torchvision set; files of folder-like sets are kept as they are, arrays become
    PNG.
    """

    name: str
    split: str
    root: str | None
    start: int
    stop: int
    classes: list[str] = field(default_factory=list)

    @staticmethod
    def open(name: str, split: str, root: str | None, download: bool) -> "TorchvisionSource":
        data = build(name, split, root, download)
        return TorchvisionSource(name, split, root, 0, len(data), class_names(data))

    def __len__(self) -> int:
        return self.stop - self.start

    def names(self) -> list[str]:
        return [f"{self.split}/{i:07d}" for i in range(self.start, self.stop)]

    def slice(self, start: int, stop: int) -> "TorchvisionSource":
        return replace(self, start=self.start + start, stop=min(self.start + stop, self.stop))

    def __iter__(self) -> Iterator[Sample]:
        data = _torchvision(self.name, self.split, self.root)
        for i, name in zip(range(self.start, self.stop), self.names(), strict=True):
            image, label = item(data, i)
            yield Sample(name, image if isinstance(image, bytes) else png(image), label)


@lru_cache(maxsize=1)  # a worker reads many slices of one set
def _torchvision(name: str, split: str, root: str | None) -> Any:
    return build(name, split, root, download=False)
