"""A sweep that is submitted to a cluster of two nodes runs its trials on both."""

import shutil
import tempfile
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from test_job_submit import children, client_shell, free_port, kill_node, start_node, submit
from tiny_run import tiny_space


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_submitted_sweep_runs_on_all_nodes(tiny_shards, tmp_path):
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
    environment, port = client_shell(tmp_path), free_port()
    other = tempfile.mkdtemp(prefix="ray-")  # pytest's own folders have names too long for sockets
    nodes = [start_node(environment, 3, port), start_node(environment, 2, port, joins=other)]
    used: set[int] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.3):
            for number, node in enumerate(nodes):
                if any(children(child, "ImplicitFunc") for child in children(node.pid)):
                    used.add(number)

    threading.Thread(target=watch, daemon=True).start()
    try:
        arguments = ["--space", str(path), "--name", "two", "--output", str(tmp_path / "out")]
        done = submit(environment, arguments, job="jobs/sweep.py")
    finally:
        over.set()
        for node in nodes:
            kill_node(node)
        shutil.rmtree(other, ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert used == {0, 1}
    folder = Path(tmp_path, "out", "two")
    assert [row["state"] for row in pq.read_table(folder / "trials.parquet").to_pylist()] == ["finished"] * 2
    assert (folder / "best.yaml").exists()
