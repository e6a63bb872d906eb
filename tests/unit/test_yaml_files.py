"""What people write is read; what they did not mean, or nobody wrote, is refused with its line."""

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from isd_ray.errors import UserError
from isd_ray.yaml_files import DEEPEST, parse_mapping, parse_value, read_mapping

ROWS = range(1, 40)
REFUSED = {
    "a name twice": ("a: 1\nb: 2\na: 3\n", "line 3: 'a' stands in line 1 too; keep one"),
    "a nested name twice": ("a:\n  b: 1\n  c: 2\n  b: 3\n", "line 4: 'b' stands in line 2 too"),
    "twice in braces": ("m: {isd: {a: 1}, isd: {}}", "line 1: 'isd' stands in line 1 too"),
    "one name in two forms": ("a: 1\n'a': 2", "line 2: 'a' stands in line 1 too"),
    "no list": ("- 1\n- 2", "expected 'name: value' lines, found list"),
    "a tag": ("a: !!python/object/apply:os.system [ls]", "line 1: a tag"),
    "a harmless tag": ("a: !!int '3'", "line 1: a tag"),
    "deep lists": ("a: " + "[" * 5000 + "]" * 5000, f"more than {DEEPEST} lists and mappings"),
    "open lists": ("[" * 100_000, f"more than {DEEPEST} lists and mappings"),
    "deep dashes": ("- " * 5000, f"more than {DEEPEST} lists and mappings"),
    "an endless number": ("a: " + "9" * 5000, "line 1: a number of 5,000 characters"),
    "a number of base 60": ("a: 1" + ":59" * 10_000, "a number of 30,001 characters"),
    "a number that is none": ("a: 0x_", "invalid literal"),
    "many values": ("a: [" + "1, " * 300_000 + "]", "more than 20,000 values"),
    "billion laughs": (
        "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in ROWS),
        "once all aliases are unfolded",
    ),
    "laughs by merging": (
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in ROWS),
        "once all aliases are unfolded",
    ),
    "a ring": ("a: &a [*a]", "this holds itself"),
    "a merged ring": ("a: &a {<<: *a}", "this holds itself"),
    "a list as name": ("? [1]\n: 2", "where a name is expected"),
    "control characters": ("a: 1\nb: \x1b[31m", "line 2: an unprintable character"),
    "two documents": ("a: 1\n---\nb: 2", "another document"),
    "an open list": ("a: [1", "line 1: expected ',' or ']'"),
    "a mebibyte": ("a" * 2**21, "more than 1 MiB"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_in_one_line_that_says_where(case):
    text, words = REFUSED[case]
    with pytest.raises(UserError) as error:
        parse_mapping(text, "space x.yaml")
    assert str(error.value).startswith("space x.yaml: ")
    assert words in str(error.value)
    assert str(error.value).isprintable()


def test_names_are_texts_and_dates_too():
    assert parse_mapping("1: a\non: b\nnull: c\nd: 2024-05-01\ne: =\n", "x") == {
        "1": "a", "on": "b", "null": "c", "d": "2024-05-01", "e": "=",
    }  # fmt: skip


def test_aliases_and_merging_save_writing():
    text = "x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\nz: *x\n"
    x = {"a": 1, "b": 2}
    assert parse_mapping(text, "x") == {"x": x, "y": {"a": 1, "b": 3}, "z": x}


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"\xef\xbb\xbf", b"null", b"---\n"])
def test_an_empty_file_is_empty(tmp_path, content):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    assert read_mapping(path, "config file") == {}


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"a: \xff", "not UTF-8 text (byte 4)"), ("a: b".encode("utf-16"), "not UTF-8")],
)
def test_only_utf8_is_text(tmp_path, content, words):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"config file .*x\.yaml: ") as error:
        read_mapping(path, "config file")
    assert words in str(error.value)


PATHS = ["", " ", "nowhere.yaml", "/", "a\0b", "a\nb", "x" * 5000]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_is_none_is_one_line(path):
    with pytest.raises(UserError) as error:
        read_mapping(path, "config file")
    assert str(error.value).startswith("config file")
    assert "give the path of a YAML file" in str(error.value)


def test_a_key_in_the_uri_of_a_file_is_not_repeated():
    with pytest.raises(UserError, match=r"config file: .*it holds a key") as error:
        read_mapping("s3://a:5ecret@c/d", "config file")
    assert "5ecret" not in str(error.value)
    assert str(error.value).isprintable()
    assert "a:b" not in str(error.value)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=20),
    lambda p: st.lists(p, max_size=3) | st.dictionaries(st.text(max_size=5), p, max_size=3),
    max_leaves=15,
)


@given(st.dictionaries(st.text(max_size=5), PLAIN, max_size=4))
def test_what_is_dumped_reads_back(content):
    again = parse_mapping(yaml.safe_dump(content), "x")
    assert _without_nan(again) == _without_nan(content)


@given(st.text() | st.text("[]{}&*!|>'\"%@`#,:?-<=~ \n\tab01_.x", max_size=60))
def test_any_text_is_read_or_refused(text):
    for read in (parse_mapping, parse_value):
        said = ""
        try:
            read(text, "x")
        except UserError as error:
            said = str(error)
        assert said.isprintable()
        assert len(said) < 400


def _without_nan(value):
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return "nan" if isinstance(value, float) and math.isnan(value) else value
