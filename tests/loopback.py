"""Nodes of `ray start` on loopback, with token authentication, and jobs that are submitted to them."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
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
    """Start the head, which listens at `port`, or one more node that joins it and has the folder `joins`.

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


class Cluster:
    """The environment of a client shell, and the processes of the nodes; the first one is the head."""

    def __init__(self, home: Path) -> None:
        self.environment, self.port = client_shell(home), free_port()
        self.nodes: list[subprocess.Popen] = []
        self.folders: list[str] = []

    def add(self, cpus: int) -> subprocess.Popen:
        """Start a node."""
        if self.nodes:
            self.folders.append(tempfile.mkdtemp(prefix="ray-"))  # pytest's names are too long for sockets
        joins = self.folders[-1] if self.nodes else ""
        self.nodes.append(start_node(self.environment, cpus, self.port, joins))
        return self.nodes[-1]

    def workers(self, name: str) -> dict[int, int]:
        """Return the processes of Ray's with this name, and the number of the node that each is on."""
        return {
            worker: number
            for number, node in enumerate(self.nodes)
            for child in children(node.pid)
            for worker in children(child, name)
        }

    def close(self) -> None:
        """End all nodes."""
        for node in self.nodes:
            kill_node(node)
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def cluster_of(home: Path, *cpus: int) -> Iterator[Cluster]:
    """Yield a cluster of nodes with so many CPUs."""
    cluster = Cluster(home)
    try:
        for count in cpus:
            cluster.add(count)
        yield cluster
    finally:
        cluster.close()


def ask(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess:
    """Run `ray job` with these arguments; a head that has just started refuses for some seconds."""
    deadline = time.monotonic() + 90
    while True:
        done = subprocess.run(
            [RAY, "job", *arguments], env=cluster.environment, capture_output=True, text=True, cwd=ROOT
        )
        starting = "No available agent" in done.stderr or "Failed to connect" in done.stderr
        if not starting or time.monotonic() > deadline:
            return done
        time.sleep(2)


def submit(
    cluster: Cluster, job: str, *arguments: str, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    """Submit the job and, without the option --no-wait, wait for it."""
    return ask(cluster, "submit", *options, "--working-dir", str(ROOT), "--", sys.executable, job, *arguments)
