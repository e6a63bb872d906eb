"""Whatever bytes an index and its shards have, they are read, or named in one line: no other error, no great memory."""

import io
import json
import tracemalloc

import broken as b
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs as pafs

from isd_ray.data import blocks, index, scan
from isd_ray.data.parallel import run_tasks
from isd_ray.data.read import Shape, read_rows
from isd_ray.data.shards import make_shards
from isd_ray.data.stream import Stream
from isd_ray.data.verify import verify_shards
from isd_ray.errors import UserError
from isd_ray.train.embedding import CentreView
from isd_ray.train.encoder import from_weights

LOCAL = pafs.LocalFileSystem()
LONG = "/".join(["long" * 20] * 3)


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    """Keep these tests in this process, also where another test has started Ray."""
    monkeypatch.setattr(blocks.ray, "is_initialized", lambda: False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of two shards and their index."""
    folder = tmp_path_factory.mktemp("whole")
    for name in "pq":
        samples = [m for i in range(3) for m in b.sample(f"{name}{LONG}{i}", i, content=b.file(b.pixels(i)))]
        (folder / f"{name}.tar").write_bytes(b.tar(*samples))
    index.write_index(index.index_shards(str(folder), workers=0)[0], str(folder))
    return folder


def file_of(table: pa.Table, **options) -> bytes:
    pq.write_table(table, buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def damage(data, content: bytes) -> bytes:
    """Change a few bytes, and perhaps cut the end off."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 6))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.booleans())
    return bytes(changed[: data.draw(st.integers(0, len(changed)))] if cut else changed)


def said_by(call, *arguments, **options) -> str:
    """Return what the call refuses its input with, "" where it does not."""
    try:
        call(*arguments, **options)
    except UserError as error:
        return str(error)
    return ""


# -- the index -----------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_an_index_of_any_damage_is_read_or_refused_in_one_line(tmp_path_factory, whole, data):
    folder = tmp_path_factory.mktemp("damaged")
    content = (whole / "index.parquet").read_bytes()
    if data.draw(st.booleans()):  # as written before there were checksums: what is read may then be anything
        content = file_of(index.read_index(str(whole)), use_dictionary=data.draw(st.booleans()))
    (folder / "index.parquet").write_bytes(damage(data, content))
    said = said_by(index.read_index, str(folder))
    assert said.isprintable()
    assert not said or "index.parquet" in said


def test_a_changed_value_is_noticed_wherever_it_is(whole, tmp_path):
    """Every seventh byte of an index, one after the other: it is refused, or what is read of it has not changed."""
    table = index.read_index(str(whole))
    content = (whole / "index.parquet").read_bytes()
    refused = 0
    for at in range(0, len(content), 7):
        changed = bytearray(content)
        changed[at] ^= 0x10
        (tmp_path / "index.parquet").write_bytes(changed)
        try:
            found = index.read_index(str(tmp_path))
            assert found.equals(table)
            assert index.classes(found) == index.classes(table)
        except UserError:
            refused += 1
    assert refused > len(content) / 7 / 3


def test_the_checksum_is_of_the_content_however_it_lies_in_memory(whole, tmp_path):
    table = index.read_index(str(whole))
    sums = []
    for i, other in enumerate(
        [table, table.take(list(range(6))), pa.concat_tables([table[:1], table[1:]]), table[:5]]
    ):
        meta = table.schema.metadata
        index.write_index(other.replace_schema_metadata(meta), str(tmp_path / str(i)))
        stored = pq.read_schema(tmp_path / str(i) / "index.parquet").metadata[b"isd_ray"]
        sums.append(json.loads(stored)["sha256"])
        assert index.read_index(str(tmp_path / str(i))).equals(other)
    assert len(sums[0]) == 64
    assert sums[0] == sums[1] == sums[2] != sums[3]


@pytest.mark.parametrize("column", [f.name for f in scan.SCHEMA])
def test_another_value_in_any_column_is_damage(whole, tmp_path, column):
    meta = pq.read_schema(whole / "index.parquet").metadata
    table = index.read_index(str(whole))
    for values in (table[column].to_pylist()[::-1], [None] * 6):
        place = table.column_names.index(column)
        changed = table.set_column(place, column, pa.array(values, scan.SCHEMA.field(column).type))
        if changed[column].equals(table[column]):
            continue
        pq.write_table(changed.replace_schema_metadata(meta), tmp_path / "index.parquet")
        with pytest.raises(
            UserError, match="is damaged: it has changed since it was written: make the index again"
        ):
            index.read_index(str(tmp_path))
        pq.write_table(changed.replace_schema_metadata(table.schema.metadata), tmp_path / "index.parquet")
        assert "it has changed" not in said_by(index.read_index, str(tmp_path))  # no checksum, no such fault


ODD = {
    "class names that are one text": {"classes": "abc"},
    "class names that are numbers": {"classes": [1, 2, 3]},
    "class names that are a mapping": {"classes": {"a": 1}},
    "a checksum that is none": {"sha256": {"a": []}},
    "a format with escapes": {"format": "\x1b[2J"},
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_metadata_are_refused_in_one_line(whole, tmp_path, kind):
    table = index.read_index(str(whole))
    meta = json.loads(table.schema.metadata[b"isd_ray"]) | ODD[kind]
    pq.write_table(table.replace_schema_metadata({"isd_ray": json.dumps(meta)}), tmp_path / "index.parquet")
    said = said_by(index.read_index, str(tmp_path))
    assert said
    assert said.isprintable()


def test_names_that_are_no_utf8_and_metadata_without_end_are_refused_in_one_line(whole, tmp_path):
    table = index.read_index(str(whole))
    wrong = pa.array([b"\xff"] * 6, pa.binary()).view(pa.string())
    for column in ("shard", "key"):
        pq.write_table(
            table.set_column(table.column_names.index(column), column, wrong), tmp_path / "x.parquet"
        )
        assert "not a readable index (" in said_by(index.read_index, str(tmp_path / "x.parquet"))
    nested = table.replace_schema_metadata({"isd_ray": "[" * 10**5})
    pq.write_table(nested, tmp_path / "x.parquet")
    assert "not a readable index (" in said_by(index.read_index, str(tmp_path / "x.parquet"))


def test_an_index_that_is_a_folder_is_refused_in_one_line(tmp_path):
    (tmp_path / "index.parquet").mkdir()
    assert "index.parquet" in said_by(index.read_index, str(tmp_path))


def test_an_index_that_claims_more_rows_than_it_has_bytes_takes_no_memory(tmp_path):
    """A million rows of equal values in some kilobytes; as a table they would take 40 MB."""
    rows = 10**6
    columns = [pa.repeat(pa.scalar(0 if f.type != pa.string() else "x", f.type), rows) for f in scan.SCHEMA]
    table = index.with_metadata(pa.Table.from_arrays(columns, schema=scan.SCHEMA), str(tmp_path), ["0"])
    pq.write_table(table, tmp_path / "index.parquet", compression="gzip")
    del table, columns
    before = pa.total_allocated_bytes()
    assert "it claims 1000000 rows in" in said_by(index.read_index, str(tmp_path))
    assert pa.total_allocated_bytes() - before < 2**20


# -- rows ----------------------------------------------------------------------------------------------------


RANGES = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.integers(-600, 9000), st.sampled_from([512, 1024, 2**29])
)
SHARDS = ["p.tar", "q.tar", "none.tar", "a\x1b.tar", "a\n/b.tar", "a\0b", "x" * 5000]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_rows_give_images_or_reasons(whole, data):
    """An index that points anywhere, with any keys: every row is an image or a reason, in bounded memory."""
    table = index.read_index(str(whole))
    rows = data.draw(st.integers(1, 6))
    changed = table.slice(0, rows).to_pydict()
    for name, values in {
        "offset": RANGES,
        "size": RANGES,
        "shard": st.sampled_from(SHARDS),
        "key": st.text(),
    }.items():
        for i in range(rows):
            if data.draw(st.booleans()):
                changed[name][i] = data.draw(values)
    hostile = pa.table(changed, scan.SCHEMA)
    shape = data.draw(st.sampled_from([Shape((8, 12)), Shape((8, 8), center=True)]))
    every = np.arange(rows)
    tracemalloc.start()
    found = list(read_rows(LOCAL, str(whole), hostile, every, every, 4, shape))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2**20
    assert [i for block in found for i in block["row"]] == every.tolist()
    for i, block in enumerate(found):
        for image, reason in zip(block["image"], block["reason"], strict=True):
            assert reason == "" or not image.any()
            assert "\n" not in reason
        assert len(block["reason"]) == min(4, rows - 4 * i)


# -- shards --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_shards_of_any_damage_are_checked_and_read(tmp_path_factory, whole, data):
    """A shard that was damaged after it was indexed."""
    folder = tmp_path_factory.mktemp("damaged")
    for name in ("q.tar", "index.parquet"):
        (folder / name).write_bytes((whole / name).read_bytes())
    (folder / "p.tar").write_bytes(damage(data, (whole / "p.tar").read_bytes()))
    report = verify_shards(str(folder), workers=0)
    assert all(f["shard"] == "p.tar" for f in report.findings)
    for finding in report.findings:
        assert finding["reason"].isprintable()
        assert finding["key"] is None or finding["key"].isprintable()
    table = index.read_index(str(folder))
    images, bad = b.streamed(table)
    assert len(images) + len(bad) == 6
    for key, reason in bad.items():
        assert any(f["key"] in (key, None) for f in report.findings)
        assert reason.isprintable()


def test_names_and_reasons_of_findings_are_printable(tmp_path):
    name = "\x1b[2J\nerror: all images are fine"
    members = [
        *b.sample(name),
        *b.sample("b", 1),
        (f"c.{name}", b"x"),
        *b.sample(f"d{name}", extension="jpg", content=b"x"),
    ]
    (tmp_path / "s.tar").write_bytes(b.tar(*members))
    table, bad = index.index_shards(str(tmp_path), workers=0, max_bad=1.0)
    assert all(entry["reason"].isprintable() for entry in bad)
    index.write_index(table.take([1]), str(tmp_path))
    (tmp_path / f"s{name.replace('/', '')}.tar").write_bytes(b.tar(*b.sample("z")))
    findings = verify_shards(str(tmp_path), workers=0).findings
    assert len(findings) >= 4
    for finding in findings:
        assert finding["shard"].isprintable()
        assert finding["key"] is None or finding["key"].isprintable()
        assert finding["reason"].isprintable()
    shown = {finding["key"] for finding in findings}
    assert r"\x1b[2J\nerror: all images are fine" in shown


def test_compressed_shards_are_checked_too(tmp_path):
    import gzip

    content = b.tar(*b.sample("a"), *b.sample("z", 2))
    (tmp_path / "s.tar.gz").write_bytes(gzip.compress(content))
    index.write_index(index.index_shards(str(tmp_path), workers=0)[0], str(tmp_path))
    report = verify_shards(str(tmp_path), workers=0)
    assert (report.decoded, report.findings) == (2, [])


# -- what cannot be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [float("nan"), -0.1, 1.1, float("inf")])
def test_a_limit_that_is_no_share_is_refused_before_anything_is_read_or_written(whole, tmp_path, share):
    table = index.read_index(str(whole))
    calls = [
        lambda: make_shards("sklearn:digits", str(tmp_path / "out"), workers=0, max_bad=share),
        lambda: index.index_shards(str(tmp_path), workers=0, max_bad=share),
        lambda: Stream(table, seed=0, global_batch=2, size=8, views=["weak"], max_bad=share),
        lambda: blocks.BadImages(table, share),
    ]
    for call in calls:
        with pytest.raises(UserError, match=f"--max-bad {share}: give the share .*, 0 to 1"):
            call()
    assert not list(tmp_path.iterdir())


def test_a_view_without_pixels_and_negative_workers_are_refused(tmp_path):
    with pytest.raises(UserError, match="a view of 0 pixels: --image-size is at least 1"):
        CentreView(0, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(UserError, match="a view of 0 pixels: --image-size is at least 1"):
        from_weights(str(tmp_path / "none.pth"), "resnet8", image_size=0)
    with pytest.raises(UserError, match="--workers -1: give the tasks at once"):
        run_tasks(len, [("a",)], workers=-1)
