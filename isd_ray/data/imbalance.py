"""A study of imbalance needs many subsets of one set: each is a pure function of the index, a scheme and a
seed.

A scheme says how many images of each class are asked for (a quota); a class with fewer gives what it has. The
images are the first ones of the class's list, shuffled by (seed, class). So subsets of one seed are nested,
and the balanced control of the same size shares its images with the long-tailed set exactly as in the splits
of SDCLR (Jiang et al., ICML 2021). Rows stay in order of the index, so reading stays sequential.
"""

import inspect
import posixpath
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import yaml

from isd_ray import definitions
from isd_ray.data.files import read_bytes
from isd_ray.data.index import class_counts, classes, labels
from isd_ray.errors import UserError, nearest

# What a random stream is for: the same seed must not give related class orders and shuffles.
_IMAGES, _ORDER, _HOLDOUT, _DRAW = 0, 1, 2, 3
LARGE, SMALL, CAP, FEW = 8, 30, 1300, 100  # the unbalanced sets of ISD (Tejankar et al., ICCV 2021)


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
    (quantile) or sorted uniform draws (draw). Without `scale`, the largest quantile is n_max. ImageNet-LT:
    alpha 6, scale 557, n_max 1280 for 1000 classes; Places-LT: alpha 1.49, scale 96, n_max 4980 for 365
    classes.
    """
    if mode not in ("quantile", "draw"):
        raise UserError(f"unknown pareto mode '{mode}': quantile or draw")
    even = (np.arange(n_classes) + 0.5) / n_classes
    u = even if mode == "quantile" else 1 - np.sort(_rng(seed, _DRAW).random(n_classes))[::-1]
    if scale is None:
        scale = (n_max - floor) / (even[0] ** (-1 / alpha) - 1)
    size = np.floor(floor + scale * (u ** (-1 / alpha) - 1) + 1e-9)
    return np.minimum(n_max, size).astype(np.int64)


def _rng(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng([seed, *key])


# -- subsets -------------------------------------------------------------------------------------------------


def subset(
    table: pa.Table,
    scheme: str | None,
    *,
    ratio: float = 100,
    seed: int = 0,
    class_order: Literal["label", "random"] = "label",
    n_max: int | None = None,
    holdout: int = 0,
    **options: Any,
) -> pa.Table:
    """Return the rows of `table` that `scheme` chooses, in order of the table.

    Schemes:
        natural (or None): every row.
        exponential, step: `ratio` = largest over smallest class.
        pareto: options alpha, scale, floor, mode.
        counts: option counts = images by rank.
        large_small: options n_large, size_large, size_small, n_small (None: the rest).
        isd_8_30: 8 classes of at most 1300 images and 30 of 100; option split = "D1".."D10" takes the
            published classes by WordNet id, without it ("") the classes are drawn by the seed.
        balanced: option per_class, or `of` = the scheme whose size is to be matched (the control D_b);
            further options are those of that scheme.
        list: option files = path of a text file, or keys; the published D1..D10 lists work; missing = "error"
            | "skip".

    Args:
        ratio: imbalance ratio.
        seed: of the choice of images and of classes.
        class_order: "label": class 0 is the largest; "random": by the seed.
        n_max: images of the largest class (default: those of the largest class there is).
        holdout: images of each class that are left out beforehand (see `holdout`).

    Raises:
        UserError: unknown scheme or option, or a scheme that needs labels on an unlabelled index.
    """
    if scheme in (None, "natural", "none"):
        _only(options)
        return table
    if scheme == "list":
        return _listed(table, **_only(options, "files", "missing"))
    if scheme not in (*_SCHEMES, "balanced"):
        raise UserError(
            f"unknown imbalance scheme '{scheme}'.{nearest(str(scheme), SCHEMES)} Known: {', '.join(SCHEMES)}"
        )
    if ratio < 1:
        raise UserError(f"imbalance ratio {ratio}: it is the largest class over the smallest, at least 1")
    require_labels(table, f"imbalance scheme '{scheme}'")
    if holdout:
        table = split_holdout(table, holdout, seed)[0]
    shape = {"ratio": ratio, "seed": seed, "class_order": class_order, "n_max": n_max}
    return _prefixes(table, quota(table, str(scheme), **shape, **options), seed)


def quota(table: pa.Table, scheme: str, **options: Any) -> np.ndarray:
    """Return the images asked of each class as int64[C], 0 for a class that the scheme leaves out; see
    `subset`.
    """
    if scheme == "balanced":
        return _balanced(table, **options)
    scheme_quota = _SCHEMES[scheme]
    parameters = inspect.signature(scheme_quota).parameters
    _only(options, *(p for p in parameters if p != "table"))
    if "counts" in parameters and "counts" not in options:
        raise UserError("scheme 'counts' needs counts: images of each class, by rank")
    n_max = options.pop("n_max", None) or int(class_counts(table).max())
    return scheme_quota(table, n_max=n_max, **options)


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


def _by_rank(sizes: np.ndarray, class_order: str, seed: int) -> np.ndarray:
    if class_order not in ("label", "random"):
        raise UserError(f"unknown class order '{class_order}': label or random")
    order = np.arange(len(sizes)) if class_order == "label" else _rng(seed, _ORDER).permutation(len(sizes))
    result = np.empty(len(sizes), np.int64)
    result[order] = sizes
    return result


def _exponential(table: pa.Table, *, n_max: int, ratio: float, seed: int, class_order: str) -> np.ndarray:
    return _by_rank(exponential_counts(len(classes(table)), n_max, ratio), class_order, seed)


def _step(table: pa.Table, *, n_max: int, ratio: float, seed: int, class_order: str) -> np.ndarray:
    return _by_rank(step_counts(len(classes(table)), n_max, ratio), class_order, seed)


def _pareto(
    table: pa.Table,
    *,
    n_max: int,
    ratio: float,
    seed: int,
    class_order: str,
    alpha: float = 6.0,
    scale: float | None = None,
    floor: int = 5,
    mode: Literal["quantile", "draw"] = "quantile",
) -> np.ndarray:
    shape = {"alpha": alpha, "scale": scale, "floor": floor}
    sizes = pareto_counts(len(classes(table)), n_max, mode=mode, seed=seed, **shape)  # type: ignore[arg-type]
    return _by_rank(sizes, class_order, seed)


def _counts(
    table: pa.Table, *, n_max: int, ratio: float, seed: int, class_order: str, counts: Sequence[int]
) -> np.ndarray:
    if len(counts) != len(classes(table)):
        raise UserError(f"scheme 'counts' has {len(counts)} counts for {len(classes(table))} classes")
    return _by_rank(np.asarray(counts, np.int64), class_order, seed)


def _large_small(
    table: pa.Table,
    *,
    n_max: int,
    ratio: float,
    seed: int,
    class_order: str,
    n_large: int = LARGE,
    size_large: int = CAP,
    size_small: int = FEW,
    n_small: int | None = None,
    split: str | None = None,
) -> np.ndarray:
    """Quota of `n_large` classes x `size_large`, `n_small` x `size_small`, none of the rest."""
    names = classes(table)
    if split:
        chosen = _published(names, split)
    else:
        n_small = max(len(names) - n_large, 0) if n_small is None else n_small
        if n_large + n_small > len(names):
            raise UserError(f"{n_large} large and {n_small} small classes are asked of {len(names)}")
        drawn = _rng(seed, _DRAW).permutation(len(names))[: n_large + n_small]
        chosen = np.sort(drawn)
    result = np.zeros(len(names), np.int64)
    result[chosen] = _by_rank(
        np.where(np.arange(len(chosen)) < n_large, size_large, size_small), class_order, seed
    )
    return result


def _isd_8_30(
    table: pa.Table, *, n_max: int, ratio: float, seed: int, class_order: str, split: str = ""
) -> np.ndarray:
    common = {"n_max": n_max, "ratio": ratio, "seed": seed, "class_order": class_order}
    return _large_small(table, n_large=LARGE, n_small=SMALL, split=split, **common)  # type: ignore[arg-type]


def _published(names: Sequence[str], split: str) -> np.ndarray:
    """Return the labels of the classes of D1..D10: the 8 large ones, then the 30 small ones."""
    lists = published_classes()
    if split not in lists:
        raise UserError(
            f"unknown split '{split}' of isd_8_30.{nearest(split, lists)} Known: {', '.join(lists)}"
        )
    number = {n: i for i, n in enumerate(names)}
    wanted = [f"n{w}" for part in ("large", "small") for w in lists[split][part].split()]
    missing = [w for w in wanted if w not in number]
    if missing:
        raise UserError(
            f"{split} needs ImageNet's classes by WordNet id; {len(missing)} are missing, e.g. {missing[0]}"
        )
    return np.array([number[w] for w in wanted])


@lru_cache
def published_classes() -> dict[str, dict[str, str]]:
    """Return {"D1": {"large": "01498041 ...", "small": "..."}, ...} from datasets/isd_8_30.yaml."""
    return yaml.safe_load(definitions.find("datasets", "isd_8_30").read_text())["class_lists"]


def _balanced(
    table: pa.Table, *, per_class: int | None = None, of: str | None = None, **options: Any
) -> np.ndarray:
    """Quota of `per_class`, or of floor(|D_i| / C) for the scheme `of` with C classes."""
    if (per_class is None) == (of is None) or of == "balanced":
        raise UserError("scheme 'balanced' needs either per_class or of, the scheme whose size it matches")
    if of is not None and of not in _SCHEMES:
        raise UserError(
            f"unknown imbalance scheme '{of}'.{nearest(of, _SCHEMES)} Known: {', '.join(_SCHEMES)}"
        )
    if of is None:
        _only(options, "ratio", "seed", "class_order", "n_max")
        return np.full(len(classes(table)), per_class, np.int64)
    asked = quota(table, of, **options)
    size = int(np.minimum(asked, class_counts(table)).sum())
    return np.where(asked > 0, size // int((asked > 0).sum()), 0)


_SCHEMES: dict[str, Callable[..., np.ndarray]] = {
    "exponential": _exponential,
    "step": _step,
    "pareto": _pareto,
    "counts": _counts,
    "large_small": _large_small,
    "isd_8_30": _isd_8_30,
}
SCHEMES = ("natural", *_SCHEMES, "balanced", "list")


def _only(options: dict[str, Any], *known: str) -> dict[str, Any]:
    for name in options:
        if name not in known:
            there = ", ".join(known) or "none"
            raise UserError(f"unknown imbalance option '{name}'.{nearest(name, known)} Known: {there}")
    return options


# -- explicit lists ------------------------------------------------------------------------------------------


def _listed(table: pa.Table, files: str | Sequence[str] = (), missing: str = "error") -> pa.Table:
    """Rows named by keys or file names: matched by whole key, else by class folder and base name, else by
    base name.
    """
    entries = _entries(files, set(classes(table)))
    names = [_stem(k) for k in table["key"].to_pylist()]
    found: dict[str, int | None] = dict.fromkeys(entries)
    for depth in (None, 2, 1):
        rows = _by_suffix(names, depth)
        for entry in [e for e, row in found.items() if row is None]:
            found[entry] = rows.get(_suffix(entry, depth))
    lost = [e for e, row in found.items() if row is None]
    if (lost and missing == "error") or len(lost) == len(found):
        raise UserError(
            f"{len(lost)} of {len(found)} listed files are not in the index (or not unique), e.g. '{lost[0]}'"
        )
    return table.take(np.unique([row for row in found.values() if row is not None]))


def _entries(listing: str | Sequence[str], names: set[str]) -> list[str]:
    """Return the listed files without extension; class-id lines of the published lists, comments and blanks
    are dropped.
    """
    if isinstance(listing, str):
        listing = read_bytes(listing).decode().splitlines()
    lines = [line.strip() for line in listing]
    kept = [
        n for n in lines if n and not n.startswith("#") and n not in names and not re.fullmatch(r"n\d{8}", n)
    ]
    if not kept:
        raise UserError("the list of files is empty")
    return [_stem(n) for n in kept]


def _stem(name: str) -> str:
    folder, base = posixpath.split(name.strip("/"))
    return posixpath.join(folder, base.partition(".")[0])


def _suffix(name: str, depth: int | None) -> str:
    return name if depth is None else "/".join(name.split("/")[-depth:])


def _by_suffix(names: Sequence[str], depth: int | None) -> dict[str, int]:
    """Map the last `depth` parts of every name to its row, leaving out what two rows share."""
    rows: dict[str, int] = {}
    shared = set()
    for row, name in enumerate(names):
        suffix = _suffix(name, depth)
        if suffix in rows:
            shared.add(suffix)
        rows[suffix] = row
    return {s: r for s, r in rows.items() if s not in shared}
