"""The pretraining sets of a study: how many images each class has there, and whether they can be measured on."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isd_ray.config import Config
from isd_ray.data.catalog import Splits
from isd_ray.data.index import class_counts, classes
from isd_ray.errors import UserError
from isd_ray.evaluate.groups import class_groups
from isd_ray.evaluate.names import class_faults, name_faults, size_faults, transfer_faults
from isd_ray.study.faults import Faults
from isd_ray.study.spec import Cell, Imbalance, Study, Subset
from isd_ray.train.evaluation import choose_bank, grouping
from isd_ray.train.trainer import check_sizes, open_splits

TWO_SIZES = ("large_small", "isd_8_30", "step")
# They may leave classes out.
CHOSEN_CLASSES = ("counts", "large_small", "isd_8_30", "list", "natural", "none")


@dataclass(frozen=True)
class Facts:
    """What the report must know of a subset: names, pretraining images, test images of each class, and groups."""

    names: list[str]
    counts: list[int]
    tested: list[int]
    groups: dict[str, list[int]] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """Pretraining images."""
        return sum(self.counts)


def look_at(study: Study, configs: Mapping[Cell, Config], faults: Faults) -> dict[Subset, Facts]:
    """Open every subset once and note all that cannot work on it."""
    facts: dict[Subset, Facts] = {}
    broken: set[Subset] = set()
    open_once = opener()
    for cell, config in configs.items():
        subset = cell.subset
        if subset in broken:
            continue
        try:
            splits = open_once(config)
        except UserError as error:
            broken.add(subset)
            faults.add(str(error), subset.name)
            continue
        try:
            check_sizes(config, splits.train, quiet=True)
        except UserError as error:
            faults.add(str(error), f"{cell.setting.name}, {cell.method}")
        if subset in facts:
            continue
        for text in _subset_faults(study, subset, config, splits):
            faults.add(text, subset.name)
        for text in transfer_faults(config.evaluate.protocols, config.evaluate.transfer_root):
            faults.add(text)
        facts[subset] = _facts(study.imbalances[subset.setting.imbalance], splits)
    return facts


def opener() -> Callable[[Config], Splits]:
    """Return `open_splits` that remembers the last few: the cells of one subset come one after another."""
    places: Any = {"data": True, "evaluate": {"bank"}}
    kept = functools.lru_cache(maxsize=2)(lambda text: open_splits(by_text[text]))
    by_text: dict[str, Config] = {}

    def open_once(config: Config) -> Splits:
        text = config.model_dump_json(include=places)
        by_text[text] = config
        return kept(text)

    return open_once


def _facts(imbalance: Imbalance, splits: Splits) -> Facts:
    counts = class_counts(splits.train)
    tested = [0] * len(counts) if splits.test is None else class_counts(splits.test).tolist()
    # A class without images was not chosen, or is in no group: how rare it would be nobody can say.
    present = np.flatnonzero(counts)
    groups = class_groups(counts[present].tolist(), **_rule(imbalance, splits))
    groups = {name: [int(present[c]) for c in members] for name, members in groups.items()}
    return Facts(list(classes(splits.train)), counts.tolist(), tested, groups)


def _rule(imbalance: Imbalance, splits: Splits) -> dict[str, Any]:
    """Return the arguments of `class_groups`."""
    wanted: Any = imbalance.groups
    if wanted == "auto":
        two = imbalance.scheme in TWO_SIZES
        wanted = "large_small" if two else grouping(splits.definition)
    elif not isinstance(wanted, str):
        wanted = wanted.model_dump()
    return {"by": wanted} if isinstance(wanted, str) else {"by": "thresholds", **wanted}


def _subset_faults(study: Study, subset: Subset, config: Config, splits: Splits) -> Iterator[str]:
    """Say what cannot be pretrained or measured as the file says."""
    bank, counts, names = choose_bank(config, splits), class_counts(splits.train), classes(splits.train)
    if splits.test is None or bank is None or not names:
        yield "there is no labelled test set, so nothing can be compared"
        return
    imbalance = study.imbalances[subset.setting.imbalance]
    if imbalance.scheme not in CHOSEN_CLASSES and (empty := np.flatnonzero(counts == 0)).size:
        yield f"{len(empty)} classes get no image, e.g. '{names[empty[0]]}'; lower the ratio or raise n_max"
    yield from _quota_faults(imbalance, subset, config, splits)
    labelled, tested = class_counts(bank).tolist(), class_counts(splits.test).tolist()
    yield from class_faults(labelled, tested)
    for metric in study.metrics:
        network, _, name = metric.partition(".")
        if not name_faults([name]):  # else it is said elsewhere
            small = size_faults([name], labelled, tested)
            yield from (f"metrics: {network}.{fault}" for fault in small)


def _quota_faults(imbalance: Imbalance, subset: Subset, config: Config, splits: Splits) -> Iterator[str]:
    """A class that has fewer images than the file asks for would quietly be another size."""
    asked = [imbalance.options.get(name) for name in ("per_class", "size_large", "size_small")]
    sizes = sorted(size for size in asked if isinstance(size, int))
    if not sizes or subset.setting.control or imbalance.scheme == "isd_8_30":
        return
    if config.data.validation:
        whole = config.model_copy(update={"data": config.data.model_copy(update={"validation": None})})
        splits = open_splits(whole)
    counts = class_counts(splits.train)
    for c in np.flatnonzero(counts):
        if counts[c] not in sizes:
            wanted = next((s for s in sizes if s > counts[c]), sizes[-1])
            yield f"{wanted} images a class are asked for, but '{classes(splits.train)[c]}' has {counts[c]}"
            return
