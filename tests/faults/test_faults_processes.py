"""Processes of a run that are killed, stopped or asked to end."""

import signal
import time

import pytest
from faulty import Job, ends_well, last_checkpoint, same_bits

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143}


def with_worker(options, **more):
    return options | {"train.workers": 1} | {f"train.{name}": value for name, value in more.items()}


def finishes(options, home, untouched):
    """The same command again comes to the end of the run that was left alone."""
    job = Job(options, home)
    ends_well(job, 0)
    assert same_bits(last_checkpoint(job.folder), untouched)


def test_a_run_goes_on_by_itself(options, home, untouched):
    """With restarts allowed, through the deaths of the line actor and the worker, and a driver that stands still."""
    job = Job(with_worker(options, max_failures=3), home)
    job.at(5)
    job.hurt("lines")
    job.at(12)
    job.hurt("worker")
    job.until(lambda: job.steps() < 12 or job.steps() > 20, "the restart")
    job.hurt("job", signal.SIGSTOP)
    time.sleep(1)
    job.hurt("job", signal.SIGCONT)
    ends_well(job, 0)
    assert same_bits(last_checkpoint(job.folder), untouched)


@pytest.mark.parametrize(
    "role", ["controller", *(pytest.param(role, marks=pytest.mark.long) for role in ("worker", "raylet"))]
)
def test_a_death_is_one_line_and_the_same_command_finishes(options, home, untouched, role):
    job = Job(with_worker(options), home)
    job.at(20)
    job.hurt(role)
    ends_well(job, 3)
    finishes(with_worker(options), home, untouched)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_run_that_is_told_to_end_says_so_and_goes_on(options, home, untouched, workers):
    options |= {"train.workers": workers}
    for step, (sent, code) in enumerate(STOPS.items(), 1):
        job = Job(options, home)
        job.at(15 * step)
        job.hurt("driver", sent)
        ends_well(job, code)
        assert "the same command goes on" in job.complaints()[0]
    finishes(options, home, untouched)


@pytest.mark.long
@pytest.mark.parametrize("role", ["driver", "worker", "controller", "raylet", "gcs", "lines"])
@pytest.mark.parametrize("step", [1, 30, 55])
def test_deaths_at_any_moment(options, home, untouched, role, step):
    job = Job(with_worker(options), home)
    job.at(step)
    job.hurt(role)
    ends_well(job, *{"driver": (-9,), "lines": (0,)}.get(role, (0, 3)))
    finishes(with_worker(options), home, untouched)


@pytest.mark.long
def test_tasks_that_read_are_started_again(options, home, untouched):
    options = with_worker(options) | {"data.cache": "none"}
    job = Job(options, home)
    for step in (5, 25, 45):
        job.at(step)
        job.hurt("task")
    ends_well(job, 0)
    assert same_bits(last_checkpoint(job.folder), untouched)


@pytest.mark.long
@pytest.mark.parametrize("role", ["job", "worker", "controller", "raylet"])
def test_processes_that_stand_still_for_a_while(options, home, untouched, role):
    job = Job(with_worker(options), home)
    job.at(10)
    job.hurt(role, signal.SIGSTOP)
    time.sleep(5)
    job.hurt(role, signal.SIGCONT)
    ends_well(job, 0)
    assert same_bits(last_checkpoint(job.folder), untouched)
