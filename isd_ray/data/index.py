"""Counting, choosing and cutting a data set should not cost reading it: one Arrow table, a row per sample, is
the data set.

Columns: `shard` (file name relative to the root), `key`, `offset` and `size` (bytes of the image member
    inside the tar), `label` (int32, null where there is none), `width`, `height`. The schema carries, as JSON
    under `b"isd_ray"`, the format, the root and the names of the classes. The table is made from the headers
    of WebDataset tars alone.
"""

import hashlib
import json
import posixpath
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from isd_ray.data.files import absolute, has_suffix, join, list_files, open_filesystem, parent, write_whole
from isd_ray.data.packed import UNKNOWN, UNPACKERS, is_packed
from isd_ray.data.parallel import run_tasks
from isd_ray.data.scan import SCHEMA, index_shard
from isd_ray.data.store import StoredFile
from isd_ray.ending import broken
from isd_ray.errors import UserError, printable

FORMAT = 1
CHECKSUM = "sha256"  # name of the checksum in the metadata of a file
FILE_NAME = "index.parquet"
_IN_PROCESS = 16  # shards; below this, starting Ray takes longer than the work


# -- the table -----------------------------------------------------------------------------------------------


def with_metadata(table: pa.Table, root: str, classes: Sequence[str]) -> pa.Table:
    """Return `table` with its root folder and class names set."""
    meta = {"format": FORMAT, "root": absolute(root), "classes": list(classes)}
    return table.replace_schema_metadata({b"isd_ray": json.dumps(meta).encode()})


def _metadata(table: pa.Table, place: str = "this table") -> dict[str, Any]:
    meta = (table.schema.metadata or {}).get(b"isd_ray")
    if meta is None:
        raise UserError(f"{place} is not an isd_ray index: make one with `jobs/make_shards.py --index-only`")
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

    The root becomes the folder it is read from, so a folder of shards can be moved or copied. Where
    the file states a checksum, its content must have it; indexes of earlier versions state none.

    Raises:
        UserError: there is no index, or the file is not one, or is damaged.
    """
    uri = absolute(uri)
    path = uri if has_suffix(uri, ".parquet") else join(uri, FILE_NAME)
    said = printable(path)
    try:
        table = parse_index(_content(path))
    except FileNotFoundError:
        raise UserError(
            f"no index at '{said}': make one with `python jobs/make_shards.py --index-only {printable(uri)}`"
        ) from None
    except OSError as error:
        raise broken(said, error) from error
    except NoIndexError as error:
        raise UserError(f"'{said}' {error}: make the index again") from error
    return with_metadata(table, parent(path), classes(table))


class NoIndexError(ValueError):
    """Bytes that are no index, or a damaged one; the message goes on where the name of a file ends."""


def parse_index(content: bytes) -> pa.Table:
    """Return the index that a Parquet file holds, with the root that it states; raises NoIndexError."""
    try:
        table = _parse(content)
        meta = _metadata(table)
        if meta["format"] != FORMAT:
            there = printable(str(meta["format"]))[:40]
            raise NoIndexError(f"has index format {there}, this version reads {FORMAT}")
        names, place = meta["classes"], meta["root"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in (*names, place)):
            raise ValueError("its class names are no list of names, or its root is none")
        table = table.select(SCHEMA.names).cast(SCHEMA)
        table.validate(full=True)
    except NoIndexError:
        raise
    except (UserError, pa.ArrowException, LookupError, ValueError, TypeError, RecursionError) as error:
        reason = printable((str(error).splitlines() or [""])[0])[:300]
        raise NoIndexError(f"is not a readable index ({reason})") from error
    if meta.get(CHECKSUM) not in (None, _checksum(table, names)):
        raise NoIndexError("is damaged: it has changed since it was written")
    _check_index(table, names)
    return with_metadata(table, place, names)


def _content(path: str) -> bytes:
    """Return the bytes of a file; raises OSError and StoreError, which are no fault of the file's."""
    filesystem, inner = open_filesystem(path)
    with StoredFile(filesystem, inner) as file:
        return file.read_at(file.length, 0)


def _parse(content: bytes) -> pa.Table:
    """Return the table of a Parquet file; raises what the reader does on damage, but no OSError."""
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        if file.metadata.num_rows > len(content):  # every row has a place of its own, and that takes a byte
            raise ValueError(f"it claims {file.metadata.num_rows} rows in {len(content)} bytes")
        return file.read()
    except OSError as error:  # what Arrow calls damage
        raise ValueError(str(error)) from error


def _checksum(table: pa.Table, names: Sequence[str]) -> str:
    """Return the sha256 of an index, as hexadecimal digits.

    It goes over the class names as a JSON list, then over each column of SCHEMA in its order: the
    name; a byte a row, 1 where there is a value; numbers as they lie in memory (little-endian, 0
    for none), or the lengths of all texts (int64, 0 for none) and then the texts themselves, in
    UTF-8.
    """
    digest = hashlib.sha256(json.dumps(list(names)).encode())
    for column in SCHEMA:
        values = table[column.name].cast(column.type)
        digest.update(column.name.encode())
        _add(digest, values.is_valid().cast(pa.uint8()))
        if not pa.types.is_string(column.type):
            _add(digest, values.fill_null(0))
            continue
        values = values.fill_null("")
        _add(digest, pc.binary_length(values).cast(pa.int64()))
        for chunk in values.chunks:
            ends = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
            if len(chunk) and ends[-1] > ends[0]:
                digest.update(chunk.buffers()[2][int(ends[0]) : int(ends[-1])])
    return digest.hexdigest()


def _add(digest: Any, values: pa.ChunkedArray) -> None:
    for chunk in values.chunks:
        digest.update(np.ascontiguousarray(chunk.to_numpy(zero_copy_only=False)))


def _check_index(table: pa.Table, names: Sequence[str]) -> None:
    """Refuse an index that points outside of its folder, lacks values, or has labels without a name.

    Ranges are not looked at: one that is wrong gives a broken image where it is read.
    """
    for column in ("shard", "key", "offset", "size"):
        if table[column].null_count:
            raise NoIndexError(f"lacks {table[column].null_count} values of '{column}'")
    for shard in table["shard"].unique().to_pylist():
        outside = "://" in shard or shard.startswith("/") or "\0" in shard
        if outside or {"", ".", ".."} & set(shard.split("/")):
            said = printable(shard[:200])
            raise NoIndexError(f"names the shard '{said}', which is no place in its folder")
    top = int(labels(table).max(initial=-1))
    if top >= len(names):
        raise NoIndexError(f"has label {top} and {len(names)} class names")


def write_index(table: pa.Table, uri: str) -> None:
    """Write `table` with its checksum as `index.parquet` into the folder `uri` (or to the
    `.parquet` file `uri`), all or nothing.
    """
    path = uri if has_suffix(uri, ".parquet") else join(absolute(uri), FILE_NAME)
    meta = _metadata(table)
    meta[CHECKSUM] = _checksum(table, meta["classes"])
    content = table.replace_schema_metadata({b"isd_ray": json.dumps(meta).encode()})
    write_whole(path, lambda local: pq.write_table(content, local))


# -- from tars to the table ----------------------------------------------------------------------------------


def index_shards(
    uri: str,
    *,
    classes: Sequence[str] | None = None,
    max_bad: float = 0.01,
    workers: int | None = None,
    quiet: bool = True,
) -> tuple[pa.Table, list[dict]]:
    """Index every tar of the folder `uri` from the headers alone, one task a shard; compressed ones are unpacked.

    Args:
        classes: names of the classes; by default the numbers "0", "1", ...
        max_bad: largest part of the samples that may be bad.
        workers: Ray tasks at once; None: every core (in this process for a few shards while no Ray runs); 0: no Ray.
        quiet: print no progress.

    Returns:
        The index, rows in order of shard name and place in the tar, and the bad samples as dict(shard, key,
        reason).

    Raises:
        UserError: no tar, no good sample, too many bad ones, a `max_bad` that is no share, or a
            label beyond `classes`.
    """
    require_share(max_bad)
    uri = absolute(uri)
    shards = tars(uri)
    if not shards:
        raise UserError(f"no .tar file in '{printable(uri)}': give the folder that holds the shards")
    if workers is None and len(shards) <= _IN_PROCESS and not ray.is_initialized():
        workers = 0
    scans = run_tasks(_index_one, [(uri, s) for s in shards], workers=workers, unit="shards", quiet=quiet)
    bad = [b for _, report in scans for b in report]
    check_bad([len(t) for t, _ in scans], bad, max_bad, uri)
    table = pa.concat_tables([t for t, _ in scans])
    return with_metadata(table, uri, check_classes(table, classes)), bad


def tars(uri: str) -> list[str]:
    """Return the tars of a folder by name, the compressed ones that do not lie there unpacked too among them."""
    plain = list_files(uri, [".tar"])
    unpacked = {name.lower() for name in plain}
    packed = [
        name
        for name in list_files(uri, [*UNPACKERS, *UNKNOWN])
        if f"{name.lower().rsplit('.t', 1)[0]}.tar" not in unpacked
    ]
    return sorted(plain + packed)


def packed_shards(table: pa.Table) -> int:
    """Return how many shards of an index are compressed."""
    return sum(map(is_packed, table["shard"].unique().to_pylist()))


def check_classes(table: pa.Table, names: Sequence[str] | None) -> list[str]:
    """Return `names`, or numbers as names, after checking that every label has one."""
    known = labels(table)
    top = int(known.max(initial=-1))
    if names and top >= len(names):
        shard, key = (table[column][int(known.argmax())].as_py() for column in ("shard", "key"))
        place = printable(f"{key} in {shard}")
        raise UserError(f"label {top} has no name: {len(names)} class names were given (of {place})")
    return list(names) if names else [str(i) for i in range(top + 1)]


def require_share(max_bad: float) -> None:
    """Refuse a limit of bad samples that is no share of them, such as nan, which no number exceeds."""
    if not 0 <= max_bad <= 1:
        raise UserError(f"--max-bad {max_bad}: give the share of the samples that may be bad, 0 to 1")


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
        said = bad and f"{bad[0]['shard']} {bad[0]['key'] or ''}: {bad[0]['reason']}"
        first = f"; first: {printable(said)}" if said else ""
        raise UserError(
            f"about {lost} of {good + lost} samples in '{printable(place)}' are bad ({len(by_shard)} broken shards), "
            f"more than the limit of {max_bad:.1%}{first}"
        )


def _index_one(uri: str, shard: str) -> tuple[pa.Table, list[dict]]:
    filesystem, folder = open_filesystem(uri)
    return index_shard(filesystem, posixpath.join(folder, shard))
