"""Images come as folders, Parquet files, tars, torchvision sets or arrays: each becomes a sequence of
samples.

A source knows its length, its class names and the names of its samples without reading an image. `slice`
gives a small picklable part of it, which one task reads; nothing holds all images of a large set at once.
"""

import importlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pyarrow as pa
from PIL import Image

from isd_ray.data import index, read, scan
from isd_ray.data.decode import MAX_BYTES
from isd_ray.data.files import (
    AbsentError,
    absolute,
    exists,
    has_suffix,
    is_folder,
    join,
    list_files,
    listing,
    open_filesystem,
    read_bytes,
)
from isd_ray.data.parquet import parquet_source
from isd_ray.data.samples import Sample, Source
from isd_ray.errors import UserError, nearest, printable
from isd_ray.messages import say

KINDS = ("folder", "parquet", "tars", "torchvision", "sklearn", "embedded")
EXTENSIONS = tuple(f".{e}" for e in scan.IMAGE_EXTENSIONS)


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
    `sklearn:digits`, `embedded:textures`. `folder:PATH/*` has its class folders one level deeper, in folders
    that group them (`PATH/*/*`: two). Relative paths start at `root`. `label_column="none"` reads images
    unlabelled.

    Raises:
        UserError: nothing is there, the kind or name is unknown, or a column is missing.
    """
    above = 0  # folders above those of the classes
    while source.startswith("folder:") and source.endswith("/*"):
        source, above = source.removesuffix("/*"), above + 1
    kind, where = _kind(source, root)
    if kind == "folder":
        return folder_source(where, above)
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
            raise UserError(
                f"unknown source '{printable(source)}'.{nearest(kind, KINDS)} Kinds: {', '.join(KINDS)}"
            )
        paths = kind in ("folder", "parquet", "tars")
        return kind, _under(root, where) if paths else where
    path = _under(root, source)
    for kind, extension in (("parquet", ".parquet"), ("tars", ".tar")):
        if has_suffix(path, extension) or (is_folder(path) and list_files(path, [extension])):
            return kind, path
    if not is_folder(path):
        raise AbsentError(
            f"no data at '{printable(path)}': give a folder of images, *.parquet, *.tar or torchvision:NAME"
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
            yield Sample(path, read_bytes(join(self.folder, path), MAX_BYTES + 1), label)


def folder_source(folder: str, above: int = 0) -> FolderSource:
    """Open a folder of class folders (labels in order of their names) or a flat folder of unlabelled images.

    Files that are no images by their names are left out, with one line that says how many of which kinds.
    above: levels of folders between `folder` and those of the classes; a class is named by its own folder.

    Raises:
        UserError: no image, images beside class folders (then it is unclear what is a class), or two classes of
            one name; AbsentError where no image lies as deep as `above` says.
    """
    found = listing(folder, EXTENSIONS, recursive=True)
    paths, said = found.names, printable(folder)
    if not paths:
        raise AbsentError(f"no image under '{said}': looked for {', '.join(EXTENSIONS)}")
    if left_out := found.left_out():
        say(f"note: '{said}': {left_out}; images are {', '.join(EXTENSIONS)}")
    flat = [p.count("/") <= above for p in paths]
    if all(flat):
        if above:
            raise AbsentError(f"no class folder in the folders of '{said}': their images lie less deep")
        return FolderSource(folder, paths, None, [])
    if any(flat):
        first = printable(paths[flat.index(True)])
        raise UserError(f"'{said}' holds both images and class folders, e.g. '{first}': move it")
    places = sorted({tuple(p.split("/")[: above + 1]) for p in paths})
    owners = [p.split("/")[above] for p in paths]
    classes = sorted({place[above] for place in places})
    if len(classes) < len(places):
        common, n = Counter(place[above] for place in places).most_common(1)[0]
        raise UserError(f"'{said}' has {n} classes of the name '{printable(common)}': rename their folders")
    number = {name: i for i, name in enumerate(classes)}
    return FolderSource(folder, paths, [number[o] for o in owners], classes)


# -- tars and arrays -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TarSource:
    """Existing WebDataset tars, to be cut anew: the rows of their index, read by range."""

    table: pa.Table

    @staticmethod
    def open(uri: str) -> "TarSource":
        """Read the index of a folder of tars, or make one where there is none."""
        if has_suffix(uri, ".tar"):
            raise UserError(f"'{printable(uri)}' is one tar: give the folder that holds it")
        if exists(join(uri, index.FILE_NAME)):
            return TarSource(index.read_index(uri))
        table, bad = index.index_shards(uri, workers=0)
        if bad:
            first = f"{bad[0]['shard']} {bad[0]['key'] or ''}: {bad[0]['reason']}"
            say(f"note: '{uri}': {len(bad)} bad samples left out, e.g. {first}")
        return TarSource(table)

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
    raise UserError(f"unknown source '{printable(name)}': there are sklearn:digits and embedded:textures")


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
