"""Parquet files of every schema and value become samples, or one line that names the file and what to do."""

import io
import json
import re
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import broken as b
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isd_ray.data import index, parquet
from isd_ray.data.parquet import parquet_source
from isd_ray.data.shards import make_shards
from isd_ray.errors import UserError

IMAGES = [b.file(b.pixels(i)) for i in range(4)]
ZERO_ONE = [0, 1, 1, None]


def write(folder: Path, *tables: pa.Table | dict) -> str:
    for i, table in enumerate(tables):
        pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), folder / f"{i}.parquet")
    return str(folder)


def labelled(labels, kind: pa.DataType | None = None) -> dict:
    return {"image": IMAGES, "label": pa.array(labels, kind)}


def with_metadata(text: str, labels=ZERO_ONE) -> pa.Table:
    return pa.table(labelled(labels)).replace_schema_metadata({"huggingface": text})


def features(names) -> str:
    return json.dumps({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}})


GOOD = {
    "bytes of labels": (labelled(ZERO_ONE, pa.int8()), ["0", "1"]),
    "unsigned": (labelled(ZERO_ONE, pa.uint64()), ["0", "1"]),
    "truth": (labelled([False, True, True, None]), ["0", "1"]),
    "no label at all": (labelled([None] * 4), []),
    "names": (labelled(["ant", "bee", "bee", None]), ["ant", "bee"]),
    "long names": (labelled(["ant", "bee", "bee", None], pa.large_string()), ["ant", "bee"]),
    "a dictionary of names": (labelled(["ant", "bee", "bee", None], pa.dictionary(pa.int8(), pa.string())),
                              ["ant", "bee"]),
    "a dictionary of numbers": (labelled(ZERO_ONE, pa.dictionary(pa.int8(), pa.int64())), ["0", "1"]),
    "names beside numbers": (labelled(ZERO_ONE) | {"label_name": ["ant", "bee", "bee", None]}, ["ant", "bee"]),
    "odd names beside numbers": (labelled(ZERO_ONE) | {"label_name": [[1], [2], [2], None]}, ["0", "1"]),
    "large binary": ({"image": pa.array(IMAGES, pa.large_binary()), "label": ZERO_ONE}, ["0", "1"]),
    "a struct": ({"image": [{"bytes": i, "path": None} for i in IMAGES], "label": ZERO_ONE}, ["0", "1"]),
    "Hugging Face's names": (with_metadata(features(["ant", "bee"])), ["ant", "bee"]),
    "Hugging Face's values": (with_metadata('{"info": {"features": {"label": {"dtype": "int64"}}}}'), ["0", "1"]),
    "Hugging Face's sequences": (with_metadata('{"info": {"features": {"label": [{"dtype": "x"}]}}}'), ["0", "1"]),
    "other metadata": (with_metadata('[1, {"info": 3}]'), ["0", "1"]),
    "keys of an odd type": (labelled(ZERO_ONE) | {"key": [[1], [2], None, []]}, ["0", "1"]),
    "keys without value": (labelled(ZERO_ONE) | {"key": pa.array([None] * 4, pa.string())}, ["0", "1"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", GOOD)
def test_columns_of_many_types_are_read(tmp_path, kind):
    table, classes = GOOD[kind]
    source = parquet_source(write(tmp_path, table))
    found = list(source)
    assert source.classes == classes
    assert [s.image for s in found] == IMAGES
    assert [s.label for s in found] == ([None] * 4 if not classes else ZERO_ONE)
    assert [s.key for s in found] == source.names()


TIME = datetime(2020, 1, 1)
REFUSED = {
    "labels of floats": (labelled([0.0, 1.0, 1.0, None]), "'label' of '.*0.parquet' is double: labels are whole"),
    "labels of lists": (labelled([[0], [1], [1], None]), "is list<.*>: labels are whole numbers or names"),
    "labels of structs": (labelled([{"a": 0}] * 4), "is struct<.*>: labels are"),
    "labels of times": (labelled([TIME] * 4), r"is timestamp\[us\]: labels are"),
    "labels of decimals": (labelled([Decimal("1.0")] * 4), "is decimal128.*: labels are"),
    "labels of bytes": (labelled([b"a", b"b", b"b", None]), "is binary: labels are"),
    "a label of a billion": (labelled([0, 10**9, 1, None]), "label 1000000000 .* larger than 1048575"),
    "a label of 2^64 - 1": (labelled([0, 2**64 - 1, 1, 1], pa.uint64()), "label 18446744073709551615 in column"),
    "images of numbers": ({"image": [1, 2], "label": [0, 1]}, "'image' of .* is int64, not image bytes"),
    "images of text": ({"image": ["a", "b"], "label": [0, 1]}, "is string, not image bytes"),
    "images of lists": ({"image": [[1], [2]], "label": [0, 1]}, "is list<.*>, not image bytes"),
    "images of paths": ({"image": [{"path": "x"}], "label": [0]}, "is struct<path: string>, not image bytes"),
    "images of odd bytes": ({"image": [{"bytes": "x"}], "label": [0]}, "is struct<.*>, not image bytes"),
    "two columns of one name": (
        pa.table([IMAGES, ZERO_ONE, IMAGES], ["image", "label", "image"]), "2 image columns 'image'"
    ),
    "metadata that is no JSON": (with_metadata("{"), "Hugging Face metadata of .* are no JSON"),
    "metadata nested without end": (with_metadata("[" * 10**5), "Hugging Face metadata of .* are no JSON"),
    "class names that are one text": (with_metadata(features("ant")), "by no list of names"),
    "class names that are numbers": (with_metadata(features([1, 2])), "by no list of names"),
    "class names that are a mapping": (with_metadata(features({"ant": 1})), "by no list of names"),
    "too few class names": (with_metadata(features(["ant"])), "label 1 has no name: .* name 1 classes"),
    "two names of one label": (
        labelled(ZERO_ONE) | {"label_name": ["ant", "bee", "cow", None]}, "label 1 in .* has two names, '(bee|cow)'"
    ),
    "names that are no text": (
        labelled(pa.array([b"a", b"\xff", b"b", b"c"]).view(pa.string())), "is not a readable Parquet.*UTF8"
    ),
    "control characters": ({"\x1b[2J": [1], "image\n": [2]}, r"it has \\x1b\[2J, image\\n"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_image_or_label_is_refused_in_one_line(tmp_path, kind):
    table, reason = REFUSED[kind]
    place = write(tmp_path, table)
    with pytest.raises(UserError) as error:
        list(parquet_source(place))
    assert re.search(reason, str(error.value))
    assert str(error.value).isprintable()
    assert "0.parquet" in str(error.value)


KEYS, NAMES = {"key": list("abcd")}, {"label_name": ["ant", "bee", "bee", None]}
OTHER_FILES = {
    "no label column": ({"image": IMAGES}, "no label column 'label' in '.*1.parquet'"),
    "no image column": ({"label": ZERO_ONE}, "no image column 'image' in '.*1.parquet'"),
    "names instead of numbers": (
        labelled(["ant"] * 4) | KEYS, "'label' of '.*1.parquet' holds names, in '.*0.parquet' it holds numbers"
    ),
    "another type of labels": (labelled([1.5] * 4), "'label' of '.*1.parquet' is double"),
    "no keys": (labelled(ZERO_ONE) | NAMES, "'key' of .*1.parquet' is missing, in '.*0.parquet' it holds names"),
    "no names": (labelled(ZERO_ONE) | KEYS, "'label_name' of '.*1.parquet' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_files_that_differ_are_refused_in_one_line(tmp_path, kind):
    table, reason = OTHER_FILES[kind]
    with pytest.raises(UserError, match=reason) as error:
        parquet_source(write(tmp_path, labelled(ZERO_ONE) | KEYS | NAMES, table))
    assert str(error.value).isprintable()


def test_types_of_one_meaning_may_differ_between_files(tmp_path):
    others = [labelled(ZERO_ONE, pa.int8()), labelled([None] * 4), labelled(ZERO_ONE, pa.uint64())]
    source = parquet_source(write(tmp_path, labelled(ZERO_ONE), *others))
    assert [s.label for s in source] == ZERO_ONE * 2 + [None] * 4 + ZERO_ONE
    assert source.classes == ["0", "1"]


def test_more_names_than_classes_may_have_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "LABELS", 3)
    place = write(tmp_path, labelled(list("abcd")))
    with pytest.raises(UserError, match="has 4 different labels, more than 3: are these classes"):
        parquet_source(place)


def test_a_file_that_claims_more_rows_than_it_has_bytes_is_refused(tmp_path):
    """A column of one value takes no room, whatever its length."""
    table = pa.table({"image": pa.nulls(10**6, pa.binary()), "label": pa.nulls(10**6, pa.int32())})
    with pytest.raises(UserError, match=r"it claims 1000000 rows in [0-9]{3,5} bytes"):
        parquet_source(write(tmp_path, table))


class Trap(pa.ExtensionType):
    """A type that does something when a value becomes a Python object, as one of Ray's unpickles it."""

    sprung = 0

    def __init__(self):
        super().__init__(pa.binary(), "tests.trap")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage, serialized):
        return cls()

    def __arrow_ext_scalar_class__(self):
        return Sprung


class Sprung(pa.ExtensionScalar):
    def as_py(self, **_):
        Trap.sprung += 1
        return "x"


@pytest.fixture
def trap(tmp_path):
    """Texts of a type that is known to this process alone, and works."""
    pa.register_extension_type(Trap())
    Trap.sprung = 0
    yield pa.ExtensionArray.from_storage(Trap(), pa.array([b"x"] * 4))
    pa.unregister_extension_type("tests.trap")


@pytest.mark.parametrize("name", ["label", "key", "label_name", "image", "path", "other"])
def test_no_value_of_a_foreign_type_becomes_an_object(tmp_path, trap, name):
    columns = labelled(ZERO_ONE) | {name: trap}
    if name == "path":
        columns = labelled(ZERO_ONE) | {
            "image": pa.StructArray.from_arrays([pa.array(IMAGES), trap], ["bytes", name])
        }
    place = write(tmp_path, columns)
    if name in ("label", "image"):
        with pytest.raises(UserError, match=r"is extension<tests\.trap"):
            parquet_source(place)
    else:
        assert [s.image for s in parquet_source(place)] == IMAGES
    assert Trap.sprung == 0
    trap.to_pylist()
    assert Trap.sprung == 4, "the trap works"


KINDS = (
    st.integers(0, 3), st.text(max_size=3), st.sampled_from(IMAGES), st.booleans(), st.integers(-9, 2**64 - 1),
    st.floats(), st.binary(max_size=8), st.lists(st.integers(0, 3), max_size=2), st.just(None), st.datetimes(),
    st.dictionaries(st.sampled_from(["bytes", "path"]), st.binary(max_size=4), min_size=1),
    st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-99, max_value=99),
    st.sampled_from([{"bytes": IMAGES[0], "path": "x"}, {"bytes": None, "path": "x"}]),
)  # fmt: skip


def column(data, rows: int) -> pa.Array:
    """A column of values of one kind, some missing; of nulls where Arrow has no type for them."""
    kind = data.draw(st.sampled_from(KINDS))
    values = data.draw(st.lists(kind | st.none(), min_size=rows, max_size=rows))
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        return pa.nulls(rows)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_schema_gives_samples_or_one_line(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any")
    rows = data.draw(st.integers(0, 4))
    names = st.lists(st.sampled_from(["image", "label", "key", "label_name", "x\n"]), unique=True, max_size=5)
    tables = []
    for _ in range(data.draw(st.integers(1, 2))):
        columns = {name: column(data, rows) for name in data.draw(names)}
        content = data.draw(st.sampled_from([None, "{", features(["a", "b"]), features(3), '{"info": []}']))
        metadata = None if content is None else {"huggingface": content}
        tables.append(pa.table(columns).replace_schema_metadata(metadata))
    options = {"label": data.draw(st.sampled_from(["label", "none", "key"]))}
    place = write(folder, *tables)
    said, found = "", []
    try:
        source = parquet_source(place, **options)
        found = list(source)
    except UserError as error:
        said = str(error)
    assert said.isprintable()
    if not said:
        assert len(found) == len(source) == len(source.names()) == sum(len(t) for t in tables)
        for key, image, label in found:
            assert isinstance(key, str)
            assert isinstance(image, bytes)
            assert label is None or 0 <= label < len(source.classes)


def two_groups() -> bytes:
    """A file of four rows of images, labels and keys in two groups, nothing packed."""
    table = pa.table(labelled(ZERO_ONE) | {"key": list("abcd")})
    pq.write_table(table, buffer := io.BytesIO(), row_group_size=2, compression="none", use_dictionary=False)
    return buffer.getvalue()


WHOLE = two_groups()


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_any_damage_gives_samples_or_one_line(tmp_path_factory, data):
    content = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    path = tmp_path_factory.mktemp("damaged") / "x.parquet"
    path.write_bytes(content)
    said = ""
    try:
        source = parquet_source(str(path))
        source.names()
        list(source.slice(1, 3))
    except UserError as error:
        said = str(error)
    assert said.isprintable()
    assert not said or "x.parquet" in said


def test_a_damaged_page_of_images_ends_the_job_in_one_line(tmp_path):
    content = bytearray(WHOLE)
    at = content.index(IMAGES[3]) - 40  # the header of the page, and the length of the first image in it
    content[at : at + 44] = b"\xff" * 44
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"x.parquet' is not a readable Parquet file") as error:
        make_shards(str(tmp_path / "x.parquet"), str(tmp_path / "out"), workers=0)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("max_bad", [0.5, 1.0])
def test_a_shard_without_a_good_image_is_left_out(tmp_path, max_bad):
    contents = [b"no image"] * 4 + IMAGES
    place = write(tmp_path, {"image": contents, "label": [0, 1] * 4})
    table = make_shards(place, str(tmp_path / "out"), shard_size=4, workers=0, max_bad=max_bad)
    assert table["shard"].unique().to_pylist() == ["train-000001.tar"]
    folder = tmp_path / "out" / "train"
    assert sorted(p.name for p in folder.iterdir()) == [
        "bad_samples.jsonl", "index.parquet", "make_shards.json", "train-000001.tar"
    ]  # fmt: skip
    assert len((folder / "bad_samples.jsonl").read_text().splitlines()) == 4
    assert index.index_shards(str(folder), workers=0)[0].equals(table)
    assert make_shards(place, str(tmp_path / "out"), shard_size=4, workers=0, max_bad=max_bad).equals(table)
    with pytest.raises(UserError, match=r"about 4 of 8 samples .* are bad .*not an image"):
        make_shards(place, str(tmp_path / "out"), shard_size=4, workers=0, max_bad=0.4)


def test_a_set_without_a_good_image_is_refused_in_one_line(tmp_path):
    place = write(tmp_path, {"image": [b"no image", None], "label": [0, 1]})
    with pytest.raises(UserError, match=r"about 2 of 2 samples .* are bad"):
        make_shards(place, str(tmp_path / "out"), workers=0, max_bad=1.0)


def test_large_images_are_read_few_at_a_time(tmp_path, monkeypatch):
    """Thirty images of half a megabyte in one group, where four may be held."""
    noise = np.random.default_rng(0)
    pq.write_table(pa.table({"image": [noise.bytes(2**19) for _ in range(30)]}), tmp_path / "x.parquet")
    monkeypatch.setattr(parquet, "LOCAL_BYTES", 2**21)
    held = []
    samples = parquet.ParquetSource._samples
    monkeypatch.setattr(
        parquet.ParquetSource, "_samples", lambda self, b, i: held.append(b.nbytes) or samples(self, b, i)
    )
    assert len(list(parquet_source(str(tmp_path / "x.parquet"), label="none"))) == 30
    assert max(held) <= 2**21 + 64
