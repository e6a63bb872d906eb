"""Names stay inside their folder; places are where somebody meant them to be, and hold no key."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isd_ray.data.files import join
from isd_ray.errors import UserError, nearest, shown, without_secrets
from isd_ray.names import check_name, check_place, name_fault, place_fault

SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfi"


ORDINARY = ["isd", "isd-cifar10-1a2b", "a=1,b=2+c", "2024.05.01", "_x", "-x", "a..b"]
NONE = ["", ".", "..", "../x", "a/b", "/x", ".ssh", "a b", "a\0", "a\nb", "\x1b[31m", "é", "a:b"]
NONE += ["x" * 101]


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_names_are_taken(name):
    assert check_name(name, "--name") == name


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_name_is_refused_in_one_printable_line(name):
    with pytest.raises(UserError) as error:
        check_name(name, "--name")
    text = str(error.value)
    assert text.startswith("--name ")
    assert text.isprintable()
    assert len(text) < 300


@given(st.text(max_size=120))
def test_a_name_is_one_part_of_a_path(name):
    if name_fault(name) is None:
        assert "/" not in name
        assert not name.startswith(".")
        assert join("/runs", name) == f"/runs/{name}"
        assert len(name.encode()) <= 255  # what file systems take


@pytest.mark.parametrize(
    "place",
    [
        "runs", "~/runs", "/data/a b", "../x", "data/ü", "a:b/c@d", "/x?key=1", "s3://bucket",
        "s3://bucket/x", "s3://b/x?endpoint_override=http://h:9000&scheme=http&region=eu",
        "s3://bucket/a:b@c", "gs://b/x", "gs://anonymous@bucket/x", "hdfs://user@host:8020/x",
        "hdfs://host:8020/a@b", "hdfs:///x", "file:///x",
        "abfs://container@account.dfs.core.windows.net/x", "file:///home/a:b@c",
    ],
)  # fmt: skip
def test_places_that_mean_something_are_taken(place):
    assert check_place(place, "--output") == place


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("", "empty"),
        (" ", "empty"),
        ("s3://", "names no bucket"),
        ("s3:///x", "names no bucket"),
        ("gs://anonymous@/x", "names no bucket"),
        ("file://", "file:///folder"),
        ("file://runs", "file:///folder"),
        ("s3:/bucket/x", "begins with s3://"),
        ("S3://bucket/x", "Did you mean 's3'?"),
        ("http://host/x", "unknown scheme"),
        ("://x", "unknown scheme"),
        ("a\0b", "unprintable"),
        ("a\nb", "unprintable"),
        ("a\x1b[31m", "unprintable"),
        ("\udcff", "unprintable"),
        ("x" * 5000, "5,000 characters"),
    ],
)
def test_places_that_nobody_meant_are_refused_by_option(place, words):
    with pytest.raises(UserError) as error:
        check_place(place, "--output")
    assert str(error.value).startswith("--output ")
    assert words in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "place",
    [
        f"s3://AKIA:{SECRET}@bucket/x",
        f"s3://AKIA:12/{SECRET}@bucket/x",
        f"s3://AKIA%3A{SECRET.replace('/', '%2F')}@bucket",
        f"s3:/AKIA:{SECRET}@bucket/x",
        f"s3://{SECRET.replace('/', '')}@bucket/x",
        f"hdfs://user:{SECRET}@host/x",
        f"hdfs://user:8020{SECRET}@host/x",
        f"nosuch://user:{SECRET}@host/x",
        f"s3://bucket/x?secret_key={SECRET}",
        f"s3://bucket/x?region=eu&AWS_SESSION_TOKEN={SECRET}",
        f"s3://bucket/x?X-Amz-Signature={SECRET}",
        f"abfs://c@a/x?sig={SECRET}",
        f"s3://bucket/x?endpoint_override=http%3A%2F%2Fuser%3A{SECRET}%40host",
    ],
)
def test_a_uri_with_a_key_is_refused_and_never_repeated(place):
    with pytest.raises(UserError) as error:
        check_place(place, "--data.shards")
    text = str(error.value)
    assert "AWS_SECRET_ACCESS_KEY" in text or "begins with s3://" in text
    assert not any(part in text for part in (*SECRET.split("/"), "AKIA"))


@given(
    st.sampled_from(["s3", "gs", "hdfs", "abfs", "S3"]),
    st.from_regex(r"[A-Za-z0-9]{1,20}", fullmatch=True),
    st.from_regex(r"[A-Za-z0-9/+%.]{8,40}", fullmatch=True),
)
def test_no_password_passes_whatever_it_is_made_of(scheme, user, password):
    is_port = scheme == "hdfs" and password.partition("/")[0].isdigit()
    bucket = f"{scheme}://bucket/x"
    for uri in (f"{scheme}://{user}:{password}@bucket/x", f"{bucket}?secret_key={password}"):
        fault = place_fault(uri)
        assert fault is not None or is_port
        assert password not in str(fault)
        assert password not in shown(uri)
        assert password not in without_secrets(f"cannot open {uri}: no such host")


@given(st.recursive(st.text() | st.integers() | st.floats() | st.none(), st.lists, max_leaves=8))
def test_what_is_shown_is_one_short_printable_line(value):
    assert shown(value).isprintable()
    assert len(shown(value)) <= 100


def test_endless_input_costs_nothing():
    assert len(shown(10**5000)) < 100
    assert len(shown([10**5000])) < 100
    assert shown({"secret": 1}) == "a mapping"
    assert nearest("x" * 10**6, ["x"] * 100) == ""
    assert place_fault(":/" * 10**6) is not None
