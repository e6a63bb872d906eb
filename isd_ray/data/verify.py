"""Is a folder of shards what its index says, to the last byte? Reads everything once and says what is wrong.

Training needs no such check, since a broken image is noticed and named there too; before a week on a cluster it costs
minutes.
"""

import posixpath
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from isd_ray.data import index
from isd_ray.data.decode import BrokenImage, decode
from isd_ray.data.files import open_filesystem
from isd_ray.data.parallel import run_tasks
from isd_ray.data.read import Encoded, encoded
from isd_ray.errors import printable

COMPARED = ("offset", "size", "label", "width", "height")


@dataclass
class Report:
    """What a check found: counts, and findings as dict(shard, key, reason); key None: the shard itself."""

    shards: int = 0
    images: int = 0
    decoded: int = 0
    bytes: int = 0
    findings: list[dict[str, Any]] = field(default_factory=list)


def verify_shards(uri: str, *, workers: int | None = None, quiet: bool = True) -> Report:
    """Check the folder of shards `uri` against its index: one task a shard.

    Found are: shards that are missing, not in the index, damaged or cut short; samples that the index lacks, that the
    shard lacks, whose place, label or size differ; members and keys that come twice, in a shard or in the folder;
    images that do not decode or are of another size than the index says.

    workers: see `run_tasks`. Raises UserError where there is no index.
    """
    table = index.read_index(uri)
    folder = index.root(table)
    names, there = set(table["shard"].unique().to_pylist()), set(index.tars(folder))
    missing = [_finding(n, None, "the shard is missing") for n in sorted(names - there)]
    unknown = [_finding(n, None, "the shard is not in the index") for n in sorted(there - names)]
    chosen = sorted(names & there)
    items = [(folder, name, table.filter(pc.equal(table["shard"], name))) for name in chosen]
    parts = run_tasks(
        _verify_one, items, workers=workers, unit="images", quiet=quiet, total=len(table), count=_images
    )
    report = Report(shards=len(chosen), findings=missing + unknown)
    for part in parts:
        report.images += part.images
        report.decoded += part.decoded
        report.bytes += part.bytes
        report.findings += part.findings
    report.findings += _repeated(table)
    return report


def _images(part: Report) -> int:
    return part.images


def _finding(shard: str, key: str | None, reason: str) -> dict[str, Any]:
    """Say what is wrong; all of it may come from a hostile file, so that it is made fit to print."""
    return {
        "shard": printable(shard),
        "key": None if key is None else printable(key),
        "reason": printable(reason),
    }


def _repeated(table: pa.Table) -> list[dict[str, Any]]:
    """Keys that the index holds more than once."""
    counts = table["key"].value_counts()
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    rows = table.filter(pc.is_in(table["key"], value_set=twice))
    places: dict[str, list[str]] = {}
    for key, shard in zip(rows["key"].to_pylist(), rows["shard"].to_pylist(), strict=True):
        places.setdefault(key, []).append(shard)
    return [
        _finding(shards[0], key, f"the key comes {len(shards)} times: in {', '.join(sorted(set(shards)))}")
        for key, shards in sorted(places.items())
    ]


def _verify_one(folder: str, name: str, rows: pa.Table) -> Report:
    """Check one shard: its headers against the index, then every image."""
    filesystem, inner = open_filesystem(folder)
    found, bad = index.index_shard(filesystem, posixpath.join(inner, name))
    report = Report(images=len(rows), bytes=int(np.sum(rows["size"].to_numpy())))
    report.findings = [_finding(name, b["key"], b["reason"]) for b in bad]
    named = {b["key"] for b in bad}
    report.findings += _differences(name, rows, found, named)
    columns = (rows[column].to_pylist() for column in ("key", "width", "height"))
    for key, width, height, (content, _) in zip(*columns, encoded(filesystem, inner, rows), strict=True):
        problem = _image_problem(content, width, height)
        if problem and key not in named:
            report.findings.append(_finding(name, key, problem))
        report.decoded += problem is None
    return report


def _differences(name: str, rows: pa.Table, found: pa.Table, named: set[str | None]) -> list[dict[str, Any]]:
    """What the index says of a shard and its headers do not, and the other way round; not of keys
    in `named`.
    """
    said, real = (
        {row["key"]: row for row in t.to_pylist() if row["key"] not in named} for t in (rows, found)
    )
    out = [_finding(name, key, "in the index, not in the shard") for key in said if key not in real]
    out += [_finding(name, key, "in the shard, not in the index") for key in real if key not in said]
    for key in said:
        other = real.get(key, said[key])
        wrong = [
            f"{column} {other[column]}, the index says {said[key][column]}"
            for column in COMPARED
            if other[column] != said[key][column]
        ]
        if wrong:
            out.append(_finding(name, key, "; ".join(wrong)))
    return out


def _image_problem(content: Encoded, width: int, height: int) -> str | None:
    if isinstance(content, BrokenImage):
        return str(content)
    try:
        picture = decode(content)
    except BrokenImage as error:
        return str(error)
    if (picture.width, picture.height) != (width, height):
        return f"{picture.width} x {picture.height} pixels, the index says {width} x {height}"
    return None
