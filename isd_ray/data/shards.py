"""Any source of images becomes WebDataset tars plus an index, written in parallel, and a killed run
continues.

`<out>/<split>/<name>-000000.tar ...`, `index.parquet` and `make_shards.json` (what the shards were made
from). A tar appears under its final name only when it is whole. Two runs with the same arguments write the
same bytes.
"""

import hashlib
import inspect
import io
import json
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import ray
from webdataset.writer import TarWriter

from isd_ray.data import files, index, scan
from isd_ray.data.decode import MAX_BYTES, open_header
from isd_ray.data.headers import BLOCK
from isd_ray.data.parallel import run_tasks
from isd_ray.data.samples import Sample, Source
from isd_ray.data.sources import open_source
from isd_ray.errors import MachineError, UserError, printable

MANIFEST, BAD = "make_shards.json", "bad_samples.jsonl"
WRITTEN = (index.FILE_NAME, BAD)  # besides tars
_EXTENSION = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "PPM": "ppm",
    "TIFF": "tif",
    "GIF": "gif",
    "JPEG2000": "jp2",
}
_KEY_LENGTH = 4096  # as of a path; the rest of a longer name is left out
_UNSAFE = re.compile(r"[^\w\-+=@~]", re.ASCII)
_IN_PROCESS = 20_000  # samples; below this, starting Ray takes longer than the work


def make_shards(
    source: str,
    out: str,
    *,
    split: str = "train",
    name: str | None = None,
    shard_size: int = 1000,
    workers: int | None = None,
    max_bad: float = 0.01,
    quiet: bool = True,
    **options: Any,
) -> pa.Table:
    """Write `source` as WebDataset shards and their index under `<out>/<split>`; return the index.

    Image bytes are kept as they are. Shards that are there and whole are kept, so a killed run continues.

    Args:
        source: see `sources.open_source`, which also takes `options` (root, download, columns, seed).
        name: beginning of the file names (default: the split).
        shard_size: samples a shard.
        workers: Ray tasks at once; None: every core (in this process for a small set while no Ray runs); 0:
            no Ray.
        max_bad: largest part of the samples that may be no image or miss their label.

    Raises:
        UserError: nothing to read, other parameters than those the folder was made with, a
            `max_bad` that is no share, or too many bad samples.
    """
    index.require_share(max_bad)
    if shard_size < 1:
        raise UserError(f"--shard-size {shard_size}: a shard holds at least 1 sample")
    folder, name = files.join(files.absolute(out), split), name or split
    if not re.fullmatch(r"[\w\-]+", name) or not re.fullmatch(r"[\w\-]+", split):
        raise UserError(
            printable(f"name '{name}' and split '{split}' may hold letters, digits, '-' and '_' only")
        )
    opened = open_source(source, split=split, **options)
    if not len(opened):
        raise UserError(f"source '{printable(source)}' holds no image")
    keys = unique_keys(opened.names())
    _claim(folder, _description(opened, keys, name, shard_size, options))
    tasks = _tasks(opened, keys, folder, name, shard_size)
    if workers is None and len(keys) <= _IN_PROCESS and not ray.is_initialized():
        workers = 0
    done = run_tasks(
        _make_one,
        tasks,
        workers=workers,
        unit="images",
        quiet=quiet,
        total=len(keys),
        count=lambda d: len(d[0]),
    )
    return _finish(folder, done, opened.classes, max_bad)


def _tasks(source: Source, keys: list[str], folder: str, name: str, size: int) -> list[tuple]:
    return [
        (source.slice(i, i + size), keys[i : i + size], files.join(folder, f"{name}-{i // size:06d}.tar"))
        for i in range(0, len(keys), size)
    ]


def _finish(folder: str, done: list, classes: Sequence[str], max_bad: float) -> pa.Table:
    bad = [b for _, report in done for b in report]
    index.check_bad([len(t) for t, _ in done], bad, max_bad, folder)
    table = pa.concat_tables([t for t, _ in done])
    table = index.with_metadata(table, folder, index.check_classes(table, classes))
    write_bad(bad, folder)
    index.write_index(table, folder)
    return table


def index_only(
    uri: str, classes: Sequence[str] | None = None, workers: int | None = None, max_bad: float = 0.01
) -> pa.Table:
    """Index the tars that lie in the folder `uri` and write the index beside them; see `index.index_shards`."""
    table, bad = index.index_shards(uri, classes=classes, workers=workers, max_bad=max_bad, quiet=False)
    write_bad(bad, index.root(table))
    index.write_index(table, index.root(table))
    return table


def write_bad(bad: Sequence[dict], folder: str) -> None:
    """List the samples that were left out in `bad_samples.jsonl` beside the index; no file where there are
    none.
    """
    if bad:
        lines = "".join(json.dumps(b) + "\n" for b in bad)
        files.write_text(files.join(folder, BAD), lines)


def unique_keys(names: Sequence[str]) -> list[str]:
    """Turn names in a source into WebDataset keys: no dot, no path tricks, ASCII, of a bounded
    length, each one once.

    A key keeps the folders and the base name without its extension; what would collide gets its row number.
    """
    keys = [_safe(n) for n in names]
    times = Counter(keys)
    taken = set(times)
    for i, key in enumerate(keys):
        if times[key] > 1:
            keys[i] = f"{key}~{i}"
            while keys[i] in taken:
                keys[i] += "~"
            taken.add(keys[i])
    return keys


def _safe(name: str) -> str:
    stem, extension = posixpath.splitext(name)
    stem = stem if extension.lower()[1:] in scan.IMAGE_EXTENSIONS else name
    parts = [p for p in stem.split("/") if p not in ("", ".", "..")]
    # names that begin with two underscores are WebDataset's own
    key = "/".join(re.sub("^_+", "_", _UNSAFE.sub("_", p)) for p in parts)
    return key[:_KEY_LENGTH].rstrip("/") or "_"


# -- the folder's description: a re-run with other parameters would mix two sets -----------------------------


def _description(
    source: Source, keys: list[str], name: str, shard_size: int, options: dict[str, Any]
) -> dict:
    """Say what the shards are made from; the keys stand for the source, whatever path it is reached by."""
    digest = hashlib.sha256("\n".join(keys).encode()).hexdigest()
    usual = inspect.signature(open_source).parameters
    place = ("root", "download")
    unusual = {k: v for k, v in options.items() if k not in place and v != usual[k].default}
    return {
        "format": 1,
        "kind": type(source).__name__,
        "options": unusual,
        "samples": len(keys),
        "keys_sha256": digest,
        "classes": source.classes,
        "name": name,
        "shard_size": shard_size,
    }


def _claim(folder: str, description: dict) -> None:
    place = files.join(folder, MANIFEST)
    if files.exists(place):
        there = _read_manifest(place)
        differing = [k for k in description if there.get(k) != description[k]]
        if differing:
            said = ", ".join(
                f"{k} {_short(there.get(k))} there, {_short(description[k])} now" for k in differing
            )
            raise UserError(
                printable(
                    f"'{folder}' was made with other parameters ({said}): give another --out or delete it"
                )
            )
    else:
        names = files.list_files(folder, [".tar", *WRITTEN]) if files.exists(folder) else []
        if theirs := [name for name in names if name.endswith(".tar") or name in WRITTEN]:
            raise UserError(
                printable(
                    f"'{folder}' holds {theirs[0]}, which make_shards did not write: give another --out; tars "
                    "are indexed with --index-only"
                )
            )
        text = json.dumps(description, indent=1) + "\n"
        files.write_text(place, text)
    files.remove_stale_parts(folder)


def _read_manifest(place: str) -> dict:
    try:
        there = json.loads(files.read_bytes(place))
    except (ValueError, RecursionError):
        there = None
    if not isinstance(there, dict):
        raise UserError(f"'{printable(place)}' is damaged: give another --out, or delete that folder")
    return there


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:21] + "..."


# -- one shard -----------------------------------------------------------------------------------------------


def _make_one(source: Source, keys: list[str], uri: str) -> tuple[pa.Table, list[dict]]:
    """Write one shard unless it is there and whole; return its index and the samples left out.

    Where no sample is good there is no shard: a tar without a sample would count as damaged ever
    after.
    """
    kept = _whole(uri, keys)
    if kept is not None:
        return kept, []
    name, result = posixpath.basename(files.path_of(uri)), []
    try:
        files.write_whole(uri, lambda path: result.append(_write(source, keys, path, name)))
    except _NoSample as error:
        return scan.SCHEMA.empty_table(), error.bad
    return result[0]


class _NoSample(Exception):
    """None of a shard's samples is good; `bad` says why."""

    def __init__(self, bad: list[dict]):
        super().__init__("no good sample")
        self.bad = bad


def _whole(uri: str, keys: list[str]) -> pa.Table | None:
    """Return the index of a finished shard; None where it is missing, damaged or lacks samples.

    Raises UserError for a tar of other samples: it is somebody's own.
    """
    if not files.exists(uri):
        return None
    filesystem, path = files.open_filesystem(uri)
    table, bad = index.index_shard(filesystem, path)
    found = {*table["key"].to_pylist(), *(b["key"] for b in bad if b["key"] is not None)}
    if not found <= set(keys) or not (found or _is_blank(uri)):
        raise UserError(printable(f"'{uri}' is no tar that make_shards wrote there: move it away"))
    return table if not bad and len(table) == len(keys) else None


def _is_blank(uri: str) -> bool:
    """Tell whether a file begins with nothing: one that a power cut has left empty, or full of zeros."""
    return not any(files.read_bytes(uri, most=BLOCK))


def _write(source: Source, keys: list[str], path: str, shard: str) -> tuple[pa.Table, list[dict]]:
    bad = []
    with open(path, "wb") as file, _tar(file) as tar:
        for key, sample in zip(keys, source, strict=True):
            extension, fault = image_extension(sample.image), _fault(sample)
            if extension is None or fault:
                reason = fault or f"not an image ({len(sample.image)} bytes)"
                bad.append({"shard": shard, "key": key, "reason": reason})
                continue
            label = {} if sample.label is None else {"cls": str(sample.label).encode()}
            tar.write({"__key__": key, extension: sample.image, **label})
    if len(bad) == len(keys):
        raise _NoSample(bad)
    filesystem, inner = files.open_filesystem(path)
    table, unread = index.index_shard(filesystem, inner)
    if unread:  # what was just written cannot be read: a full disk or a fault of ours, never of one image
        raise MachineError(
            f"shard {shard} cannot be read back ({unread[0]['reason']}): check the disk, start again"
        )
    names = pa.array([shard] * len(table), pa.string())
    return table.set_column(0, "shard", names), bad


def _fault(sample: Sample) -> str | None:
    """Say why an image or its label is too large to be read from a shard; None where both are not."""
    if len(sample.image) > MAX_BYTES:
        return f"more than {MAX_BYTES} bytes"
    if sample.label is not None and sample.label >= scan.LABELS:
        return f"label {sample.label} is larger than {scan.LABELS - 1}"
    return None


def _tar(file: Any) -> TarWriter:
    """Return a writer whose bytes depend on the samples only: no clock, no user."""
    return TarWriter(file, encoder=False, mtime=0.0, user="", group="", format="GNU_FORMAT")


def image_extension(content: bytes) -> str | None:
    """Return the extension that fits the bytes, whatever the source called them; None where they are no
    image.
    """
    try:
        with open_header(io.BytesIO(content)) as picture:
            return _EXTENSION[picture.format or ""]
    except Exception:  # Pillow raises nearly anything on hostile bytes
        return None
