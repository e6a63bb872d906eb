"""A sweep on real runs: killed, it goes on; trials that fail or take too much memory are recorded and do not end it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import yaml
from tiny_run import GOAL, tiny_space

import isd_ray
from isd_ray.config import parse, resolve
from isd_ray.errors import UserError
from isd_ray.sweep.run import sweep
from isd_ray.sweep.search import Job, Search
from isd_ray.sweep.space import Space
from isd_ray.train.folder import RunFolder, checkpoint_names
from isd_ray.train.trainer import pretrain
from isd_ray.train.validation import read_rows

ROOT = Path(__file__).parents[2]


def known(uri: str) -> list[tuple]:
    """All that the journal of a sweep says of its trials."""
    import optuna
    from optuna.storages import JournalStorage

    from isd_ray.sweep.journal import FolderJournal

    study = optuna.load_study(study_name="sweep", storage=JournalStorage(FolderJournal(RunFolder(uri))))
    return [(t.number, t.state, t.params, t.values, t.intermediate_values, t.user_attrs, t.system_attrs)
            for t in study.get_trials()]  # fmt: skip


def kill_in_a_trial(space: Path, output: Path, number: int) -> None:
    """Start the job and kill its driver once trial `number` has a row and a checkpoint, but not its last."""
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, str(ROOT / "jobs/sweep.py"), "--space", str(space), "--name", "killed"]
    job = subprocess.Popen(
        [*command, "--output", str(output), "--address", address], start_new_session=True, cwd=output
    )
    run = RunFolder(str(output / f"killed/trials/{number:04d}/seed-0"))
    deadline = time.monotonic() + 200
    while not read_rows(run):
        assert job.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < deadline, "the trial did not come"
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_sweep_goes_on_to_the_same_end(ray_session, tiny_shards, tmp_path):
    content = tiny_space(tiny_shards)
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(content))
    kill_in_a_trial(path, tmp_path, number=2)
    before = known(str(tmp_path / "killed"))
    finished = [t[0] for t in before if t[1].is_finished()]
    results = {n: (tmp_path / f"killed/trials/{n:04d}/seed-0/metrics.jsonl").read_text() for n in finished}
    assert finished, "nothing had finished before the kill: the test says nothing"
    outcome = sweep(Space(**content), "killed", str(tmp_path))
    for n, text in results.items():
        assert (
            tmp_path / f"killed/trials/{n:04d}/seed-0/metrics.jsonl"
        ).read_text() == text  # with its times
    after = known(str(tmp_path / "killed"))
    assert [after[n] for n in finished] == [before[n] for n in finished]
    whole = sweep(Space(**content), "whole", str(tmp_path))
    assert after == known(str(tmp_path / "whole"))  # draws, values, curves, stops and rungs, to the last bit
    assert outcome.winner.number == whole.winner.number
    assert outcome.winner.runs == whole.winner.runs
    assert_results(tmp_path / "whole", whole, trials=5)


def assert_results(folder: Path, outcome, trials: int) -> None:
    """The tables hold every trial, the winner is no worse than the default, and best.yaml runs."""
    rows = pq.read_table(folder / "trials.parquet").to_pylist()
    assert [row["trial"] for row in rows] == list(range(trials))
    assert {row["state"] for row in rows} <= {"finished", "stopped"}
    assert len(outcome.winner.runs) == len(outcome.default.runs) == 2
    assert outcome.winner.mean[0] >= outcome.default.mean[0]
    best = parse(["--config", str(folder / "best.yaml"), "--name", "best", "--output", str(folder)])
    best.train.workers, best.train.epochs, best.train.threads = 0, 1, 1
    result = isd_ray.pretrain(best)
    assert result["protocol"]["test"] == {"images": 48, "name": "test"}
    for name in ("report.html", "curves.parquet", "space.yaml"):
        assert (folder / name).exists(), name
    assert not (folder / "ray").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trials_that_fail_are_recorded_and_the_sweep_ends(ray_session, tiny_shards, tmp_path):
    """One loses its loss, one takes too much memory; the other finishes."""
    content = tiny_space(
        tiny_shards,
        space={"train.lr": {"choice": [0.05, 1e30]}, "data.image_size": {"choice": [16, 1024]}},
        start=[{"train.lr": 1e30, "data.image_size": 16}, {"train.lr": 0.05, "data.image_size": 1024}],
        budget={"trials": 3, "epochs": 2},
        scheduler={"name": "none"},
        resources={"cpus": 1, "concurrent": 2, "memory": 1.7},
    )
    outcome = sweep(Space(**content), "failing", str(tmp_path))
    states = [(t.state, t.reason or "") for t in outcome.trials]
    assert states[0] == ("finished", "")
    assert states[1][0] == states[2][0] == "failed"
    assert "not finite" in states[1][1]
    assert "out of memory: it took" in states[2][1]
    assert "resources.memory allows 1.7" in states[2][1]
    assert outcome.winner.number == 0
    rows = pq.read_table(tmp_path / "failing/trials.parquet").to_pylist()
    assert [row["reason"] for row in rows] == [t.reason for t in outcome.trials]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_trial_on_workers_is_judged_and_stopped_too(ray_session, tiny_shards, tmp_path, monkeypatch):
    """Rows of a Ray Train worker reach the search; a stopped trial leaves nothing that holds CPUs."""

    def stop_the_second(search: Search, job: Job, row: dict) -> bool:
        if job.number > 0 and row["epoch"] == 2:
            search.live[job].set_user_attr("stopped", 2)
        return job.number > 0 and row["epoch"] >= 2

    monkeypatch.setattr(Search, "heard", stop_the_second)
    content = tiny_space(
        tiny_shards,
        space={"train.lr": {"choice": [0.05, 0.01]}},
        budget={"trials": 2, "epochs": 6},
        confirm={"best": 0, "seeds": 0},
    )
    content["config"]["train.workers"] = 1
    outcome = sweep(Space(**content), "workers", str(tmp_path))
    assert [t.state for t in outcome.trials] == ["finished", "stopped"]
    assert [epoch for epoch, _ in outcome.trials[0].curves[0]] == [1, 2, 3, 4, 5, 6]
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, "a stopped trial still holds CPUs"
        time.sleep(0.5)


def test_a_goal_that_the_images_cannot_serve_is_said_at_the_start(ray_session, tiny_shards, tmp_path):
    content = tiny_space(tiny_shards, goals=["student.knn121"])
    with pytest.raises(UserError, match="goals: knn121: the bank has 120 images, fewer than k = 121"):
        sweep(Space(**content), "no", str(tmp_path))
    assert not (tmp_path / "no" / "journal.jsonl").exists(), "something was started"


def test_more_than_there_is_is_said_at_the_start(ray_session, tiny_shards, tmp_path):
    for resources, workers, words in (
        (
            {"cpus": 64},
            0,
            "a trial takes 64 CPUs and this cluster has 4, 1 of which is kept for reading images",
        ),
        ({"concurrent": 9}, 0, "resources.concurrent 9: 3 trials fit"),
        ({"gpus": 0.5}, 0, "a trial takes 0.5 GPUs and this cluster has 0"),
        ({"cpus": 1}, 8, "a trial takes 8.001 CPUs and this cluster has 4"),
        ({"cpus": 2, "concurrent": 2}, 1, "resources.concurrent 2: 1 trials fit"),
    ):
        if "gpus" in resources and ray.cluster_resources().get("GPU"):
            continue
        content = tiny_space(tiny_shards, resources=resources)
        content["config"]["train.workers"] = workers
        with pytest.raises(UserError) as error:
            sweep(Space(**content), "no", str(tmp_path))
        assert words in str(error.value)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "no" / "journal.jsonl").exists(), "something was started"


def test_a_run_is_evaluated_on_the_way_on_images_that_it_does_not_train_on(
    ray_session, tiny_options, tiny_shards
):
    told: list[dict] = []

    def tell(row: dict) -> bool:
        told.append(row)
        return False

    names = ["knn20", "nmi"]
    options = {"data.validation": 10, "evaluate.every": 2, "evaluate.enabled": True}
    options |= {"evaluate.protocols": names, "evaluate.along": names}
    result = pretrain(resolve(tiny_options | options), tell)
    folder = RunFolder(f"{tiny_options['output']}/run")
    rows = read_rows(folder)
    assert told == rows
    assert [row["epoch"] for row in rows] == [2, 3]  # every second one, and the last
    assert result["protocol"]["test"] == {"images": 40, "name": "validation"}
    assert rows[-1][GOAL] == result["metrics"]["student"]["knn20"]
    assert rows[-1]["teacher.nmi"] == result["metrics"]["teacher"]["nmi"]
    assert "student.knn1" not in rows[-1]
    keys = [set(pq.read_table(Path(folder.path, f"{n}.parquet"))["key"].to_pylist())
            for n in ("selection", "bank", "validation")]  # fmt: skip
    assert keys[0] == keys[1]
    assert not keys[0] & keys[2]
    assert (len(keys[0]), len(keys[2])) == (120, 40)
    with pytest.raises(UserError, match=r"--evaluate.along: knn121: the bank has 120 images"):
        pretrain(resolve(tiny_options | options | {"evaluate.along": ["knn121"], "name": "small"}))
    with pytest.raises(UserError, match=r"needs --data\.validation"):
        pretrain(resolve(tiny_options | {"evaluate.every": 2, "name": "other"}))


def test_another_space_under_the_same_name_is_refused(ray_session, tiny_shards, tmp_path):
    content = tiny_space(tiny_shards, budget={"trials": 1, "epochs": 2}, confirm={"seeds": 0})
    sweep(Space(**content), "same", str(tmp_path))
    more = content | {"budget": {"trials": 2, "epochs": 2}}
    assert len(sweep(Space(**more), "same", str(tmp_path)).trials) == 2
    with pytest.raises(UserError, match=r"goals.*another --name"):
        sweep(Space(**content | {"goals": ["teacher.knn20"]}), "same", str(tmp_path))
    assert json.loads((tmp_path / "same/trials/0000/seed-0/result.json").read_text())["name"] == "seed-0"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_all_workers_stop_together_where_they_are_told_to(ray_session, tiny_options):
    told: list[int] = []

    def tell(row: dict) -> bool:
        told.append(row["epoch"])
        return row["epoch"] == 2

    options = {"data.validation": 10, "evaluate.every": 1, "train.workers": 2, "queue.layout": "sharded"}
    pretrain(resolve(tiny_options | options), tell)
    folder = RunFolder(f"{tiny_options['output']}/run")
    steps = 120 // 16
    assert told == [row["epoch"] for row in read_rows(folder)] == [1, 2]
    assert checkpoint_names(folder)[-1] == f"step-{2 * steps:08d}.pt"
