"""Killed in the middle of an epoch and started again, a run ends with the very bits of one that was left alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
import torch
from tiny_run import options_of_tiny_run

import isd_ray
from isd_ray.config import resolve, to_yaml
from isd_ray.train.folder import RunFolder, checkpoint_names, load_checkpoint

LONG = {"train.epochs": 6, "queue.size": 40, "train.keep_checkpoints": 200}
ROOT = Path(__file__).parents[2]


def start(options: dict, folder: Path) -> subprocess.Popen:
    """Start the job in a process of its own, on the Ray of this test session."""
    address = ray.get_runtime_context().gcs_address
    recipe = folder / "recipe.yaml"
    recipe.write_text(to_yaml(resolve(options | {"address": address})))
    command = [sys.executable, str(ROOT / "jobs/pretrain.py"), "--config", str(recipe)]
    return subprocess.Popen(command, start_new_session=True)


def kill_in_the_middle(options: dict, folder: Path, step: int) -> None:
    """Kill the driver and its workers once a checkpoint of at least `step` steps is there."""
    job, run = start(options, folder), RunFolder(f"{options['output']}/{options['name']}")
    deadline = time.monotonic() + 200
    while not any(name >= f"step-{step:08d}.pt" for name in checkpoint_names(run)):
        assert job.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()


def compare(options: dict, other: dict) -> None:
    from test_pretrain import assert_same

    one, two = (load_checkpoint(RunFolder(f"{o['output']}/{o['name']}")) for o in (options, other))
    assert_same(one, two)


@pytest.fixture(scope="module")
def whole_of_two(ray_session, tiny_shards, tmp_path_factory) -> dict:
    """The options of a finished run of 60 steps on two workers, whose checkpoints are all kept."""
    options = options_of_tiny_run(tiny_shards, tmp_path_factory.mktemp("two")) | LONG | {"name": "whole"}
    isd_ray.pretrain(options | {"train.workers": 2})
    return options


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("workers", [1, 2])
def test_sigkill_in_the_middle_of_an_epoch(request, ray_session, tiny_options, tmp_path, workers):
    options = tiny_options | LONG | {"train.workers": workers}
    killed = options | {"name": "killed"}
    kill_in_the_middle(killed, tmp_path, step=14)
    reached = checkpoint_names(RunFolder(f"{options['output']}/killed"))[-1]
    assert reached < "step-00000060.pt", "the run was over before the signal came"
    isd_ray.pretrain(killed)
    if workers == 2:
        whole = request.getfixturevalue("whole_of_two")
    else:
        whole = options | {"name": "whole", "train.workers": 0}  # 0: in this process
        isd_ray.pretrain(whole)
    compare(killed, whole)
    lines = Path(options["output"], "killed", "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(2, 61, 2))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("workers", [0, 3])  # 0: one worker, inside this process
def test_a_run_of_two_workers_continues_with_another_number(whole_of_two, monkeypatch, workers):
    """The stream of images goes on as if the number of workers had never changed: the final queue shows it."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)  # what the session's Ray offers, whatever the machine has
    runs, name = Path(whole_of_two["output"]), f"then_{workers}"
    shutil.copytree(runs / "whole", runs / name)
    (runs / name / "result.json").unlink()
    for checkpoint in (runs / name / "checkpoints").iterdir():
        if checkpoint.name > "step-00000054.pt":  # in the middle of the last epoch
            checkpoint.unlink()
    isd_ray.pretrain(whole_of_two | {"name": name, "train.workers": workers, "queue.layout": "sharded"})
    whole, final = (load_checkpoint(RunFolder(str(runs / run))) for run in ("whole", name))
    assert final["step"] == whole["step"] == 60
    assert torch.equal(final["queue"]["index"], whole["queue"]["index"])
    assert torch.equal(final["queue"]["label"], whole["queue"]["label"])
    assert int(final["queue"]["seen"]) == int(whole["queue"]["seen"]) == 960
    lines = (runs / name / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(2, 61, 2))
