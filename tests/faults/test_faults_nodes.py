"""Nodes that come and go under a run, and `ray job stop`."""

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulty import PATIENCE, Job, ends_well, last_checkpoint, same_bits
from loopback import ask, cluster_of, kill_node, submit

from isd_ray.config import resolve, to_yaml

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]


def wait(condition: Callable[[], Any], what: str) -> Any:
    """Return what holds as soon as it does."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {PATIENCE:.0f} s for {what}"
        time.sleep(0.02)
    return found


def answers(port: int) -> bool:
    """Return whether somebody listens at the port of this machine."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_a_run_waits_for_a_node_and_goes_on_on_another_one(options, home, untouched):
    """The head has no CPU. One node joins and dies in the middle of the run; then another one joins."""
    with cluster_of(home, 0) as cluster:
        wait(lambda: answers(cluster.port), "the head")
        shell = {k: v for k, v in cluster.environment.items() if k.startswith("RAY_AUTH")}
        chosen = {"train.workers": 1, "train.max_failures": 2, "train.device": "cpu"}
        chosen |= {"train.autoscale": True, "address": f"127.0.0.1:{cluster.port}"}
        job = Job(options | chosen, home, **shell)
        node = cluster.add(2)
        job.at(5)
        kill_node(node)
        cluster.add(2)
        ends_well(job, 0)
    assert same_bits(last_checkpoint(job.folder), untouched)


def test_a_submitted_job_that_is_stopped_goes_on_when_it_is_submitted_again(
    options, home, untouched, tmp_path
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(resolve(options | {"train.workers": 1})))
    folder = Path(options["output"], options["name"])
    job = ("jobs/pretrain.py", "--config", str(recipe))
    with cluster_of(home, 3) as cluster:
        given = submit(cluster, *job, options=("--no-wait", "--submission-id", "first"))
        assert given.returncode == 0, given.stderr
        wait(lambda: list(folder.glob("checkpoints/step-0000001*.pt")), "ten steps")
        (worker,) = cluster.workers("RayTrainWorker")
        os.kill(worker, signal.SIGSTOP)  # lest the run ends before the command to stop it has started
        stopped = ask(cluster, "stop", "first")
        os.kill(worker, signal.SIGCONT)
        assert stopped.returncode == 0, stopped.stderr
        said = ask(cluster, "logs", "first").stdout
        assert "error: terminated; the same command goes on" in said
        assert "Traceback" not in said
        assert not (folder / "result.json").exists()
        wait(lambda: not cluster.workers("RayTrainWorker"), "the end of the worker")
        assert not list(folder.glob(".ray-*"))
        again = submit(cluster, *job)
        assert again.returncode == 0, again.stdout + again.stderr
    assert same_bits(last_checkpoint(folder), untouched)
