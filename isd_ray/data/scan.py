"""One WebDataset tar becomes rows of the index from its headers alone, whatever the tar is: a hostile one is reported.

Nothing is extracted, linked to, unpickled or executed. Names of members are data, never paths; images are opened as far
as their headers; labels are parsed as integers or JSON.
"""

import io
import json
import posixpath
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import pyarrow as pa
from pyarrow import fs as pafs

from isd_ray.data.decode import MAX_BYTES, describe, open_header, orientation
from isd_ray.data.headers import open_tar, split_key
from isd_ray.data.packed import open_shard
from isd_ray.data.store import StoreError
from isd_ray.errors import printable

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "gif", "jp2")
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
LABELS = (
    1 << 20
)  # a label is smaller: every class costs a name, a place in histograms and a row of a classifier
_BUFFER = 1 << 17  # bytes fetched at once: a few small samples, or the head of a large one
_LABEL_BYTES = 1 << 20  # a label member beyond this is not a label
_META = re.compile(r"(^|/)__[^/]*__($|/)")  # members that WebDataset keeps for itself
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def index_shard(filesystem: pafs.FileSystem, path: str) -> tuple[pa.Table, list[dict]]:
    """Index one WebDataset tar, reading headers and the first bytes of each image only.

    Members belong to one sample while their path up to the first dot of the base name is the same; where they lie apart
    they are joined, where one comes twice the first counts and the other is reported. A sample needs an image member
    (one of IMAGE_EXTENSIONS) that is a plain file; its label is an integer in `.cls` or under "label" in `.json`. Bytes
    of a name that are no UTF-8 stand in the key as `\\xNN`.

    Returns:
        The rows (SCHEMA) in order of their place, and the bad samples as dict(shard, key, reason); key is None where
        the shard itself is broken, with `rows` the number of samples found before the break.
    """
    samples = _Samples(posixpath.basename(path))
    broken = None
    try:
        with open_shard(filesystem, path) as raw:
            scan = _Scan(io.BufferedReader(raw, _BUFFER), raw.length)
            for group in scan.groups():
                samples.add(group, scan)
            broken = scan.end_problem()
            if broken:
                samples.drop_unfinished()
    except (tarfile.TarError, OSError) as error:
        broken = str(error)
    rows, bad = samples.finish()
    if broken is None and not (rows or bad):
        broken = "no sample in the tar"
    if broken is not None:
        reason = printable((broken.splitlines() or ["unreadable"])[0])[:200]
        bad.append({"shard": samples.shard, "key": None, "reason": reason, "rows": len(rows)})
    return pa.Table.from_pylist(rows, schema=SCHEMA), bad


@dataclass
class _Group:
    """Neighbouring members of one key, by extension; `twice` are extensions that came again."""

    key: str
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)

    def add(self, extension: str, info: tarfile.TarInfo) -> None:
        if extension in self.members:
            self.twice.append(extension)
        self.members.setdefault(extension, info)


class _Samples:
    """The samples of a shard, joined from groups, and what is wrong with them."""

    def __init__(self, shard: str):
        self.shard = shard
        self.rows: dict[str, dict[str, Any]] = {}
        self.bad: list[dict[str, Any]] = []
        self.lost: set[str] = set()

    def add(self, group: _Group, scan: "_Scan") -> None:
        """Take a group; a sample with anything unreadable about it is lost, with one reason."""
        if group.key in self.lost:
            return
        if group.twice:
            self._note(
                group.key, f"{', '.join(group.twice)} comes again in this sample: the first one counts"
            )
        try:
            self._join(group, scan.image(group.members), scan.label(group.members))
        except StoreError:
            raise
        except Exception as error:  # so do the parsers of images and labels
            self.lost.add(group.key)
            self.rows.pop(group.key, None)
            self._note(group.key, str(error) if type(error) in (BadSample, OSError) else describe(error))

    def _join(self, group: _Group, image: dict[str, int] | None, label: int | None) -> None:
        row = self.rows.setdefault(
            group.key, {"shard": self.shard, "key": group.key, "others": sorted(group.members)}
        )
        if image and "offset" in row:
            self._note(group.key, "the key comes again in this shard: the first image counts")
            return
        if None not in (label, row.get("label")) and label != row["label"]:
            raise BadSample(f"two labels, {row['label']} and {label}")
        row.update(image or {})
        row["label"] = row.get("label") if label is None else label

    def drop_unfinished(self) -> None:
        """Drop the last sample of a damaged tar if it has no label: it may have had one."""
        if self.rows and next(reversed(self.rows.values())).get("label") is None:
            self.rows.popitem()

    def finish(self) -> tuple[list[dict], list[dict]]:
        """Return the rows in order of their place, and the bad samples."""
        rows = []
        for key, row in self.rows.items():
            others = [e or "a member without extension" for e in row.pop("others")]
            if "offset" in row:
                rows.append(row)
            else:
                self._note(key, f"no image member, only {', '.join(others)}"[:200])
        return sorted(rows, key=lambda row: row["offset"]), self.bad

    def _note(self, key: str, reason: str) -> None:
        self.bad.append({"shard": self.shard, "key": key, "reason": printable(reason)[:300]})


class BadSample(ValueError):
    """A sample that cannot be used; the message is the reason."""


class _Scan:
    """One pass over the headers of one tar."""

    def __init__(self, file: io.BufferedReader, length: int):
        self.file, self.length = file, length
        self.damage: str | None = None
        first = file.peek(12)[:12]
        packed = next((kind for magic, kind in _PACKED.items() if first.startswith(magic)), None)
        if packed:
            raise tarfile.ReadError(f"compressed tar ({packed}): name it as such (.tar.gz), or unpack it")
        try:
            self.tar = open_tar(file)
        except tarfile.ReadError as error:
            raise tarfile.ReadError(f"not a tar: {error}; it begins with {first!r}") from None

    def groups(self) -> Iterator[_Group]:
        """Yield the members in order of the tar, neighbours of one key together."""
        group: _Group | None = None
        for info in self._members():
            key, extension = split_key(info.name)
            if info.isdir() or not posixpath.basename(key) or _META.search(info.name):
                continue
            if group is None or key != group.key:
                if group:
                    yield group
                group = _Group(key)
            group.add(extension, info)
        if group:
            yield group

    def _members(self) -> Iterator[tarfile.TarInfo]:
        """Yield the headers up to the first damage, which `end_problem` tells."""
        try:
            for info in self.tar:
                self.tar.members = []  # type: ignore[attr-defined]  # tarfile keeps all; a shard may hold millions
                if info.size < 0 or self.tar.offset < info.offset_data:
                    raise tarfile.ReadError(f"a member of {info.size} bytes")
                if info.offset_data + info.size > self.length and not info.issparse():
                    return
                yield info
        except (OSError, StoreError):  # not the tar's fault
            raise
        except Exception as error:  # tarfile raises nearly anything on hostile bytes
            self.damage = str(error) if isinstance(error, tarfile.TarError) else describe(error)

    def image(self, members: dict[str, tarfile.TarInfo]) -> dict[str, int] | None:
        """Return offset, size, width and height of the image member, None where there is none."""
        info = next((members[e] for e in members if e in IMAGE_EXTENSIONS), None)
        if info is None:
            return None
        if info.size == 0:
            _require_plain(info)
            raise BadSample("image member of zero bytes")
        if info.size > MAX_BYTES:
            raise BadSample(f"image member of {info.size} bytes, more than {MAX_BYTES}")
        with open_header(self._open(info)) as picture:
            width, height = picture.size
            if orientation(picture) >= 5:  # stored lying on its side
                width, height = height, width
        return {"offset": info.offset_data, "size": info.size, "width": width, "height": height}

    def label(self, members: dict[str, tarfile.TarInfo]) -> int | None:
        """Return the label, None where there is none or a negative one."""
        if "cls" in members:
            return _checked_label(self._text(members["cls"]), ".cls")
        if "json" in members:
            content = json.loads(self._text(members["json"]))
            label = content.get("label") if isinstance(content, dict) else None
            return None if label is None else _checked_label(label, ".json")
        return None

    def _text(self, info: tarfile.TarInfo) -> str:
        if info.size > _LABEL_BYTES:
            raise BadSample(f"label member of {info.size} bytes, more than {_LABEL_BYTES}")
        return self._open(info).read().decode("utf-8")

    def _open(self, info: tarfile.TarInfo) -> IO[bytes]:
        _require_plain(info)
        stream = self.tar.extractfile(info)
        assert stream is not None  # of a plain file
        return stream

    def end_problem(self) -> str | None:
        """Say what is wrong with the end of the tar: a whole one ends in a block of zeros, which tarfile does
        not ask for.
        """
        if self.damage:
            return f"truncated or damaged tar: {self.damage}"
        last = self.tar.offset
        self.file.seek(min(last, self.length))
        if last >= self.length or any(self.file.read(512)):
            return "truncated or damaged tar: it does not end in an end-of-archive mark"
        return None


def _require_plain(info: tarfile.TarInfo) -> None:
    kinds = {"symbolic link": info.issym(), "hard link": info.islnk(), "sparse file": info.issparse()}
    if any(kinds.values()) or not info.isreg():
        kind = next((k for k, holds in kinds.items() if holds), "device or the like")
        raise BadSample(f"its member is a {kind}: only plain files are read")


def _checked_label(value: object, source: str) -> int | None:
    try:
        label = int(value) if isinstance(value, str | int) and not isinstance(value, bool) else None
    except ValueError:
        label = None
    if label is None:
        raise BadSample(f"label {str(value)[:40]!r} in {source} is not an integer")
    if label >= LABELS:
        raise BadSample(f"label {str(label)[:40]} in {source} is larger than {LABELS - 1}")
    return label if label >= 0 else None
