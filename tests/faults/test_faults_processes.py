"""Processes of a run that are killed, stopped or asked to end."""

import signal

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
    job.hurt("driver", signal.SIGSTOP)
    job.hurt("driver", signal.SIGCONT)
    ends_well(job, 0)
    assert same_bits(last_checkpoint(job.folder), untouched)


@pytest.mark.parametrize("role", ["worker", "controller", "raylet"])
def test_a_death_is_one_line_and_the_same_command_finishes(options, home, untouched, role):
    job = Job(with_worker(options), home)
    job.at(20)
    job.hurt(role)
    ends_well(job, 3)
    finishes(with_worker(options), home, untouched)
