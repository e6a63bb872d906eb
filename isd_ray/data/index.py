"""Counting, choosing and cutting a data set should not cost reading it: one Arrow table, a row per sample, is
the data set.

Columns: `shard` (file name relative to the root), `key`, `offset` and `size` (bytes of the image member
    inside the tar), `label` (int32, null where there is none), `width`, `height`. The schema carries, as JSON
    under `b"isd_ray"`, the format, the root and the names of the classes. The table is made from the headers
    of WebDataset tars alone.
"""

import io
import json
import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from PIL import ExifTags, Image
from pyarrow import fs as pafs

from isd_ray.data.files import absolute, list_files, open_filesystem, write_whole
from isd_ray.data.parallel import run_tasks
from isd_ray.errors import UserError

FORMAT = 1
FILE_NAME = "index.parquet"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif")
# Only decoders of these plain raster formats are tried on foreign bytes.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("label", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)
_BUFFER = 1 << 17  # bytes fetched at once: a few small samples, or the head of a large one
_IN_PROCESS = 16  # shards; below this, starting Ray takes longer than the work
_LABEL_LIMIT = 1 << 20  # bytes; a label member beyond this is not a label
_META = re.compile(r"(^|/)__[^/]*__($|/)")  # members that WebDataset keeps for itself


# -- the table -----------------------------------------------------------------------------------------------


def with_metadata(table: pa.Table, root: str, classes: Sequence[str]) -> pa.Table:
    """Return `table` with its root folder and class names set."""
    meta = {"format": FORMAT, "root": absolute(root), "classes": list(classes)}
    return table.replace_schema_metadata({b"isd_ray": json.dumps(meta).encode()})


def _metadata(table: pa.Table) -> dict[str, Any]:
    meta = (table.schema.metadata or {}).get(b"isd_ray")
    if meta is None:
        raise UserError(
            "this table is not an isd_ray index: make one with `jobs/make_shards.py --index-only`"
        )
    return json.loads(meta)


def root(table: pa.Table) -> str:
    """Return the URI of the folder that holds the shards."""
    return _metadata(table)["root"]


def classes(table: pa.Table) -> list[str]:
    """Return the class names; label `i` is `classes[i]`. Empty for an unlabelled set."""
    return _metadata(table)["classes"]


def labels(table: pa.Table) -> np.ndarray:
    """Return the labels as int64[N]; -1 where there is none."""
    return table["label"].fill_null(-1).to_numpy().astype(np.int64)


def class_counts(table: pa.Table) -> np.ndarray:
    """Return the number of images of each class as int64[C]."""
    known = labels(table)
    return np.bincount(known[known >= 0], minlength=len(classes(table))).astype(np.int64)


def read_index(uri: str) -> pa.Table:
    """Read the index at `uri`, a folder that holds `index.parquet` or the Parquet file itself.

    The root becomes the folder it is read from, so a folder of shards can be moved or copied.

    Raises:
        UserError: there is no index, or the file is not one.
    """
    uri = absolute(uri)
    path = uri if uri.endswith(".parquet") else f"{uri}/{FILE_NAME}"
    filesystem, inner = open_filesystem(path)
    try:
        table = pq.read_table(inner, filesystem=filesystem)
    except FileNotFoundError:
        raise UserError(
            f"no index at '{path}': make one with `python jobs/make_shards.py --index-only {uri}`"
        ) from None
    except pa.ArrowException as error:
        raise UserError(f"'{path}' is not a readable index: {str(error).splitlines()[0]}") from error
    meta = _metadata(table)
    if meta["format"] != FORMAT or not set(SCHEMA.names) <= set(table.column_names):
        raise UserError(
            f"'{path}' has index format {meta['format']}, this version reads {FORMAT}: make it again"
        )
    return with_metadata(table.select(SCHEMA.names).cast(SCHEMA), posixpath.dirname(path), meta["classes"])


def write_index(table: pa.Table, uri: str) -> None:
    """Write `table` as `index.parquet` into the folder `uri` (or to the `.parquet` file `uri`), all or
    nothing.
    """
    path = uri if uri.endswith(".parquet") else f"{absolute(uri)}/{FILE_NAME}"
    write_whole(path, lambda local: pq.write_table(table, local))


# -- from tars to the table ----------------------------------------------------------------------------------


def index_shards(
    uri: str,
    *,
    classes: Sequence[str] | None = None,
    max_bad: float = 0.01,
    workers: int | None = None,
    quiet: bool = True,
) -> tuple[pa.Table, list[dict]]:
    """Index every `*.tar` of the folder `uri` from the headers alone, one task a shard.

    Args:
        classes: names of the classes; by default the numbers "0", "1", ...
        max_bad: largest part of the samples that may be bad.
        workers: Ray tasks at once; None: every core (in this process for a few shards while no Ray runs); 0: no Ray.
        quiet: print no progress.

    Returns:
        The index, rows in order of shard name and place in the tar, and the bad samples as dict(shard, key,
        reason).

    Raises:
        UserError: no tar, no good sample, too many bad ones, or a label beyond `classes`.
    """
    uri = absolute(uri)
    shards = list_files(uri, [".tar"])
    if not shards:
        raise UserError(f"no .tar file in '{uri}': give the folder that holds the shards")
    if workers is None and len(shards) <= _IN_PROCESS and not ray.is_initialized():
        workers = 0
    scans = run_tasks(_index_one, [(uri, s) for s in shards], workers=workers, unit="shards", quiet=quiet)
    bad = [b for _, report in scans for b in report]
    check_bad([len(t) for t, _ in scans], bad, max_bad, uri)
    table = pa.concat_tables([t for t, _ in scans])
    return with_metadata(table, uri, check_classes(table, classes)), bad


def check_classes(table: pa.Table, names: Sequence[str] | None) -> list[str]:
    """Return `names`, or numbers as names, after checking that every label has one."""
    top = int(labels(table).max(initial=-1))
    if names and top >= len(names):
        raise UserError(f"label {top} has no name: {len(names)} class names were given")
    return list(names) if names else [str(i) for i in range(top + 1)]


def check_bad(sizes: Sequence[int], bad: Sequence[dict], max_bad: float, place: str) -> None:
    """Stop when more than `max_bad` of the samples are lost.

    A bad sample counts as one. A broken shard (an entry without key) counts as what it lacks against the
    median shard.

    Raises:
        UserError: with the counts and the first reason.
    """
    good = sum(sizes)
    if not bad and good:
        return
    whole = int(np.median([s for s in sizes if s] or [1]))
    by_shard = {b["shard"]: b["rows"] for b in bad if b["key"] is None}
    lost = sum(b["key"] is not None for b in bad) + sum(max(1, whole - rows) for rows in by_shard.values())
    if good == 0 or lost > max_bad * (good + lost):
        first = f"; first: {bad[0]['shard']} {bad[0]['key'] or ''}: {bad[0]['reason']}" if bad else ""
        raise UserError(
            f"about {lost} of {good + lost} samples in '{place}' are bad ({len(by_shard)} broken shards), "
            f"more than the limit of {max_bad:.1%}{first}"
        )


def _index_one(uri: str, shard: str) -> tuple[pa.Table, list[dict]]:
    filesystem, folder = open_filesystem(uri)
    return index_shard(filesystem, posixpath.join(folder, shard))


def index_shard(filesystem: pafs.FileSystem, path: str) -> tuple[pa.Table, list[dict]]:
    """Index one WebDataset tar, reading headers and the first bytes of each image only.

    Members belong to one sample while their path up to the first dot of the base name stays the same. A
    sample needs an image member (one of IMAGE_EXTENSIONS); its label is an integer in `.cls` or under "label"
    in `.json`.

    Returns:
        The rows (SCHEMA) and the bad samples as dict(shard, key, reason); key is None where the shard itself
        is broken, with `rows` the number of samples found before the break.
    """
    shard = posixpath.basename(path)
    rows: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    length = filesystem.get_file_info(path).size or 0
    broken = None
    try:
        with filesystem.open_input_file(path) as raw:
            scan = _Scan(io.BufferedReader(raw, _BUFFER), length)
            for key, members in scan.samples():
                try:
                    rows.append({"shard": shard, "key": key, **scan.row(members)})
                except (ValueError, OSError, Image.DecompressionBombError) as error:
                    bad.append({"shard": shard, "key": key, "reason": _line(error)})
            broken = scan.end_problem()
    except (tarfile.TarError, OSError, EOFError) as error:
        broken = _line(error)
    if not (rows or bad or broken):
        broken = "no sample in the tar"
    if broken:
        bad.append({"shard": shard, "key": None, "reason": broken, "rows": len(rows)})
    return pa.Table.from_pylist(rows, schema=SCHEMA), bad


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class _Scan:
    """One pass over the headers of one tar."""

    def __init__(self, file: io.BufferedReader, length: int):
        self.file, self.length = file, length
        self.tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (closed with the file)

    def samples(self) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
        """Yield (key, members by extension) in order of the tar."""
        key: str | None = None
        members: dict[str, tarfile.TarInfo] = {}
        for info in self.tar:
            if info.offset_data + info.size > self.length:
                break  # said by end_problem
            folder, base = posixpath.split(info.name)
            stem, _, extension = base.partition(".")
            if not info.isreg() or not stem or _META.search(info.name):
                continue
            current = posixpath.join(folder, stem)
            if current != key:
                if key is not None:
                    yield key, members
                key, members = current, {}
            members.setdefault(extension.lower(), info)
            self.tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header; a shard may hold millions
        if key is not None:
            yield key, members

    def row(self, members: dict[str, tarfile.TarInfo]) -> dict:
        """Return offset, size, label, width and height of a sample. Raises ValueError or OSError where it is
        bad.
        """
        image = next((members[e] for e in members if e in IMAGE_EXTENSIONS), None)
        if image is None:
            raise ValueError(f"no image member, only {', '.join(sorted(members))}")
        if image.size == 0:
            raise ValueError("image member of zero bytes")
        stream = self.tar.extractfile(image)
        assert stream is not None  # a regular file
        with Image.open(stream, formats=IMAGE_FORMATS) as picture:
            width, height = picture.size
            exif = picture.getexif() if "exif" in picture.info else {}  # else PNG would be read to its end
            if exif.get(ExifTags.Base.Orientation, 1) >= 5:  # stored lying on its side
                width, height = height, width
        return {
            "offset": image.offset_data,
            "size": image.size,
            "label": self._label(members),
            "width": width,
            "height": height,
        }

    def _label(self, members: dict[str, tarfile.TarInfo]) -> int | None:
        if "cls" in members:
            return _checked_label(self._text(members["cls"]), ".cls")
        if "json" in members:
            content = json.loads(self._text(members["json"]))
            label = content.get("label") if isinstance(content, dict) else None
            return None if label is None else _checked_label(label, ".json")
        return None

    def _text(self, info: tarfile.TarInfo) -> str:
        if info.size > _LABEL_LIMIT:
            raise ValueError(f"{info.name} of {info.size} bytes is too large for a label")
        stream = self.tar.extractfile(info)
        assert stream is not None
        return stream.read().decode("utf-8")

    def end_problem(self) -> str | None:
        """Say what is wrong with the end of the tar: a whole one ends in a block of zeros, which tarfile does
        not ask for.
        """
        last = self.tar.offset
        self.file.seek(min(last, self.length))
        if last >= self.length or any(self.file.read(512)):
            return "truncated or damaged tar: it does not end in an end-of-archive mark"
        return None


def _checked_label(value: object, source: str) -> int | None:
    try:
        label = int(value) if isinstance(value, str | int) else None
    except ValueError:
        label = None
    if label is None or label >= 2**31:
        raise ValueError(f"label {str(value)[:40]!r} in {source} is not an integer")
    return label if label >= 0 else None
