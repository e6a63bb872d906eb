"""Images in Parquet files: a column of their bytes, one of labels (numbers or names) and, where
there is one, of keys.

Every file is looked at before any image is read: what a column may hold is decided by its type, and
all files must agree. Names of classes are those of the label column itself, of Hugging Face's
metadata or of a column `label_name`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from isd_ray.data.files import expand, open_filesystem
from isd_ray.data.read import LOCAL_BYTES
from isd_ray.data.samples import UNLABELLED, Sample, row_name
from isd_ray.data.scan import LABELS
from isd_ray.data.store import StoredFile
from isd_ray.ending import broken
from isd_ray.errors import UserError, printable

_ROWS_AT_ONCE = 64  # or fewer, where their images take more than LOCAL_BYTES
_NAMES = "label_name"  # column of class names beside one of numbers


@dataclass(frozen=True)
class ParquetSource:
    """Rows [start, stop) of Parquet files end to end; images are binary or structs {bytes, path}."""

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
            return [row_name(i) for i in range(self.start, self.stop)]
        column = [str(k) for uri in self.files for k in _column(uri, key).to_pylist()]
        return column[self.start : self.stop]

    def __iter__(self) -> Iterator[Sample]:
        first = 0
        for uri, rows in zip(self.files, self.rows, strict=True):
            missing = min(self.stop, first + rows) - max(self.start, first)
            if missing > 0:
                with opened(uri) as file:
                    for sample in self._of_file(file, first):
                        missing -= 1
                        yield sample
                if missing:
                    raise UserError(f"'{printable(uri)}' is damaged: it has fewer rows than it says")
            first += rows

    def _of_file(self, file: pq.ParquetFile, first: int) -> Iterator[Sample]:
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first < self.stop and first + rows > self.start:
                yield from self._of_group(file, group, first)
            first += rows

    def _of_group(self, file: pq.ParquetFile, group: int, first: int) -> Iterator[Sample]:
        said = file.metadata.row_group(group)
        at_once = LOCAL_BYTES * said.num_rows // max(said.total_byte_size, 1)
        size = min(max(at_once, 1), _ROWS_AT_ONCE)
        wanted = [c for c in self.columns if c]
        for batch in file.iter_batches(size, row_groups=[group], columns=wanted):
            low, high = max(self.start - first, 0), min(self.stop - first, len(batch))
            if low < high:
                yield from self._samples(batch.slice(low, high - low), first + low)
            first += len(batch)

    def _samples(self, batch: pa.RecordBatch, first: int) -> Iterator[Sample]:
        image, label, key = self.columns
        batch.validate(full=True)
        labels = batch[label].to_pylist() if label else [None] * len(batch)
        keys = batch[key].to_pylist() if key else [row_name(first + i) for i in range(len(batch))]
        for name, content, value in zip(keys, _bytes(batch[image]).to_pylist(), labels, strict=True):
            number = self.numbers[value] if self.numbers and value is not None else value
            yield Sample(str(name), content or b"", None if number is None or number < 0 else int(number))


def _bytes(images: pa.Array) -> pa.Array:
    """Return the encoded images alone: what else a struct holds may be of any type, and is not
    looked at.
    """
    if pa.types.is_dictionary(images.type):
        images = images.dictionary_decode()
    return pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images


def parquet_source(uri: str, image: str = "image", label: str = "label", key: str = "key") -> ParquetSource:
    """Open Parquet files with image bytes; labels are whole numbers or names, keys (where there
    are) too.

    Raises:
        UserError: no file, one that is damaged, a column that is missing, differs between the files
            or holds something else, or a label that is too large or has no name.
    """
    files = expand(uri, ".parquet")
    wanted = None if label == UNLABELLED else label
    schemas, rows = {}, []
    for file in files:
        with opened(file) as parquet:
            schemas[file] = parquet.schema_arrow
            rows.append(parquet.metadata.num_rows)
    first = schemas[files[0]]
    has_keys = _kind(first, key) in ("names", "numbers")
    for file, schema in schemas.items():
        _require_image(file, schema, image)
        if wanted:
            _require_label(file, schema, wanted)
        if has_keys:
            _require_same(file, schema, files[0], first, key)
    classes, numbers = _classes(schemas, wanted) if wanted else ([], None)
    columns = (image, wanted, key if has_keys else None)
    return ParquetSource(tuple(files), tuple(rows), columns, classes, numbers, 0, sum(rows))


# -- files ---------------------------------------------------------------------------------------------------


@contextmanager
def opened(uri: str) -> Iterator[pq.ParquetFile]:
    """Open one file; whatever its bytes make the reader raise is a UserError that names the file."""
    said = printable(uri)
    try:
        filesystem, path = open_filesystem(uri)
        local = isinstance(filesystem, pafs.LocalFileSystem)
        with StoredFile(filesystem, path) as stored:
            file = pq.ParquetFile(
                stored.file if local else stored
            )  # of a store, reads that fail are repeated
            if file.metadata.num_rows > stored.length:  # an image takes a byte
                raise ValueError(f"it claims {file.metadata.num_rows} rows in {stored.length} bytes")
            yield file
    except OSError as error:
        if error.errno:
            raise broken(said, error) from error
        raise _damaged(said, error) from error
    except (pa.ArrowException, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise _damaged(said, error) from error


def _damaged(said: str, error: Exception) -> UserError:
    reason = printable((str(error).splitlines() or [type(error).__name__])[0])[:300]
    return UserError(f"'{said}' is not a readable Parquet file: {reason}")


def _column(uri: str, name: str) -> pa.ChunkedArray:
    """Return a whole column of a file, each value by itself; texts are checked to be such."""
    with opened(uri) as file:
        column = file.read([name])[name]
        column = column.cast(_plain(column.type))
        column.validate(full=True)
        return column.cast(pa.large_string()) if _holds(column.type) == "names" else column


# -- columns -------------------------------------------------------------------------------------------------


def _require_once(file: str, schema: pa.Schema, role: str, name: str) -> None:
    times = schema.names.count(name)
    if times != 1:
        there = ", ".join(schema.names)
        none = " (none: unlabelled)" if role == "label" else ""
        fault = f"no {role} column" if times == 0 else f"{times} {role} columns"
        raise UserError(
            printable(f"{fault} '{name}' in '{file}': it has {there}; name yours with --{role}-column{none}")
        )


def _require_image(file: str, schema: pa.Schema, name: str) -> None:
    _require_once(file, schema, "image", name)
    stated = schema.field(name).type
    kind = _plain(stated)
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = _plain(kind.field("bytes").type)
    if not _is_binary(kind):
        raise UserError(printable(f"column '{name}' of '{file}' is {stated}, not image bytes")[:500])


def _require_label(file: str, schema: pa.Schema, name: str) -> None:
    _require_once(file, schema, "label", name)
    if _kind(schema, name) == "":
        raise UserError(
            printable(f"column '{name}' of '{file}' is {schema.field(name).type}")[:400]
            + ": labels are whole numbers or names of classes; cast it, or take another with --label-column"
        )


def _require_same(file: str, schema: pa.Schema, first_file: str, first: pa.Schema, name: str) -> None:
    """Refuse a file whose column `name` is missing or of another kind than in the first one."""
    kinds = _kind(schema, name), _kind(first, name)
    if kinds[0] != kinds[1] and "nothing" not in kinds:
        here, there = ("is missing" if k == "missing" else f"holds {k or 'something else'}" for k in kinds)
        fault = f"column '{name}' of '{file}' {here}, in '{first_file}' it {there}"
        raise UserError(printable(f"{fault}: write all files with the same columns"))


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_binary(kind: pa.DataType) -> bool:
    tests = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_fixed_size_binary,
        pa.types.is_binary_view,
    )
    return any(test(kind) for test in tests)


def _kind(schema: pa.Schema, name: str) -> str:
    """Return what a column holds, as `_holds` says, or "missing"."""
    return _holds(schema.field(name).type) if schema.names.count(name) == 1 else "missing"


def _holds(kind: pa.DataType) -> str:
    """Return what a type stands for: "numbers" (whole ones), "names", "nothing" (no value at all)
    or "" (all else).
    """
    kind = _plain(kind)
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return "numbers"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "names"
    return "nothing" if pa.types.is_null(kind) else ""


# -- classes -------------------------------------------------------------------------------------------------


def _classes(schemas: dict[str, pa.Schema], label: str) -> tuple[list[str], dict[str, int] | None]:
    """Return (class names, name -> number where labels are names); only label columns are read."""
    first_file, first = next(iter(schemas.items()))
    for file, schema in schemas.items():
        _require_same(file, schema, first_file, first, label)
    found: set[Any] = set()
    for file in schemas:
        found.update(_column(file, label).unique().to_pylist())
    found.discard(None)
    if len(found) > LABELS:
        raise UserError(
            printable(
                f"column '{label}' of '{first_file}' has {len(found)} different labels, more than {LABELS}: "
            )
            + "are these classes? Take another with --label-column"
        )
    if any(isinstance(value, str) for value in found):
        classes = sorted(found)
        return classes, {name: i for i, name in enumerate(classes)}
    top = int(max(found, default=-1))
    if top >= LABELS:
        raise UserError(
            printable(f"label {top} in column '{label}' of '{first_file}' is larger than {LABELS - 1}: ")
            + "number the classes from 0"
        )
    return _number_names(schemas, label, top), None


def _number_names(schemas: dict[str, pa.Schema], label: str, top: int) -> list[str]:
    """Return the names of labels 0 .. top that are numbers: as the files state, else the numbers."""
    first_file, first = next(iter(schemas.items()))
    names = _features(first_file, first, label)
    if names:
        if top >= len(names):
            raise UserError(
                f"label {top} has no name: the Hugging Face metadata of '{printable(first_file)}' name "
                f"{len(names)} classes"
            )
        return names
    if _kind(first, _NAMES) != "names":
        return [str(i) for i in range(top + 1)]
    found: dict[int, str] = {}
    for file, schema in schemas.items():
        _require_same(file, schema, first_file, first, _NAMES)
        columns = [_column(file, name) for name in (label, _NAMES)]
        pairs = pa.table(columns, [label, _NAMES]).group_by([label, _NAMES]).aggregate([])
        for value, name in zip(*(pairs[c].to_pylist() for c in (label, _NAMES)), strict=True):
            if value is not None and name is not None and found.setdefault(int(value), name) != name:
                raise UserError(
                    printable(f"label {value} in '{file}' has two names, '{found[int(value)]}' and '{name}'")
                )
    return [found.get(i, str(i)) for i in range(top + 1)]


def _features(file: str, schema: pa.Schema, label: str) -> list[str]:
    """Return the class names that Hugging Face's data sets write into the Parquet schema, or []."""
    text = (schema.metadata or {}).get(b"huggingface")
    if not text:
        return []
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"the Hugging Face metadata of '{printable(file)}' are no JSON: write it again"
        ) from error
    for part in ("info", "features", label, "names"):
        found = found.get(part) if isinstance(found, dict) else None
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise UserError(
            printable(
                f"the Hugging Face metadata of '{file}' name the classes of '{label}' by no list of names"
            )
        )
    return found
