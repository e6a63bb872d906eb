"""A study of imbalance needs many subsets of one set: each is a pure function of the index, a scheme and a
seed.

A scheme says how many images of each class are asked for (a quota); a class with fewer gives what it has. The
images are the first ones of the class's list, shuffled by (seed, class). So subsets of one seed are nested,
and the balanced control of the same size shares its images with the long-tailed set exactly as in the splits
of SDCLR (Jiang et al., ICML 2021). Rows stay in order of the index, so reading stays sequential.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import yaml

from isd_ray import definitions
from isd_ray.data.file_lists import listed
from isd_ray.data.index import class_counts, classes, labels
from isd_ray.data.scheme_options import (
    CAP,
    FEW,
    LARGE,
    SCHEMES,
    SMALL,
    Balanced,
    Control,
    Counts,
    Exponential,
    Isd830,
    LargeSmall,
    Listed,
    Pareto,
    Quota,
    Ranked,
    Step,
    read_options,
)
from isd_ray.errors import UserError, nearest, printable

__all__ = [
    "SCHEMES",
    "exponential_counts",
    "pareto_counts",
    "published_classes",
    "quota",
    "split_holdout",
    "step_counts",
    "subset",
]

# What a random stream is for: the same seed must not give related class orders and shuffles.
_IMAGES, _ORDER, _HOLDOUT, _DRAW = 0, 1, 2, 3


# -- counts by rank ------------------------------------------------------------------------------------------


def exponential_counts(n_classes: int, n_max: int, ratio: float) -> np.ndarray:
    """Return `int(n_max * ratio^(-i/(C-1)))` for rank i (LDAM, Cao et al., NeurIPS 2019) as int64[C]."""
    steps = max(n_classes - 1, 1)
    return np.array([int(n_max * (1 / ratio) ** (i / steps)) for i in range(n_classes)], np.int64)


def step_counts(n_classes: int, n_max: int, ratio: float) -> np.ndarray:
    """Return n_max for the first half of the classes and `int(n_max / ratio)` for the rest (LDAM) as
    int64[C].
    """
    few = int(n_max * (1 / ratio))
    return np.where(np.arange(n_classes) < n_classes // 2, n_max, few).astype(np.int64)


def pareto_counts(
    n_classes: int,
    n_max: int,
    *,
    alpha: float = 6.0,
    scale: float | None = None,
    floor: int = 5,
    mode: Literal["quantile", "draw"] = "quantile",
    seed: int = 0,
) -> np.ndarray:
    """Return class sizes by a shifted Pareto (Lomax) law, an analogue of ImageNet-LT and Places-LT, as
    int64[C].

    `n_r = min(n_max, int(floor + scale * (u_r^(-1/alpha) - 1)))`, largest first, with `u_r = (r + 1/2) / C`
    (quantile) or sorted uniform draws (draw). Without `scale`, the largest quantile is n_max; with
    a floor above n_max all classes have n_max. ImageNet-LT: alpha 6, scale 557, n_max 1280 for 1000
    classes; Places-LT: alpha 1.49, scale 96, n_max 4980 for 365 classes.
    """
    even = (np.arange(n_classes) + 0.5) / n_classes
    u = even if mode == "quantile" else 1 - np.sort(_rng(seed, _DRAW).random(n_classes))[::-1]
    if scale is None:
        scale = max(n_max - floor, 0) / (even[0] ** (-1 / alpha) - 1)
    size = np.floor(floor + scale * (u ** (-1 / alpha) - 1) + 1e-9)
    return np.minimum(n_max, size).astype(np.int64)


def _rng(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng([seed, *key])


# -- subsets -------------------------------------------------------------------------------------------------


def subset(table: pa.Table, scheme: str | None = None, /, **options: Any) -> pa.Table:
    """Return the rows of `table` that `scheme` chooses, in order of the table.

    Schemes, and what each takes besides `seed` (of the choice of images and of classes):
        natural (or None): every row.
        exponential, step: `ratio` = largest over smallest class.
        pareto: options alpha, scale, floor, mode.
        counts: option counts = images by rank, or {class name: images}, others have none.
        large_small: options n_large, size_large, size_small, n_small (None: the rest).
        isd_8_30: 8 classes of at most 1300 images and 30 of 100; option split = "D1".."D10" takes the
            published classes by WordNet id, without it ("") the classes are drawn by the seed.
        balanced: option per_class, or `of` = the scheme whose size is to be matched (the control D_b);
            further options are those of that scheme.
        list: options files = a text file, or keys (`file_lists`), missing = "error" | "skip".
    All but natural and list also take class_order ("label": class 0 is the largest; "random": by
    the seed) and holdout, images of each class that are left out beforehand (see `split_holdout`);
    exponential, step and pareto take n_max, images of the largest class (default: those there are).

    Raises:
        UserError: unknown scheme or option, a value that it does not take (`scheme_options`), or a
            scheme that needs labels on an unlabelled index.
    """
    asked = read_options(scheme, options)
    if isinstance(asked, Listed):
        return listed(table, asked.files, asked.missing)
    if not isinstance(asked, Quota | Control):
        return table
    require_labels(table, f"imbalance scheme '{scheme}'")
    if asked.holdout:
        table = split_holdout(table, asked.holdout, asked.seed)[0]
    return _prefixes(table, _quota(table, asked), asked.seed)


def quota(table: pa.Table, scheme: str, /, **options: Any) -> np.ndarray:
    """Return the images asked of each class as int64[C], 0 for a class that the scheme leaves out; see
    `subset`.
    """
    return _quota(table, read_options(scheme, options))


def require_labels(table: pa.Table, what: str) -> None:
    """Raise UserError unless every row has a label."""
    missing = int((labels(table) < 0).sum())
    if missing or not len(table):
        raise UserError(
            f"{what} needs labels, but {missing} of {len(table)} images have none: use 'natural' or 'list'"
        )


def _prefixes(table: pa.Table, wanted: np.ndarray, seed: int) -> pa.Table:
    known = labels(table)
    chosen = [_shuffled(known, int(c), seed, _IMAGES)[: wanted[c]] for c in np.flatnonzero(wanted)]
    rows = np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)
    return table.take(rows)


def _shuffled(known: np.ndarray, c: int, seed: int, stream: int) -> np.ndarray:
    return _rng(seed, stream, c).permutation(np.flatnonzero(known == c))


def split_holdout(
    table: pa.Table, per_class: int, seed: int = 0, most: float = 1.0
) -> tuple[pa.Table, pa.Table]:
    """Return (rest, held out), with `per_class` random images of every class held out, but at most the share `most`."""
    require_labels(table, "a holdout")
    known = labels(table)
    rows = [_shuffled(known, int(c), seed, _HOLDOUT) for c in np.unique(known)]
    held = [r[: min(per_class, int(most * len(r)))] for r in rows]
    out = np.zeros(len(table), bool)
    out[np.concatenate(held)] = True
    return table.take(np.flatnonzero(~out)), table.take(np.flatnonzero(out))


# -- schemes: quota of each class ----------------------------------------------------------------------------


def _quota(table: pa.Table, asked: Any) -> np.ndarray:
    return _QUOTAS[type(asked)](table, asked)


def _by_rank(sizes: np.ndarray, asked: Quota) -> np.ndarray:
    """Give the sizes, largest first, to the classes in the order that is asked for."""
    if asked.class_order == "label":
        return sizes
    result = np.empty(len(sizes), np.int64)
    result[_rng(asked.seed, _ORDER).permutation(len(sizes))] = sizes
    return result


def _largest(table: pa.Table, asked: Ranked) -> int:
    return asked.n_max or int(class_counts(table).max())


def _exponential(table: pa.Table, asked: Exponential) -> np.ndarray:
    sizes = exponential_counts(len(classes(table)), _largest(table, asked), asked.ratio)
    return _by_rank(sizes, asked)


def _step(table: pa.Table, asked: Step) -> np.ndarray:
    return _by_rank(step_counts(len(classes(table)), _largest(table, asked), asked.ratio), asked)


def _pareto(table: pa.Table, asked: Pareto) -> np.ndarray:
    law = asked.model_dump(include={"alpha", "scale", "floor", "mode", "seed"})
    return _by_rank(pareto_counts(len(classes(table)), _largest(table, asked), **law), asked)


def _counts(table: pa.Table, asked: Counts) -> np.ndarray:
    names = classes(table)
    if isinstance(asked.counts, dict):
        chosen = _numbers(names, list(asked.counts), "counts")
        sizes = np.fromiter(asked.counts.values(), np.int64)
        return _of_classes(len(names), chosen, _by_rank(sizes, asked))
    if len(asked.counts) != len(names):
        raise UserError(f"scheme 'counts' has {len(asked.counts)} counts for {len(names)} classes")
    return _by_rank(np.asarray(asked.counts, np.int64), asked)


def _large_small(table: pa.Table, asked: LargeSmall) -> np.ndarray:
    n_classes = len(classes(table))
    n_small = max(n_classes - asked.n_large, 0) if asked.n_small is None else asked.n_small
    if asked.n_large + n_small > n_classes:
        raise UserError(f"{asked.n_large} large and {n_small} small classes are asked of {n_classes}")
    drawn = _rng(asked.seed, _DRAW).permutation(n_classes)[: asked.n_large + n_small]
    return _two_sizes(n_classes, np.sort(drawn), asked.n_large, (asked.size_large, asked.size_small), asked)


def _isd_8_30(table: pa.Table, asked: Isd830) -> np.ndarray:
    if not asked.split:
        common = asked.model_dump(include={"seed", "class_order"})
        return _large_small(table, LargeSmall(n_small=SMALL, **common))
    names = classes(table)
    return _two_sizes(len(names), _published(names, asked.split), LARGE, (CAP, FEW), asked)


def _balanced(table: pa.Table, asked: Balanced) -> np.ndarray:
    return np.full(len(classes(table)), asked.per_class, np.int64)


def _control(table: pa.Table, asked: Control) -> np.ndarray:
    """Quota of floor(|D_i| / C) for D_i of C classes."""
    wanted = _quota(table, asked.of)
    size, present = int(np.minimum(wanted, class_counts(table)).sum()), int((wanted > 0).sum())
    return np.where(wanted > 0, size // max(present, 1), 0)


def _two_sizes(
    n_classes: int, chosen: np.ndarray, n_large: int, sizes: tuple[int, int], asked: Quota
) -> np.ndarray:
    large = np.arange(len(chosen)) < n_large
    return _of_classes(n_classes, chosen, _by_rank(np.where(large, *sizes).astype(np.int64), asked))


def _of_classes(n_classes: int, chosen: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Quota of `sizes` for the classes `chosen`, of none for the rest."""
    result = np.zeros(n_classes, np.int64)
    result[chosen] = sizes
    return result


def _published(names: Sequence[str], split: str) -> np.ndarray:
    """Return the labels of the classes of D1..D10: the 8 large ones, then the 30 small ones."""
    lists = published_classes()
    if split not in lists:
        raise UserError(
            f"unknown split '{printable(split)[:60]}' of isd_8_30.{nearest(split, lists)} Known: {', '.join(lists)}"
        )
    return _numbers(
        names, [f"n{w}" for part in ("large", "small") for w in lists[split][part].split()], split
    )


def _numbers(names: Sequence[str], wanted: Sequence[str], what: str) -> np.ndarray:
    """Return the labels of classes by name; raises UserError where the index lacks one."""
    number = {name: i for i, name in enumerate(names)}
    missing = [name for name in wanted if name not in number]
    if missing:
        first = printable(missing[0])[:60]
        raise UserError(
            f"{what} names {len(wanted)} classes, of which the index lacks {len(missing)}, e.g. '{first}'."
            f"{nearest(first, names)}"
        )
    return np.array([number[name] for name in wanted], np.int64)


@lru_cache
def published_classes() -> dict[str, dict[str, str]]:
    """Return {"D1": {"large": "01498041 ...", "small": "..."}, ...} from datasets/isd_8_30.yaml."""
    return yaml.safe_load(definitions.find("datasets", "isd_8_30").read_text())["class_lists"]


_QUOTAS: dict[type, Callable[[pa.Table, Any], np.ndarray]] = {
    Exponential: _exponential,
    Step: _step,
    Pareto: _pareto,
    Counts: _counts,
    LargeSmall: _large_small,
    Isd830: _isd_8_30,
    Balanced: _balanced,
    Control: _control,
}
