"""`ray start` of two nodes and `ray job submit` on loopback, with token authentication, from an empty home."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import pytest
import yaml
from tiny_run import tiny_space

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def client_shell(home: Path) -> dict[str, str]:
    """The environment of a shell with an empty home and a token of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{free_port()}"
    environment["RAY_worker_niceness"] = "0"
    subprocess.run([RAY, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    return environment


def start_node(environment: dict[str, str], cpus: int, port: int, joins: str = "") -> subprocess.Popen:
    """Start the head, which listens at `port`, or one more node that joins it and has the folder `joins` to itself.

    In one folder the second node would delete the job's files under the first one's feet.
    """
    start = [RAY, "start", f"--num-cpus={cpus}", "--object-store-memory=300000000", "--block"]
    start += [f"--dashboard-agent-listen-port={free_port()}"]  # the suite's own Ray may hold the usual one
    if not joins:
        dashboard = environment["RAY_API_SERVER_ADDRESS"].rsplit(":", 1)[1]
        start += ["--head", "--node-ip-address=127.0.0.1", f"--port={port}"]
        start += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    else:
        start += [f"--address=127.0.0.1:{port}", f"--temp-dir={joins}"]
    return subprocess.Popen(start, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def children(pid: int, name: str = "") -> list[int]:
    """Processes that a process has started, those whose command line holds `name`."""
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", name], capture_output=True, text=True).stdout
    return [int(child) for child in found.split()]


def kill_node(node: subprocess.Popen) -> None:
    """End a node at once with what it started; a polite end would take half a minute."""
    for pid in children(node.pid):
        os.kill(pid, signal.SIGKILL)
    node.kill()
    node.wait()


class Cluster(NamedTuple):
    """The environment of a client shell, and the processes of the nodes."""

    environment: dict[str, str]
    nodes: list[subprocess.Popen]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A head of 3 CPUs and a second node of 2: no node has room for two workers of 2 CPUs."""
    environment, port = client_shell(tmp_path_factory.mktemp("home")), free_port()
    other = tempfile.mkdtemp(prefix="ray-")  # pytest's own folders have names too long for sockets
    nodes = [start_node(environment, 3, port), start_node(environment, 2, port, joins=other)]
    yield Cluster(environment, nodes)
    for node in nodes:
        kill_node(node)
    shutil.rmtree(other, ignore_errors=True)


def submit(cluster: Cluster, job: str, *arguments: str) -> subprocess.CompletedProcess:
    """Submit the job and wait for it; a head that has just started refuses for some seconds."""
    command = [RAY, "job", "submit", "--working-dir", str(ROOT), "--", sys.executable, job, *arguments]
    environment = cluster.environment
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
    done = submit(cluster, "jobs/pretrain.py", "--config", str(recipe))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Accuracy on the test set" in done.stdout
    result = json.loads(Path(tiny_options["output"], "run", "result.json").read_text())
    assert {"metrics", "groups", "per_class", "protocol", "seconds", "versions", "config"} <= set(result)
    assert set(result["metrics"]) == {"student", "teacher", "untrained", "pixels"}

    wrong = submit(cluster, "jobs/pretrain.py", "--train.epocs", "3")
    assert wrong.returncode != 0
    assert "error: unknown option '--train.epocs'. Did you mean 'train.epochs'?" in wrong.stdout
    assert "Traceback" not in wrong.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_submitted_sweep_runs_on_all_nodes(cluster, tiny_shards, tmp_path):
    """No node has CPUs for two trials, so that two at once must run on both; one CPU is left for reading."""
    space = tiny_space(
        tiny_shards,
        budget={"trials": 2, "epochs": 2},
        scheduler={"name": "none"},
        confirm={"best": 0, "seeds": 0},
        resources={"cpus": 2, "concurrent": 2},
    )
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(space))
    used: set[int] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.3):
            for number, node in enumerate(cluster.nodes):
                if any(children(child, "ImplicitFunc") for child in children(node.pid)):
                    used.add(number)

    threading.Thread(target=watch, daemon=True).start()
    try:
        done = submit(
            cluster, "jobs/sweep.py", "--space", str(path), "--name", "two", "--output", str(tmp_path / "out")
        )
    finally:
        over.set()
    assert done.returncode == 0, done.stdout + done.stderr
    assert used == {0, 1}
    folder = Path(tmp_path, "out", "two")
    assert [row["state"] for row in pq.read_table(folder / "trials.parquet").to_pylist()] == ["finished"] * 2
    assert (folder / "best.yaml").exists()
