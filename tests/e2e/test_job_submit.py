"""`ray start` of two nodes and `ray job submit` on loopback, with token authentication, from an empty home."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from loopback import Cluster, cluster_of, submit
from tiny_run import tiny_space


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A head of 3 CPUs and a second node of 2: no node has room for two workers of 2 CPUs."""
    with cluster_of(tmp_path_factory.mktemp("home"), 3, 2) as cluster:
        yield cluster


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
            used.update(cluster.workers("ImplicitFunc").values())

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
