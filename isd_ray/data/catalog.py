"""A data set by name: where its images come from, how it is made unbalanced, and how it is evaluated.

`datasets/NAME.yaml` says it; `open_dataset` turns it into index tables. Every source goes through shards,
made once in a cache, so there is one data path.
"""

import hashlib
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from isd_ray import definitions
from isd_ray.data import index
from isd_ray.data.files import AbsentError, absolute, exists, is_folder, join
from isd_ray.data.imbalance import subset
from isd_ray.data.scheme_options import read_options
from isd_ray.data.shards import make_shards
from isd_ray.errors import UserError, listed, printable
from isd_ray.values import faults_of
from isd_ray.version import __version__
from isd_ray.yaml_files import parse_mapping, read_mapping

SPLITS = ("train", "test", "bank")
ELSEWHERE = {  # what is no option of a scheme's own, and how it is given
    "scheme": "--data.scheme",
    "ratio": "--data.ratio",
    "seed": "--data.subset_seed",
    "class_order": "--data.class_order",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Thresholds(_Strict):
    """Groups by images in the pretraining set: many > `many`, few < `few`, medium between."""

    many: int = 100
    few: int = 20


class Definition(_Strict):
    """One data set, as in datasets/NAME.yaml."""

    name: str
    description: str
    classes: int | None = Field(None, description="number of classes; None: as found")
    sources: dict[Literal["train", "test", "bank"], list[str]] = Field(
        default_factory=dict,
        description="sources of each split, the first that exists is used; paths start at root",
    )
    splits: dict[Literal["train", "test", "bank"], str] = Field(
        default_factory=dict, description="the source's own name of a split, where it differs"
    )
    needs_root: bool = True
    cache: str = Field("", description="folder name in the cache; sets of the same images share it")
    imbalance: dict[str, Any] = Field(
        default_factory=dict, description="default arguments of imbalance.subset"
    )
    bank: Literal["balanced", "train"] = Field(
        "balanced",
        description="kNN bank: the whole labelled train split (or the bank source), or the subset",
    )
    evaluate_on: Literal["all", "pretrained"] = Field(
        "all", description="classes in bank and test: all, or those that the subset was drawn from"
    )
    groups: Literal["thirds"] | Thresholds = Field("thirds", description="many/medium/few")
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    image_size: int = 224
    class_lists: dict[str, dict[str, str]] = Field(
        default_factory=dict, description="published choices of classes"
    )
    defaults: dict[str, Any] = Field(
        default_factory=dict, description="dotted config names -> values, below a recipe"
    )
    methods: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="the same for one method, by its name; they win over `defaults`"
    )

    @field_validator("imbalance", mode="after")
    @classmethod
    def _are_options(cls, imbalance: dict[str, Any]) -> dict[str, Any]:
        try:
            read_options(imbalance.get("scheme"), {k: v for k, v in imbalance.items() if k != "scheme"})
        except UserError as error:
            raise ValueError(str(error)) from None
        return imbalance


class Splits(NamedTuple):
    """Index tables of the pretraining set, the kNN bank and the test set (None: no evaluation)."""

    train: pa.Table
    bank: pa.Table
    test: pa.Table | None
    definition: Definition


def names() -> list[str]:
    """Return the names of the data sets that are defined."""
    return definitions.names("datasets")


def load_definition(name: str) -> Definition:
    """Read datasets/NAME.yaml.

    Raises:
        UserError: unknown name, or a mistake in the file.
    """
    path = definitions.find("datasets", name)
    return _read(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)  # a sweep or a study asks for each of its settings
def _read(path: Path, changed: int) -> Definition:
    return _define(read_mapping(path, "definition"), path.stem)


def parse_definition(text: str, name: str) -> Definition:
    """Parse the YAML of a definition; raises UserError that lists every mistake."""
    return _define(parse_mapping(text, f"datasets/{name}.yaml"), name)


def _define(content: dict[str, Any], name: str) -> Definition:
    if "name" in content:
        raise UserError(f"datasets/{name}.yaml: name: that of the file counts; leave it out")
    try:
        return Definition(name=name, **content)
    except ValidationError as error:
        raise UserError(f"datasets/{name}.yaml: " + listed(faults_of(Definition, error))) from None


def open_dataset(
    name: str,
    *,
    root: str | None = None,
    shards: str | None = None,
    cache_dir: str | None = None,
    scheme: str | None = None,
    ratio: float | None = None,
    seed: int = 0,
    class_order: Literal["label", "random"] | None = None,
    options: Mapping[str, Any] | None = None,
    workers: int | None = None,
    quiet: bool = True,
    download: bool = False,
) -> Splits:
    """Open the data set `name`.

    Args:
        root: folder of the original images, where the definition needs one.
        shards: URI of a folder with train/ (and test/, bank/) of shards with an index, or of one such split;
            used instead of `root`.
        cache_dir: where shards are made otherwise (default: ISD_RAY_CACHE, else XDG_CACHE_HOME/isd_ray).
        scheme, ratio, seed, class_order: see `imbalance.subset`; they replace the definition's.
            Another scheme than the definition's starts without the definition's other arguments.
        options: further options of the scheme.
        workers, quiet, download: of `make_shards`.

    Raises:
        UserError: unknown name, an option that the scheme does not take, nothing at root or shards,
            or classes that do not fit.
    """
    definition = load_definition(name)
    chosen = {"scheme": scheme, "ratio": ratio, "class_order": class_order}
    asked, arguments = _arguments(definition, chosen, options or {}, seed)
    read_options(asked, arguments)  # before anything is read
    if name == "shards" and shards is None:
        shards, root = root, None
    if shards is not None:
        tables = _from_shards(shards, workers, quiet)
    else:
        tables = _from_source(
            definition,
            root,
            Path(cache_dir or default_cache()),
            workers=workers,
            quiet=quiet,
            download=download,
        )
    return _split(definition, tables, asked, arguments)


def default_cache() -> str:
    """Return the folder for shards that are made on the way."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.environ.get("ISD_RAY_CACHE") or os.path.join(base, "isd_ray")


def _from_shards(uri: str, workers: int | None, quiet: bool) -> dict[str, pa.Table]:
    uri = absolute(uri)
    known = [split for split in SPLITS if exists(join(uri, split, index.FILE_NAME))]
    splits = known or [split for split in SPLITS if is_folder(join(uri, split))]
    folders = {split: join(uri, split) for split in splits} or {"train": uri}
    found = {split: _index_or_make(folder, workers, quiet) for split, folder in folders.items()}
    if "train" not in found:
        raise UserError(
            f"no index at '{uri}/train': make one with `python jobs/make_shards.py --index-only {uri}/train`"
        )
    return found


def _index_or_make(uri: str, workers: int | None, quiet: bool) -> pa.Table:
    """Read the index of a folder of shards; where there is none, index them, and keep it where that can be written."""
    if exists(join(uri, index.FILE_NAME)) or not is_folder(uri):
        return index.read_index(uri)
    print(f"no index at '{uri}': reading the headers of its shards", flush=True)
    table, _ = index.index_shards(uri, workers=workers, quiet=quiet)
    try:
        index.write_index(table, uri)
    except (OSError, UserError) as error:
        print(
            f"note: the index cannot be kept ({printable(str(error))}); every start makes it anew", flush=True
        )
    return table


def _from_source(definition: Definition, root: str | None, cache: Path, **how: Any) -> dict[str, pa.Table]:
    if not definition.sources:
        raise UserError(f"data set '{definition.name}' is read from shards: give their folder")
    if definition.needs_root and root is None:
        raise UserError(
            f"data set '{definition.name}' needs its images: give their folder as root, or shards"
        )
    where = absolute(root) if root else ""
    origin = where if definition.needs_root else __version__  # a newer generator may draw other images
    digest = hashlib.sha256(repr((origin, definition.sources)).encode()).hexdigest()[:8]
    folder = str(cache / f"{definition.cache or definition.name}-{digest}")
    tables: dict[str, pa.Table] = {}
    for split, sources in definition.sources.items():
        table = _cached(definition, sources, split, folder, root, how)
        if table is not None:
            tables[split] = table
    return tables


def _cached(
    definition: Definition, sources: list[str], split: str, folder: str, root: str | None, how: dict[str, Any]
) -> pa.Table | None:
    """Return the index of the split, making shards where they are missing; None for an absent test set."""
    own = definition.splits.get(split, split)  # type: ignore[call-overload]
    if exists(f"{folder}/{own}/{index.FILE_NAME}"):
        return index.read_index(f"{folder}/{own}")
    problems = []
    for source in sources:
        try:
            return make_shards(source, folder, split=own, root=root, **how)
        except AbsentError as error:
            problems.append(str(error))
    if split == "test":
        return None
    raise UserError(f"data set '{definition.name}', {split}: " + "; or ".join(problems))


def _arguments(
    definition: Definition, chosen: Mapping[str, Any], options: Mapping[str, Any], seed: int
) -> tuple[str | None, dict[str, Any]]:
    """Return the scheme and its options: those given, over the definition's where it is the
    definition's scheme or the balanced control of it.
    """
    for name in options:
        if name in ELSEWHERE:
            raise UserError(f"--data.scheme_options: {name} is an option of its own: {ELSEWHERE[name]}")
    given = {k: v for k, v in chosen.items() if v is not None} | {str(k): v for k, v in options.items()}
    own = dict(definition.imbalance)
    scheme = given.pop("scheme", own.get("scheme"))
    drawn_from = given.get("of") if scheme == "balanced" else scheme
    if own.pop("scheme", None) != drawn_from:
        own = {}
    return scheme, {**own, **given, "seed": seed}


def _split(
    definition: Definition, tables: dict[str, pa.Table], scheme: str | None, arguments: dict[str, Any]
) -> Splits:
    whole = tables["train"]
    _check_classes(definition, whole)
    others = {s: _align(tables[s], index.classes(whole), s) for s in ("test", "bank") if s in tables}
    train = subset(whole, scheme, **arguments)
    if not len(train):
        raise UserError(f"data set '{definition.name}': the imbalance scheme leaves no image")
    bank = others.get("bank", whole if definition.bank == "balanced" else train)
    test = others.get("test")
    if definition.evaluate_on == "pretrained":
        present = np.unique(index.labels(train))
        bank, test = (t if t is None else _only_classes(t, present) for t in (bank, test))
    return Splits(train, bank, test, definition)


def _check_classes(definition: Definition, table: pa.Table) -> None:
    found = len(index.classes(table))
    if definition.classes and found != definition.classes:
        raise UserError(
            f"data set '{definition.name}' has {definition.classes} classes, but {found} were found in "
            f"'{index.root(table)}': check the folder"
        )


def _align(table: pa.Table, classes: list[str], split: str) -> pa.Table:
    """Number the labels of `table` as in training: a split that lacks a class would otherwise count
    differently.
    """
    own = index.classes(table)
    if own == classes or not own:
        return table
    number = {n: i for i, n in enumerate(classes)}
    unknown = [n for n in own if n not in number]
    if unknown:
        raise UserError(f"{split} has {len(unknown)} classes that training lacks, e.g. '{unknown[0]}'")
    old = index.labels(table)
    new = np.where(old < 0, -1, np.array([number[n] for n in own])[old])
    column = pa.array(new, pa.int32(), mask=new < 0)
    table = table.set_column(table.column_names.index("label"), "label", column)
    return index.with_metadata(table, index.root(table), classes)


def _only_classes(table: pa.Table, keep: np.ndarray) -> pa.Table:
    return table.take(np.flatnonzero(np.isin(index.labels(table), keep)))
