"""Images come as folders, Parquet files, tars, torchvision sets or arrays: each becomes a sequence of
samples.

A source knows its length, its class names and the names of its samples without reading an image. `slice`
gives a small picklable part of it, which one task reads; nothing holds all images of a large set at once.
"""

import importlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from isd_ray.data import index, read, scan
from isd_ray.data.files import (
    AbsentError,
    absolute,
    exists,
    expand,
    has_suffix,
    is_folder,
    join,
    list_files,
    open_filesystem,
    read_bytes,
)
from isd_ray.errors import UserError, nearest

KINDS = ("folder", "parquet", "tars", "torchvision", "sklearn", "embedded")
EXTENSIONS = tuple(f".{e}" for e in (*scan.IMAGE_EXTENSIONS, "tiff"))
UNLABELLED = "none"
_ROWS_AT_ONCE = 64


class Sample(NamedTuple):
    """One image as encoded bytes; `key` is its name in the source, `label` None where there is none."""

    key: str
    image: bytes
    label: int | None


class Source(Protocol):
    """A sequence of samples; `classes[label]` is the class name."""

    @property
    def classes(self) -> list[str]: ...
    def __len__(self) -> int: ...
    def names(self) -> list[str]: ...
    def slice(self, start: int, stop: int) -> Self: ...
    def __iter__(self) -> Iterator[Sample]: ...


def open_source(
    source: str,
    *,
    split: str = "train",
    root: str | None = None,
    download: bool = False,
    seed: int = 0,
    image_column: str = "image",
    label_column: str = "label",
    key_column: str = "key",
) -> Source:
    """Open `KIND:WHERE`, or a plain path or URI whose kind shows (a folder, `*.parquet`, `*.tar`).

    `folder:PATH`, `parquet:PATH_OR_GLOB`, `tars:PATH_OR_FOLDER`, `torchvision:NAME` (files under `root`),
    `sklearn:digits`, `embedded:textures`. Relative paths start at `root`. `label_column="none"` reads images
    unlabelled.

    Raises:
        UserError: nothing is there, the kind or name is unknown, or a column is missing.
    """
    kind, where = _kind(source, root)
    if kind == "folder":
        return folder_source(where)
    if kind == "parquet":
        return parquet_source(where, image_column, label_column, key_column)
    if kind == "tars":
        return TarSource.open(where)
    if kind == "torchvision":
        from isd_ray.data.torchvision_sets import TorchvisionSource  # torchvision takes seconds to import

        return TorchvisionSource.open(where, split, root, download)
    return ArraySource.open(f"{kind}:{where}", split, seed)


def _kind(source: str, root: str | None) -> tuple[str, str]:
    kind, colon, where = source.partition(":")
    if colon and not where.startswith("//"):
        if kind not in KINDS:
            raise UserError(f"unknown source '{source}'.{nearest(kind, KINDS)} Kinds: {', '.join(KINDS)}")
        paths = kind in ("folder", "parquet", "tars")
        return kind, _under(root, where) if paths else where
    path = _under(root, source)
    for kind, extension in (("parquet", ".parquet"), ("tars", ".tar")):
        if has_suffix(path, extension) or (is_folder(path) and list_files(path, [extension])):
            return kind, path
    if not is_folder(path):
        raise AbsentError(
            f"no data at '{path}': give a folder of images, *.parquet, *.tar or torchvision:NAME"
        )
    return "folder", path


def _under(root: str | None, path: str) -> str:
    if "://" in path or path.startswith(("/", "~")) or root is None:
        return absolute(path)
    return absolute(root) if path == "." else join(absolute(root), path)


# -- image folder --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderSource:
    """Image files; `paths` are relative to `folder`, `labels` None for a flat folder."""

    folder: str
    paths: list[str]
    labels: list[int] | None
    classes: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def names(self) -> list[str]:
        return self.paths

    def slice(self, start: int, stop: int) -> "FolderSource":
        part = None if self.labels is None else self.labels[start:stop]
        return replace(self, paths=self.paths[start:stop], labels=part)

    def __iter__(self) -> Iterator[Sample]:
        for i, path in enumerate(self.paths):
            label = None if self.labels is None else self.labels[i]
            yield Sample(path, read_bytes(join(self.folder, path)), label)


def folder_source(folder: str) -> FolderSource:
    """Open a folder of class folders (labels in order of their names) or a flat folder of unlabelled images.

    Raises:
        UserError: no image, or images beside class folders (then it is unclear what is a class).
    """
    paths = list_files(folder, EXTENSIONS, recursive=True)
    if not paths:
        raise AbsentError(f"no image under '{folder}': looked for {', '.join(EXTENSIONS)}")
    flat = ["/" not in p for p in paths]
    if all(flat):
        return FolderSource(folder, paths, None, [])
    if any(flat):
        raise UserError(
            f"'{folder}' holds both images and class folders, e.g. '{paths[flat.index(True)]}': move it"
        )
    owners = [p.split("/", 1)[0] for p in paths]
    classes = sorted(set(owners))
    number = {name: i for i, name in enumerate(classes)}
    return FolderSource(folder, paths, [number[o] for o in owners], classes)


# -- Parquet -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParquetSource:
    """Rows [start, stop) of Parquet files laid end to end; images are binary or the struct {bytes, path}."""

    files: tuple[str, ...]
    rows: tuple[int, ...]
    columns: tuple[str, str | None, str | None]  # image, label, key
    classes: list[str]
    numbers: dict[str, int] | None  # class name -> label where the label column holds names
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def slice(self, start: int, stop: int) -> "ParquetSource":
        return replace(self, start=self.start + start, stop=min(self.start + stop, self.stop))

    def names(self) -> list[str]:
        key = self.columns[2]
        if key is None:
            return [_row_name(i) for i in range(self.start, self.stop)]
        column = [k for f in self.files for k in _parquet(f).read([key])[key].to_pylist()]
        return [str(k) for k in column[self.start : self.stop]]

    def __iter__(self) -> Iterator[Sample]:
        first = 0
        for file, rows in zip(self.files, self.rows, strict=True):
            if first < self.stop and first + rows > self.start:
                yield from self._of_file(_parquet(file), first)
            first += rows

    def _of_file(self, file: pq.ParquetFile, first: int) -> Iterator[Sample]:
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first < self.stop and first + rows > self.start:
                yield from self._of_group(file, group, first)
            first += rows

    def _of_group(self, file: pq.ParquetFile, group: int, first: int) -> Iterator[Sample]:
        wanted = [c for c in self.columns if c]
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=wanted):
            low, high = max(self.start - first, 0), min(self.stop - first, len(batch))
            if low < high:
                yield from self._samples(batch.slice(low, high - low), first + low)
            first += len(batch)

    def _samples(self, batch: pa.RecordBatch, first: int) -> Iterator[Sample]:
        image, label, key = self.columns
        labels = batch[label].to_pylist() if label else [None] * len(batch)
        keys = batch[key].to_pylist() if key else [_row_name(first + i) for i in range(len(batch))]
        for name, content, value in zip(keys, batch[image].to_pylist(), labels, strict=True):
            content = content.get("bytes") if isinstance(content, dict) else content
            number = self.numbers[value] if self.numbers and value is not None else value
            yield Sample(str(name), content or b"", None if number is None or number < 0 else int(number))


def _row_name(row: int) -> str:
    return f"{row:09d}"


def _parquet(uri: str) -> pq.ParquetFile:
    filesystem, path = open_filesystem(uri)
    try:
        return pq.ParquetFile(filesystem.open_input_file(path))
    except pa.ArrowException as error:
        raise UserError(f"'{uri}' is not a readable Parquet file: {str(error).splitlines()[0]}") from error


def parquet_source(uri: str, image: str = "image", label: str = "label", key: str = "key") -> ParquetSource:
    """Open Parquet files with image bytes; class names come from Hugging Face's features or the column
    `label_name`.

    Raises:
        UserError: no file, or a column is missing (the message lists those there are).
    """
    files = expand(uri, ".parquet")
    schema = _parquet(files[0]).schema_arrow
    wanted = None if label == UNLABELLED else label
    for role, name in (("image", image), ("label", wanted)):
        if name is not None and name not in schema.names:
            raise UserError(
                f"no {role} column '{name}' in '{files[0]}': it has {', '.join(schema.names)}; name "
                f"yours with --{role}-column{' (none: unlabelled)' if role == 'label' else ''}"
            )
    if not (_binary(schema.field(image).type) or pa.types.is_struct(schema.field(image).type)):
        raise UserError(f"column '{image}' of '{files[0]}' is {schema.field(image).type}, not image bytes")
    rows = tuple(_parquet(f).metadata.num_rows for f in files)
    classes, numbers = _parquet_classes(files, schema, wanted)
    columns = (image, wanted, key if key in schema.names else None)
    return ParquetSource(tuple(files), rows, columns, classes, numbers, 0, sum(rows))


def _binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _parquet_classes(
    files: Sequence[str], schema: pa.Schema, label: str | None
) -> tuple[list[str], dict[str, int] | None]:
    """Return (class names, name -> number where labels are names); only label columns are read."""
    if label is None:
        return [], None
    names = _features(schema, label)
    if names:
        return names, None
    extra = ["label_name"] if "label_name" in schema.names and label != "label_name" else []
    pairs = (
        pa.concat_tables([_parquet(f).read([label, *extra]) for f in files])
        .group_by([label, *extra])
        .aggregate([])
    )
    values = pairs[label].to_pylist()
    if any(isinstance(v, str) for v in values):
        classes = sorted({v for v in values if v is not None})
        return classes, {name: i for i, name in enumerate(classes)}
    if not extra:
        return [str(i) for i in range(max((v for v in values if v is not None), default=-1) + 1)], None
    found = {v: str(n) for v, n in zip(values, pairs["label_name"].to_pylist(), strict=True) if v is not None}
    return [found.get(i, str(i)) for i in range(max(found, default=-1) + 1)], None


def _features(schema: pa.Schema, label: str) -> list[str]:
    """Return the class names that Hugging Face's data sets write into the Parquet schema, or []."""
    text = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(text).get("info", {}).get("features", {}) if text else {}
    return list(features.get(label, {}).get("names", []))


# -- tars and arrays -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TarSource:
    """Existing WebDataset tars, to be cut anew: the rows of their index, read by range."""

    table: pa.Table

    @staticmethod
    def open(uri: str) -> "TarSource":
        """Read the index of a folder of tars, or make one where there is none."""
        if has_suffix(uri, ".tar"):
            raise UserError(f"'{uri}' is one tar: give the folder that holds it")
        if exists(join(uri, index.FILE_NAME)):
            return TarSource(index.read_index(uri))
        return TarSource(index.index_shards(uri, workers=0)[0])

    @property
    def classes(self) -> list[str]:
        return index.classes(self.table)

    def __len__(self) -> int:
        return len(self.table)

    def names(self) -> list[str]:
        return self.table["key"].to_pylist()

    def slice(self, start: int, stop: int) -> "TarSource":
        part = self.table.slice(start, stop - start)
        return TarSource(part.take(np.arange(len(part))))  # a copy: a view would pickle the whole table

    def __iter__(self) -> Iterator[Sample]:
        filesystem, folder = open_filesystem(index.root(self.table))
        columns = (self.table[name].to_pylist() for name in ("key", "label"))
        images = read.encoded(filesystem, folder, self.table)
        for key, label, (image, _) in zip(*columns, images, strict=True):
            yield Sample(key, image if isinstance(image, bytes) else b"", label)


@dataclass(frozen=True)
class ArraySource:
    """A set that is made or shipped by the environment: the embedded images, scikit-learn's digits."""

    name: str
    split: str
    seed: int
    classes: list[str]
    start: int
    stop: int

    @staticmethod
    def open(name: str, split: str, seed: int) -> "ArraySource":
        images, _, classes = _arrays(name, split, seed)
        return ArraySource(name, split, seed, classes, 0, len(images))

    def __len__(self) -> int:
        return self.stop - self.start

    def names(self) -> list[str]:
        return [f"{self.split}/{i:07d}" for i in range(self.start, self.stop)]

    def slice(self, start: int, stop: int) -> "ArraySource":
        return replace(self, start=self.start + start, stop=min(self.start + stop, self.stop))

    def __iter__(self) -> Iterator[Sample]:
        images, labels, _ = _arrays(self.name, self.split, self.seed)
        for i, name in zip(range(self.start, self.stop), self.names(), strict=True):
            yield Sample(name, png(Image.fromarray(images[i])), int(labels[i]))


@lru_cache(maxsize=2)
def _arrays(name: str, split: str, seed: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    if name == "sklearn:digits":
        return _digits(split)
    if name.startswith("embedded:"):
        embedded = importlib.import_module("isd_ray.data.embedded")
        images, labels = embedded.make(split, seed)
        return images, labels, list(embedded.CLASSES)
    raise UserError(f"unknown source '{name}': there are sklearn:digits and embedded:textures")


def _digits(split: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return the 8 x 8 handwritten digits enlarged to 32 x 32; every fifth image is for testing."""
    from sklearn.datasets import load_digits

    if split not in ("train", "test"):
        raise UserError(f"sklearn:digits has no split '{split}': there are train and test")
    images, labels = load_digits(return_X_y=True)
    chosen = (np.arange(len(labels)) % 5 == 0) == (split == "test")
    small = (images[chosen].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    large = [np.asarray(Image.fromarray(i).resize((32, 32), Image.Resampling.BICUBIC)) for i in small]
    return np.stack(large), labels[chosen], [str(i) for i in range(10)]


def png(image: Image.Image) -> bytes:
    """Encode an image as PNG, which keeps every pixel."""
    image.save(buffer := io.BytesIO(), format="PNG")
    return buffer.getvalue()
