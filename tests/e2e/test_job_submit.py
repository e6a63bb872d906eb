"""`ray start --head` and `ray job submit` on loopback, with token authentication, from an empty home."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture
def cluster(tmp_path):
    """A head node of its own; yields the environment of a client shell."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "HOME": str(tmp_path),
        "RAY_AUTH_MODE": "token",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    start = [
        RAY,
        "start",
        "--head",
        "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1",
        "--num-cpus=2",
    ]
    start += [
        f"--dashboard-port={port}",
        f"--port={free_port()}",
        f"--dashboard-agent-listen-port={free_port()}",  # the suite's own Ray may hold the usual one
        "--object-store-memory=300000000",
        "--block",
    ]
    subprocess.run([RAY, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    head = subprocess.Popen(start, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield environment
    # What the head started ends with it; a polite end would take half a minute.
    started = subprocess.run(["pgrep", "-P", str(head.pid)], capture_output=True, text=True).stdout.split()
    for pid in started:
        os.kill(int(pid), signal.SIGKILL)
    head.kill()
    head.wait()


def submit(environment: dict, arguments: list[str]) -> subprocess.CompletedProcess:
    """Submit the job and wait for it; a head that has just started refuses for some seconds."""
    command = [
        RAY,
        "job",
        "submit",
        "--working-dir",
        str(ROOT),
        "--",
        sys.executable,
        "jobs/pretrain.py",
        *arguments,
    ]
    deadline = time.monotonic() + 90
    while True:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
        starting = "No available agent" in done.stderr or "Failed to connect" in done.stderr
        if not starting or time.monotonic() > deadline:
            return done
        time.sleep(2)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_job_ends_with_its_result_and_a_mistake_with_one_line(cluster, tiny_options, tmp_path):
    from isd_ray.config import resolve, to_yaml

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(resolve(tiny_options | {"evaluate.enabled": True, "train.workers": 1})))
    done = submit(cluster, ["--config", str(recipe)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Accuracy on the test set" in done.stdout
    result = json.loads(Path(tiny_options["output"], "run", "result.json").read_text())
    assert {"metrics", "groups", "per_class", "protocol", "seconds", "versions", "config"} <= set(result)
    assert set(result["metrics"]) == {"student", "teacher", "untrained", "pixels"}

    wrong = submit(cluster, ["--train.epocs", "3"])
    assert wrong.returncode != 0
    assert "error: unknown option '--train.epocs'. Did you mean 'train.epochs'?" in wrong.stdout
    assert "Traceback" not in wrong.stdout
