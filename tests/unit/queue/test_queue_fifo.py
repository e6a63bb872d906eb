"""The queue of a single process: content, age, state, search and refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from isd_ray.errors import UserError
from isd_ray.queue import DistributedQueue

LAYOUT = st.sampled_from(["replicated", "sharded"])
BATCHES = st.lists(st.integers(0, 12), max_size=12)


def stream(batches: list[int], dim: int = 3) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Batches of recognisable keys with index and label, numbered through."""
    out, first = [], 0
    for rows in batches:
        index = torch.arange(first, first + rows)
        out.append((index[:, None] + torch.arange(dim) / 10, index, index % 4))
        first += rows
    return out


@given(size=st.integers(1, 10), layout=LAYOUT, batches=BATCHES)
@settings(max_examples=60, deadline=None)
def test_queue_is_the_end_of_the_stream(size, layout, batches):
    queue = DistributedQueue(size, 3, layout)
    for batch in stream(batches):
        queue.enqueue(*batch)
    state = queue.state_dict()
    newest = range(max(sum(batches) - size, 0), sum(batches))
    assert state["index"].tolist() == list(newest)
    assert queue.fill == len(newest)
    assert queue.labels.tolist() == state["label"].tolist() == [i % 4 for i in newest]
    torch.testing.assert_close(state["keys"][:, 0], state["index"].float())
    assert int(state["seen"]) == sum(batches)
    assert int(state["steps"]) == len(batches)


@given(a=st.integers(1, 10), b=st.integers(1, 10), before=BATCHES, after=BATCHES)
@settings(max_examples=60, deadline=None)
def test_loaded_queue_goes_on_like_one_that_never_stopped(a, b, before, after):
    saved, straight = DistributedQueue(a, 3), DistributedQueue(min(a, b), 3)
    batches = stream(before + after)
    for batch in batches[: len(before)]:
        saved.enqueue(*batch)
    loaded = DistributedQueue(b, 3, "sharded")
    loaded.load_state_dict(saved.state_dict())
    for batch in batches[: len(before)]:
        straight.enqueue(*batch)
    assert loaded.state_dict()["index"].tolist() == straight.state_dict()["index"].tolist()
    held = loaded.state_dict()["index"].tolist()
    for keys, index, label in batches[len(before) :]:
        loaded.enqueue(keys, index, label)
        held = (held + index.tolist())[-b:]
        assert loaded.state_dict()["index"].tolist() == held


def test_topk_finds_the_nearest_and_says_where_there_are_fewer():
    generator = torch.Generator().manual_seed(0)
    anchors = normalize(torch.randn(9, 4, generator=generator), dim=1)
    x = normalize(torch.randn(5, 4, generator=generator), dim=1)
    queue = DistributedQueue(12, 4)
    queue.enqueue(anchors, torch.arange(9), torch.arange(9) + 100)
    own = torch.tensor([0, 1, 2, 3, 40])
    similarity, key, index, label = queue.topk(x, 9, exclude=own)
    scores = (x @ anchors.T).masked_fill(own[:, None] == torch.arange(9), -torch.inf)
    expected, order = scores.sort(dim=1, descending=True)
    torch.testing.assert_close(similarity, expected)
    assert index[4].tolist() == order[4].tolist()
    assert index[:4, :8].tolist() == order[:4, :8].tolist()
    assert index[:4, 8].tolist() == label[:4, 8].tolist() == [-1] * 4
    assert key[0, 8].tolist() == [0] * 4
    torch.testing.assert_close(key[4], anchors[order[4]])
    assert label[4].tolist() == (order[4] + 100).tolist()
    assert [tuple(t.shape) for t in DistributedQueue(12, 4).topk(x, 3)] == [(5, 3), (5, 3, 4), (5, 3), (5, 3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_anchors_cost_their_rounding_alone(dtype):
    generator = torch.Generator().manual_seed(0)
    anchors = normalize(torch.randn(300, 16, generator=generator), dim=1)
    k = normalize(torch.randn(7, 16, generator=generator), dim=1)
    half, rounded = DistributedQueue(300, 16, dtype=dtype), DistributedQueue(300, 16)
    half.enqueue(anchors)
    rounded.enqueue(anchors.to(dtype).float())
    assert half.state_dict()["keys"].dtype == dtype
    for a, b in zip(half.read(k, 0.1), rounded.read(k, 0.1), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("size", {"size": 0}),
        ("size", {"size": 2.5}),
        ("size", {"size": True}),
        ("dim", {"dim": -1}),
        ("layout", {"layout": "shraded"}),
        ("dtype", {"dtype": torch.int8}),
    ],
)
def test_senseless_settings_are_refused_by_name(field, arguments):
    with pytest.raises(UserError, match=rf"^queue\.{field}: .*{next(iter(arguments.values()))}"):
        DistributedQueue(**({"size": 4, "dim": 3} | arguments))


@pytest.mark.parametrize("temperature", [0, -0.1, float("nan"), float("inf"), "0.1"])
def test_senseless_temperatures_are_refused(temperature):
    with pytest.raises(UserError, match=r"^temperature: must be a positive finite number, got"):
        DistributedQueue(4, 3).read(torch.rand(2, 3), temperature)


def test_layout_names_the_nearest():
    with pytest.raises(UserError, match=r"Did you mean 'sharded'"):
        DistributedQueue(4, 3, layout="shraded")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_keys_do_not_enter(bad):
    queue = DistributedQueue(4, 3)
    queue.enqueue(torch.rand(2, 3))
    before = queue.state_dict()
    keys = torch.rand(5, 3)
    keys[1, 2] = keys[4, 0] = bad
    with pytest.raises(UserError, match=r"2 of 5 keys are not finite \(step 1, rank 0\)"):
        queue.enqueue(keys)
    assert all(torch.equal(before[name], value) for name, value in queue.state_dict().items())


def test_keys_too_large_for_the_stored_type_are_refused():
    with pytest.raises(UserError, match="not finite"):
        DistributedQueue(4, 3, dtype=torch.float16).enqueue(torch.full((1, 3), 1e6))


def test_wrong_shapes_are_refused():
    queue = DistributedQueue(4, 3)
    for call in (
        lambda: queue.enqueue(torch.rand(2, 4)),
        lambda: queue.enqueue(torch.rand(2, 3), index=torch.arange(3)),
        lambda: queue.enqueue(torch.rand(2, 3), label=torch.arange(1)),
        lambda: queue.read(torch.rand(3), 0.1),
        lambda: queue.lse(torch.rand(2, 3), 0.1, exclude=torch.arange(3)),
        lambda: queue.topk(torch.rand(2, 3), 0),
    ):
        with pytest.raises(UserError):
            call()


def test_foreign_states_are_refused():
    queue = DistributedQueue(4, 3)
    queue.enqueue(torch.rand(2, 3))
    state = queue.state_dict()
    nan = {"keys": torch.full((2, 3), float("nan"))}
    for broken, message in (
        ({name: state[name] for name in state if name != "seen"}, "seen missing"),
        (state | {"keys": torch.rand(2, 4)}, "this queue's anchors have 3 numbers"),
        (state | {"index": torch.arange(3)}, "must have 2 rows"),
        (state | nan, "not finite"),
    ):
        with pytest.raises(UserError, match=message):
            DistributedQueue(4, 3).load_state_dict(broken)


@pytest.mark.parametrize("rows", [5, 16, 40])
def test_a_loaded_queue_is_read_to_the_same_bits(rows):
    """Wherever the ring has wrapped, and after batches that do not fit into it."""
    generator = torch.Generator().manual_seed(0)
    queue = DistributedQueue(32, 24)
    for _ in range(9):
        queue.enqueue(torch.randn(rows, 24, generator=generator))
        again = DistributedQueue(32, 24)
        again.load_state_dict(queue.state_dict())
        x, keys = torch.randn(2, 64, 24, generator=generator)
        for _ in range(3):
            for ours, theirs in zip(queue.read(x, 0.3), again.read(x, 0.3), strict=True):
                assert torch.equal(ours, theirs)
            again.enqueue(keys[:7])
            queue.enqueue(keys[:7])
