"""A store that fails now and then loses no image and repeats none; one that fails for good ends in one line, soon."""

import logging
import time

import broken as b
import pyarrow as pa
import pytest
import torch
from faulty_store import KINDS, Proxy, faulty_store
from pyarrow import fs as pafs

from isd_ray.data import blocks, files, index, store
from isd_ray.data.shards import make_shards
from isd_ray.data.stream import Stream
from isd_ray.errors import UserError

SHARDS, EACH = 4, 12


@pytest.fixture(autouse=True)
def no_ray(request, monkeypatch):
    """Without Ray but in the tests that ask for it."""
    if "ray_session" not in request.fixturenames:
        monkeypatch.setattr(blocks.ray, "is_initialized", lambda: False)


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """Shards of noise, with an index, on disk."""
    folder = tmp_path_factory.mktemp("disk")
    for s in range(SHARDS):
        samples = [b.sample(f"{s}{i:02d}", i % 3, content=b.file(b.pixels(99 * s + i))) for i in range(EACH)]
        (folder / f"{s}.tar").write_bytes(b.tar(*(m for members in samples for m in members)))
    index.write_index(index.index_shards(str(folder), workers=0)[0], str(folder))
    return folder


@pytest.fixture(scope="module")
def proxy(disk):
    pytest.importorskip("moto", reason="needs moto's S3 server: pip install -e '.[dev]'")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with faulty_store(disk) as proxy:
        yield proxy


@pytest.fixture
def bucket(proxy) -> Proxy:
    """The store, whole again."""
    proxy.faults, proxy.broken = 0, False
    proxy.seen.clear()
    proxy.counts.clear()
    return proxy


def epoch(table: pa.Table) -> tuple[list, list]:
    stream = Stream(table, seed=3, global_batch=8, size=8, views=["weak"], cache="none", max_bad=0.0)
    return list(stream.epoch(1)), stream.bad


def assert_equal(found: list, expected: list) -> None:
    assert len(found) == len(expected) == SHARDS * EACH // 8
    for one, other in zip(found, expected, strict=True):
        for field in ("image", "index", "label", "position"):
            assert torch.equal(getattr(one, field), getattr(other, field))
    assert sorted(torch.cat([batch.index for batch in found]).tolist()) == list(range(SHARDS * EACH))


def test_a_task_whose_store_fails_says_so_as_a_failure_of_the_machine():
    for raised, code in ((store.StoreError("gone\nlines of Ray's"), 3), (UserError("wrong\nmore"), 2)):
        wrapped = blocks.ray.exceptions.RayTaskError("read_range", "Traceback", raised)
        found = blocks.error_of_task(wrapped)
        assert (str(found), found.exit_code) == (str(raised).partition("\n")[0], code)
    assert blocks.error_of_task(ValueError("x")) is None


@pytest.mark.parametrize("faults", [0, 1, 2])
def test_a_faulty_store_gives_what_the_disk_gives(bucket, disk, faults, monkeypatch):
    monkeypatch.setattr(store, "WAIT", 0.02)
    bucket.faults = faults
    table = index.read_index(bucket.uri("set"))
    assert table.equals(index.read_index(str(disk)))
    found, bad = epoch(table)
    assert_equal(found, epoch(index.read_index(str(disk)))[0])
    assert bad == []
    assert (sum(bucket.counts.values()) > 0) == (faults > 0)
    assert faults < 2 or set(bucket.counts) == set(KINDS)


def test_ray_tasks_too(ray_session, bucket, disk):
    bucket.faults = 1
    found, bad = epoch(index.read_index(bucket.uri("set")))
    assert_equal(found, epoch(index.read_index(str(disk)))[0])
    assert bad == []
    assert bucket.counts


def test_a_faulty_store_is_indexed_whole(bucket, disk, monkeypatch):
    monkeypatch.setattr(store, "WAIT", 0.02)
    bucket.faults = 1
    table, bad = index.index_shards(bucket.uri("set"), workers=0)
    assert (table.equals(index.read_index(str(disk))), bad) == (True, [])


def test_a_store_that_fails_for_good_ends_in_one_line(bucket, monkeypatch):
    """Twice the six seconds that pyarrow itself goes on for."""
    monkeypatch.setattr(store, "TRIES", 2)
    monkeypatch.setattr(store, "WAIT", 0.02)
    table = index.read_index(bucket.uri("set"))
    bucket.broken = True
    start = time.monotonic()
    with pytest.raises(
        UserError, match=r"the store failed 2 times at 'images/set/.*tar'.*Check endpoint"
    ) as error:
        epoch(table)
    assert time.monotonic() - start < 16
    assert str(error.value).isprintable()
    assert "secret" not in str(error.value)


def test_the_line_comes_out_of_a_ray_task(ray_session, disk, monkeypatch):
    @ray_session.remote
    def fail(*_):
        raise store.StoreError("the store failed")
        yield

    monkeypatch.setattr(blocks, "READER", fail)
    with pytest.raises(UserError, match=r"^the store failed$"):
        epoch(index.read_index(str(disk)))


@pytest.fixture
def no_failure_before(monkeypatch) -> None:
    monkeypatch.setattr(store, "_away", [])


def test_a_store_that_has_just_failed_is_asked_once_until_it_answers(monkeypatch, no_failure_before):
    monkeypatch.setattr(store, "WAIT", 0.0)
    remote, asked = pafs.SubTreeFileSystem("/", pafs.LocalFileSystem()), []

    def call() -> int:
        asked.append(1)
        if len(asked) <= store.TRIES + 1:
            raise OSError("away")
        return len(asked)

    for often in (f"{store.TRIES} times", "again"):
        with pytest.raises(store.StoreError, match=f"failed {often} at"):
            store.retry(call, remote, "x")
    assert store.retry(call, remote, "x") == store.TRIES + 2
    asked.clear()
    with pytest.raises(store.StoreError, match=f"failed {store.TRIES} times"):
        store.retry(call, remote, "x")


@pytest.mark.usefixtures("no_failure_before")
@pytest.mark.parametrize("failures", range(7))
def test_tries_are_counted_and_waits_double(monkeypatch, failures):
    waits: list[float] = []
    monkeypatch.setattr(store.time, "sleep", waits.append)
    monkeypatch.setattr(store.random, "uniform", lambda a, b: 1.0)
    left = iter([OSError("away")] * failures)

    def call() -> str:
        for error in left:
            raise error
        return "there"

    remote = pafs.SubTreeFileSystem("/", pafs.LocalFileSystem())
    if failures < store.TRIES:
        assert store.retry(call, remote, "x") == "there"
    else:
        with pytest.raises(UserError, match="the store failed 5 times at 'x': away"):
            store.retry(call, remote, "x")
    assert waits == [0.5, 1.0, 2.0, 4.0][:failures]


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError, ValueError])
def test_what_no_wait_mends_is_raised_at_once(monkeypatch, error):
    monkeypatch.setattr(store.time, "sleep", lambda _: pytest.fail("waited"))

    def call() -> None:
        raise error("no")

    with pytest.raises(error):
        store.retry(call, pafs.SubTreeFileSystem("/", pafs.LocalFileSystem()), "x")


@pytest.mark.parametrize(
    ("uri", "name", "expected"),
    [
        ("/a/b", "c", "/a/b/c"),
        ("/a/b?/", "c", "/a/b?/c"),
        ("s3://a/b/", "c", "s3://a/b/c"),
        ("s3://a/b?scheme=http", "c", "s3://a/b/c?scheme=http"),
        ("s3://a/b/?endpoint_override=http://h:1", "c", "s3://a/b/c?endpoint_override=http://h:1"),
    ],
)
def test_parameters_stay_at_the_end_of_a_uri(uri, name, expected):
    assert files.join(uri, name) == expected
    assert files.parent(expected) == files.absolute(uri)
    assert files.has_suffix(expected, name)


def test_resharding_reads_a_faulty_store(bucket, disk, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "WAIT", 0.02)
    bucket.faults = 1
    again = make_shards(f"tars:{bucket.uri('set')}", str(tmp_path / "again"), workers=0)
    assert again["key"].equals(index.read_index(str(disk))["key"])
    assert again["size"].equals(index.read_index(str(disk))["size"])
