"""What cases are made of: files that are damaged, trees of values that are altered, texts that nobody expects."""

import io
import json
import string
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from hypothesis import strategies as st

TEXTS = (
    "", " ", "a", "0", "-1", "nan", "1e999", "true", "null", ".", "..", "/", "~", "../x", "a/b",
    "a\\b", "a b", "é", "ünï cödé", "日本", "\x00", "a\x00b", "\n", "a\nerror: forged",
    "\x1b[31mred\x1b[0m", "\r", "\u202eabc", "\u2028", "\udc80", "a\udcffb", "%s", "{split}",
    "{}", "$HOME", "`id`", "*", "[", "a?b", "#", "-", "--", "--x", "=", ":", "!!", "x" * 300,
    "é" * 200, "s3:", "s3://", "://", "file://", "none", "None", "auto", "0x10", "1_000", "٣",
    "²",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, -(2**31) - 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64,
    -(2**63) - 1, 10**20, 10**400, 0.0, -0.0, 0.5, -1.5, 1e-320, 1e-9, 1e9, 1e38, 1e39, 1e308,
    float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
FILES = (
    b"", b"\x00", b"\n", b"{}", b"[]", b"null", b"1", b'"a"', b"nan", b"\xff\xfe\x00",
    b"\x89PNG\r\n\x1a\n", b"PK\x03\x04", b"PAR1PAR1", b"\x1f\x8b\x08\x00", b"\x80\x04.",
    b"a: b: c", b"\xef\xbb\xbf{}", b"[" * 3000, b"{\"a\":" * 3000, b"9" * 5000, b"\x00" * 2048,
    b"- " * 2000,
)  # fmt: skip

texts = st.one_of(st.sampled_from(TEXTS), st.text(max_size=8), st.text(string.printable, max_size=8))
leaves = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.integers(-5, 50), texts
)
values = st.one_of(
    leaves,
    st.lists(leaves, max_size=3),
    st.dictionaries(texts, leaves, max_size=3),
    st.builds(lambda: [[[[]]]]),
    st.builds(lambda: {"a": {"b": {"c": {}}}}),
)


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """Return files that were cut, overwritten, mixed up or replaced."""
    size = len(content)
    places = st.integers(0, max(size - 1, 0))

    def overwrite(hits: list[tuple[int, bytes]]) -> bytes:
        changed = bytearray(content)
        for place, new in hits:
            changed[place : place + len(new)] = new
        return bytes(changed)

    hits = st.lists(st.tuples(places, st.binary(min_size=1, max_size=8)), min_size=1, max_size=4)
    return st.one_of(
        places.map(lambda end: content[:end]),
        hits.map(overwrite),
        st.tuples(places, st.integers(1, 600)).map(lambda p: content[: p[0]] + content[sum(p) :]),
        st.tuples(places, st.binary(min_size=1, max_size=20)).map(
            lambda p: content[: p[0]] + p[1] + content[p[0] :]
        ),
        st.tuples(places, places).map(lambda p: content[: max(p)] + content[min(p) :]),
        st.sampled_from(FILES),
        st.binary(max_size=64),
    )


def altered(tree: Any, changes: int = 2) -> st.SearchStrategy[Any]:
    """Return trees of mappings and lists of which a few parts are other values, gone, or joined by others."""

    @st.composite
    def strategy(draw: Callable[..., Any]) -> Any:
        changed = deepcopy(tree)
        for _ in range(draw(st.integers(1, changes))):
            changed = _altered_once(draw, changed)
        return changed

    return strategy()


def _altered_once(draw: Callable[..., Any], tree: Any) -> Any:
    holder, keys = tree, _keys(tree)
    if not keys or draw(st.integers(0, 30)) == 0:
        return draw(values)
    while True:
        key = draw(st.sampled_from(keys))
        keys = _keys(holder[key])
        if not keys or draw(st.booleans()):
            break
        holder = holder[key]
    how = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add", "wrap", "near")))
    if how == "remove":
        del holder[key]
    elif how == "add" and isinstance(holder, dict):
        holder[draw(texts)] = draw(values)
    elif how == "add":
        holder.insert(key, draw(values))
    elif how == "wrap":
        holder[key] = draw(st.sampled_from(([holder[key]], {"a": holder[key]}, [holder[key], holder[key]])))
    elif how == "near" and isinstance(holder[key], int | float):
        holder[key] = draw(
            st.sampled_from((-holder[key], holder[key] + 1, holder[key] * 1e6, str(holder[key])))
        )
    else:
        holder[key] = draw(values)
    return tree


def _keys(tree: Any) -> list[Any]:
    return list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []


def as_json(tree: Any) -> bytes:
    """Return a tree as JSON; a text that is no UTF-8 stands there escaped."""
    return json.dumps(tree).encode()


def json_files(content: bytes) -> st.SearchStrategy[bytes]:
    """Return files that once were this JSON."""
    return st.one_of(damaged(content), altered(json.loads(content)).map(as_json))


def json_lines(content: bytes) -> st.SearchStrategy[bytes]:
    """Return files that once were these lines of JSON: altered, cut, in another order, more or fewer."""
    lines = [json.loads(line) for line in content.splitlines()]

    def write(rows: list[Any]) -> bytes:
        return b"".join(as_json(row) + b"\n" for row in rows)

    picked = st.lists(st.sampled_from(range(len(lines))), max_size=2 * len(lines))
    return st.one_of(
        damaged(content),
        altered(lines).filter(lambda rows: isinstance(rows, list)).map(write),
        picked.map(lambda rows: write([lines[i] for i in rows])),
    )


# -- YAML ----------------------------------------------------------------------------------------------------

SNIPPETS = (
    "a: !!python/object/apply:os.system ['touch harm']", "a: !!python/name:os.system ''",
    "a: &a [*a]", "<<: *x", "? [a, b]\n: c", "a: 2001-01-01", "a: !!binary aGVsbG8=",
    "a: !!set {b, c}", "a: 0o17", "a: 1:30:00", "a: .nan", "a: .inf", "a: ~", "1: 2", "null: 1",
    "true: 1", "a: |\n  b", "--- 1", "...", "%YAML 9.9", "a: 'b", "a: [", "\tb: 1",
    "a: \"\\x1b[31m\"", "a: \"\\ud800\"", "a: !x y", "a: !!float x", "a: !!int x",
    "a: !!timestamp x", "a: 1e400", "a: " + "[" * 2000, "a: " + "9" * 5000,
    "a: " + "&a0 [x,x]\nb: &a1 [*a0,*a0]",
)  # fmt: skip


def bomb(levels: int = 40) -> str:
    """YAML of a kilobyte that stands for more than the memory."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


def to_yaml(tree: Any) -> bytes:
    """Return a tree as YAML, whatever it holds."""
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=False).encode("utf-8", "surrogatepass")


def yaml_files(tree: Any) -> st.SearchStrategy[bytes]:
    """Return files that once were this tree as YAML."""
    good = to_yaml(tree)
    lines = good.decode().splitlines()
    extra = st.one_of(st.sampled_from(SNIPPETS), st.sampled_from(lines), st.just(bomb()))
    more = st.tuples(st.integers(0, len(lines)), extra).map(
        lambda p: "\n".join([*lines[: p[0]], p[1], *lines[p[0] :]]).encode("utf-8", "surrogatepass")
    )
    return st.one_of(altered(tree).map(to_yaml), altered(tree).map(to_yaml), more, damaged(good))


# -- Parquet -------------------------------------------------------------------------------------------------

ARRAYS: tuple[Callable[[int], pa.Array], ...] = (
    lambda n: pa.nulls(n),
    lambda n: pa.array([None] * n, pa.int32()),
    lambda n: pa.array([True] * n),
    lambda n: pa.array([-1] * n),
    lambda n: pa.array([2**31 - 1] * n),
    lambda n: pa.array([-(2**63)] * n),
    lambda n: pa.array([10**9 + i for i in range(n)]),
    lambda n: pa.array([2**64 - 1] * n, pa.uint64()),
    lambda n: pa.array([0.5] * n),
    lambda n: pa.array([float("nan")] * n),
    lambda n: pa.array([float("inf")] * n, pa.float32()),
    lambda n: pa.array(["a"] * n),
    lambda n: pa.array(["\x1b[31m\n"] * n),
    lambda n: pa.array(["../../x"] * n),
    lambda n: pa.array(["/x"] * n),
    lambda n: pa.array([""] * n),
    lambda n: pa.array(["x" * 4000] * n),
    lambda n: pa.array([f"{i}" for i in range(n)]).dictionary_encode(),
    lambda n: pa.array([b"\xff\xfe"] * n),
    lambda n: pa.array([b""] * n, pa.large_binary()),
    lambda n: pa.array([b"ab"] * n, pa.binary(2)),
    lambda n: pa.array([[1]] * n),
    lambda n: pa.array([{"a": 1}] * n),
    lambda n: pa.array([{"bytes": b"x", "path": "a"}] * n),
    lambda n: pa.array([{"bytes": None, "path": None}] * n),
    lambda n: pa.array([0] * n, pa.timestamp("us")),
    lambda n: pa.array([0] * n, pa.duration("s")),
    lambda n: pa.array([1] * n).cast(pa.decimal128(30, 2)),
    lambda n: pa.array([[("a", 1)]] * n, pa.map_(pa.string(), pa.int32())),
    lambda n: pa.array(np.arange(n) % 3, pa.int8()),
    lambda n: pa.array(np.arange(n) * 512, pa.int64()),
)


def tables(table: pa.Table) -> st.SearchStrategy[pa.Table]:
    """Return tables that once were this one: columns gone, of another type, with odd values; rows gone or twice."""

    @st.composite
    def strategy(draw: Callable[..., Any]) -> pa.Table:
        changed = table
        for _ in range(draw(st.integers(1, 2))):
            changed = _altered_table(draw, changed)
        return changed

    return strategy()


def _altered_table(draw: Callable[..., Any], table: pa.Table) -> pa.Table:
    rows = table.num_rows
    how = draw(
        st.sampled_from(("type", "type", "type", "value", "value", "drop", "name", "rows", "meta", "null"))
    )
    if how == "rows":
        picked = draw(st.lists(st.integers(0, max(rows - 1, 0)), max_size=2 * rows)) if rows else []
        return table.take(pa.array(picked, pa.int64()))
    if how == "meta":
        return table.replace_schema_metadata(draw(_metadata(table.schema.metadata or {})))
    if not table.num_columns:
        return table
    column = draw(st.integers(0, table.num_columns - 1))
    name = table.column_names[column]
    if how == "drop":
        return table.drop_columns([name]) if table.column_names.count(name) == 1 else table
    if how == "name":
        new = draw(st.sampled_from([*table.column_names, "x", "", "label_name", "\x1b"]))
        return table.rename_columns([new if i == column else n for i, n in enumerate(table.column_names)])
    if how == "type":
        return table.set_column(column, name, draw(st.sampled_from(ARRAYS))(rows))
    array = table.column(column).to_pylist()
    if array:
        array[draw(st.integers(0, rows - 1))] = None if how == "null" else draw(leaves)
    try:
        return table.set_column(column, pa.field(name, table.schema.types[column]), [array])
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError):
        return table.set_column(column, name, pa.nulls(rows))


def _metadata(known: Mapping[bytes, bytes]) -> st.SearchStrategy[dict[bytes, bytes] | None]:
    """Return metadata of a schema: none, odd, or what it was with altered JSON."""
    names = st.sampled_from((*known, b"huggingface", b"isd_ray"))
    whole = [
        st.dictionaries(st.just(name), altered(tree, 1).map(as_json), min_size=1)
        for name, text in known.items()
        if name in (b"isd_ray", b"huggingface") and (tree := _read_json(text)) is not None
    ]
    return st.one_of(st.none(), st.dictionaries(names, st.sampled_from(FILES), max_size=2), *whole)


def _read_json(text: bytes) -> Any:
    """Return what a text says, or None where it was damaged before."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def write_table(table: pa.Table) -> bytes:
    """Return a table as a Parquet file; one that cannot be written is empty."""
    try:
        pq.write_table(table, sink := io.BytesIO())
    except (pa.ArrowException, UnicodeEncodeError):
        return b""
    return sink.getvalue()


def parquet_files(content: bytes) -> st.SearchStrategy[bytes]:
    """Return files that once were this Parquet file."""
    return st.one_of(damaged(content), tables(pq.read_table(io.BytesIO(content))).map(write_table))
