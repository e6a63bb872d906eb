"""Where the time goes: the parts are all of it, and the sentence names the largest and its remedy."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isd_ray.data.read import STAGES
from isd_ray.queue import DistributedQueue
from isd_ray.queue.losses import similarity_kl
from isd_ray.train.parts import PARTS, Clock, run_shares, run_stages, sentence, shares

CPU = torch.device("cpu")
SECONDS = st.fixed_dictionaries({part: st.floats(0, 1e6) for part in PARTS})


def line(rate: float = 100.0, **given: float) -> dict[str, float]:
    """A line of metrics with the given shares."""
    parts = {f"{part}_share": given.get(part, 0.0) for part in PARTS}
    return {"images_per_second": rate} | parts | {f"{stage}_ms": given.get(stage, 0.0) for stage in STAGES}


def test_the_clock_gives_every_moment_to_one_part() -> None:
    start = time.perf_counter()
    clock = Clock(CPU)
    for part, seconds in (("wait", 0.02), ("forward", 0.01), ("wait", 0.02)):
        time.sleep(seconds)
        clock.mark(part)
    seconds = clock.take()
    total = time.perf_counter() - start
    assert list(seconds) == list(PARTS)
    assert seconds["wait"] >= 0.04
    assert seconds["forward"] >= 0.01
    assert seconds["wait"] + seconds["forward"] == sum(seconds.values()) <= total
    assert sum(clock.take().values()) == 0


def test_the_queue_is_told_from_the_forward_pass_and_gives_the_same() -> None:
    q, k = (torch.nn.functional.normalize(torch.randn(4, 8), dim=1) for _ in range(2))
    plain, watched = (DistributedQueue(64, 8) for _ in range(2))
    clock = Clock(CPU)
    clock.watch_queue(watched)
    clock.watch_queue(None)
    for queue in (plain, watched):
        queue.enqueue(k)
    before = clock.take()
    assert before["queue"] > 0
    expected, found = (similarity_kl(queue, q, k, 0.1, 0.05) for queue in (plain, watched))
    assert torch.equal(expected, found)
    after = clock.take()
    assert after["queue"] > 0
    assert after["forward"] > 0
    assert sum(after.values()) == after["queue"] + after["forward"]


def test_time_after_the_last_gradient_is_not_backward() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    clock = Clock(CPU)
    clock.watch_gradients(layer)
    layer(torch.randn(2, 4)).sum().backward()
    time.sleep(0.02)  # the others' gradients
    clock.mark("communicate")
    seconds = clock.take()
    assert seconds["backward"] > 0
    assert seconds["communicate"] >= 0.02


@given(SECONDS)
def test_shares_sum_to_one_and_keep_the_order(seconds) -> None:
    found = shares(seconds)
    if sum(seconds.values()) == 0:
        assert set(found.values()) == {0.0}
        return
    assert sum(found.values()) == pytest.approx(1)
    assert max(found, key=found.get) == max(seconds, key=seconds.get)


def test_a_run_is_the_mean_of_its_lines_by_the_time_they_stand_for() -> None:
    slow, fast = line(rate=10, wait=1.0), line(rate=30, forward=1.0)
    found = run_shares([slow, fast, {"images_per_second": 5.0}])  # a line of an older version
    assert found["wait"] == pytest.approx(0.75)
    assert sum(found.values()) == pytest.approx(1)
    assert run_shares([{"images_per_second": 5.0}]) == {}
    assert run_stages([line(decode=2.0), line(decode=4.0), line()]) == {
        "read": 0,
        "decode": 3,
        "transform": 0,
    }
    assert run_stages([line()]) == {}


@pytest.mark.parametrize(
    ("largest", "words"),
    [
        ("views", ("views", "--train.threads")),
        ("queue", ("queue", "--queue.size")),
        ("communicate", ("gradients", "--train.batch_size")),
        ("update", ("optimiser", "--train.batch_size")),
        ("log", ("checkpoints", "--train.log_every")),
        ("wait", ("waiting for data", "more CPUs")),
    ],
)
def test_the_sentence_names_the_largest_part_and_the_remedy(largest, words) -> None:
    text = sentence(dict.fromkeys(PARTS, 0.05) | {largest: 0.65}, {})
    assert text.startswith("65% of the training time went to ")
    assert all(word in text for word in words)


def test_forward_and_backward_count_together() -> None:
    text = sentence(dict.fromkeys(PARTS, 0.0) | {"wait": 0.4, "forward": 0.25, "backward": 0.35}, {})
    assert text.startswith("60% of the training time went to the network itself (forward 25%, backward 35%)")


@pytest.mark.parametrize(
    ("stage", "words"),
    [("read", "mostly reading"), ("decode", "mostly decoding"), ("transform", "mostly making views")],
)
def test_waiting_is_laid_to_the_slowest_stage(stage, words) -> None:
    assert words in sentence(
        dict.fromkeys(PARTS, 0.0) | {"wait": 1.0}, dict.fromkeys(STAGES, 1.0) | {stage: 2.0}
    )


def test_nothing_is_said_of_a_run_that_was_not_measured() -> None:
    assert sentence({}, {}) == ""
