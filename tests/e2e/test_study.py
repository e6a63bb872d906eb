"""Whole studies: killed and continued, with a cell that breaks; D1..D10 in miniature; faults that the data show."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from PIL import Image
from tiny_run import SIDE, options_of_tiny_run

from isd_ray.config import read_yaml
from isd_ray.data.imbalance import published_classes
from isd_ray.errors import UserError
from isd_ray.study.check import check
from isd_ray.study.run import compare
from isd_ray.train.folder import RunFolder, checkpoint_names

ROOT = Path(__file__).parents[2]
OWN = ("name", "output", "method.name", "data.dataset", "train.threads", "evaluate.enabled")


def tiny_study(shards: Path, **change: Any) -> dict[str, Any]:
    """Two methods, two seeds, seconds a cell."""
    config = {k: v for k, v in options_of_tiny_run(shards, Path("unused")).items() if k not in OWN}
    return {
        "methods": {"moco_v2": {}, "isd_plus": {}},
        "data": {"tiny": {"data.dataset": "shards"}},
        "imbalances": {"exp5": {"scheme": "exponential", "ratio": 5}},
        "seeds": [0, 1],
        "baseline": "moco_v2",
        "metrics": ["student.knn20", "teacher.linear"],
        "config": config | {"train.epochs": 4, "evaluate.baselines": False},
        "resources": {"cpus": 1, "concurrent": 1},
        "pictures": {"queries": 4, "neighbours": 5, "anchors": 3, "sample": 30, "map": "pca"},
    } | change


def kill_in_the_second_cell(study: Path, output: Path) -> None:
    """Start the job and kill its driver once a cell is finished and the next has a checkpoint, but no result."""
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, str(ROOT / "jobs/compare.py"), "--study", str(study), "--name", "killed"]
    job = subprocess.Popen(
        [*command, "--output", str(output), "--address", address], start_new_session=True, cwd=output
    )
    second = RunFolder(str(output / "killed/cells/tiny-exp5-0-isd_plus-seed0"))
    deadline = time.monotonic() + 200
    while not checkpoint_names(second):
        assert job.poll() is None, "the study ended before it could be killed"
        assert time.monotonic() < deadline, "the cell did not come"
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert not second.exists("result.json"), "the cell ended before the kill: the test says nothing"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_study_goes_on_and_a_broken_cell_is_retried_alone(
    ray_session, tiny_shards, tmp_path, capsys
):
    content = tiny_study(tiny_shards)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    kill_in_the_second_cell(path, tmp_path)
    cells = tmp_path / "killed/cells"
    first = cells / "tiny-exp5-0-moco_v2-seed0"
    before = {p: p.stat().st_mtime_ns for p in sorted(first.rglob("*")) if p.is_file()}
    assert first / "result.json" in before, "nothing had finished before the kill: the test says nothing"
    broken = cells / "tiny-exp5-0-moco_v2-seed1"
    broken.mkdir()
    (broken / "checkpoints").write_text("a file where a folder must be")

    outcome = compare(content, "killed", str(tmp_path))
    out = capsys.readouterr().out
    assert "4 cells, 3 to run, 1 at once" in out
    assert {p: p.stat().st_mtime_ns for p in before} == before, "a finished cell was touched"
    assert [run.cell.name for run in outcome.failed] == [broken.name]
    assert "FAILED: " in out
    assert outcome.failed[0].failure in (tmp_path / "killed/report/report.md").read_text().replace("\\", "")
    steps = [row["step"] for row in outcome.runs[1].rows]
    assert steps == sorted(set(steps))
    assert steps[-1] == 4 * ((40 + 23 + 13 + 8) // 16)  # it went on from its checkpoint to the last epoch

    (broken / "checkpoints").unlink()
    outcome = compare(content, "killed", str(tmp_path))
    out = capsys.readouterr().out
    assert "4 cells, 1 to run" in out
    assert [line.split()[-2] for line in out.splitlines() if line.endswith(" starts")] == [broken.name]
    assert len(outcome.finished) == 4
    assert not outcome.failed
    check_results(tmp_path / "killed", content)


def check_results(folder: Path, content: dict[str, Any]) -> None:
    """Everything is there, and other options under the same name are refused."""
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    assert len({row["cell"] for row in rows}) == 4
    few = [r for r in rows if r["group"] == "few" and r["network"] == "student" and r["metric"] == "knn20"]
    every = [(method, seed) for method in ("isd_plus", "moco_v2") for seed in (0, 1)]
    assert sorted((r["method"], r["seed"]) for r in few) == every
    assert len(list((folder / "report").glob("*.png"))) == 7  # neighbours, map and anchors among them
    assert check(read_yaml(folder / "study.yaml")).cells == check(content).cells
    again = compare(content, "killed", str(folder.parent), report_only=True)
    assert len(again.finished) == 4
    with pytest.raises(UserError, match=r"train\.lr was"):
        compare(content | {"config": content["config"] | {"train.lr": 0.123}}, "killed", str(folder.parent))
    with pytest.raises(UserError, match=r"measured otherwise \(evaluate\.bank was 'auto', now 'train'\)"):
        compare(
            content | {"config": content["config"] | {"evaluate.bank": "train"}}, "killed", str(folder.parent)
        )


def test_faults_of_the_data_come_with_those_of_the_file(ray_session, tiny_shards, tmp_path):
    content = tiny_study(
        tiny_shards,
        basline="isd",
        metrics=["student.knn200_weighted", "student.fewshot41"],
        imbalances={
            "few": {"scheme": "balanced", "options": {"per_class": 50}},
            "lost": {"scheme": "exponential", "ratio": 100},
            "d": {"scheme": "isd_8_30", "splits": ["D1", "D11"]},
            "unequal": {
                "scheme": "large_small",
                "options": {"n_large": 1, "size_large": 41, "size_small": 10},
            },
        },
    )
    content["config"] |= {"queue.size": 60, "train.batch_size": 64}
    with pytest.raises(UserError) as error:
        compare(content, "no", str(tmp_path))
    text = str(error.value)
    for words in (
        "unknown entry 'basline'. Did you mean 'baseline'?",
        "50 images a class are asked for, but '0' has 40",
        "1 classes get no image, e.g. '3'",
        "D1 names 38 classes, of which the index lacks 38, e.g. 'n01498041'",
        "unknown split 'D11' of isd_8_30",
        "41 images a class are asked for, but",
        "student.knn200_weighted: the bank has 160 images, fewer than k = 200",
        "student.fewshot41: class 0 has 40 images in the bank, fewer than 41",
        "tiny-lost, moco_v2, tiny-lost, isd_plus",
        "--train.batch_size 64: the data set has",
    ):
        assert words in text, words
    assert not (tmp_path / "no").exists(), "something was started"


def image_folder(path: Path, classes: dict[str, int], rng: np.random.Generator) -> None:
    """One folder a class with so many JPEG files, as ImageNet lies on a disk."""
    for name, count in classes.items():
        (path / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / name / f"{name}_{i}.JPEG")


def miniature(root: Path) -> int:
    """ImageNet's layout with a few noisy images a class, and the authors' lists of D1..D10 in theirs.

    Returns the training images of the classes of D1, which is more than D1: some are large ones of another subset.
    """
    lists = {
        d: {k: [f"n{w}" for w in v.split()] for k, v in parts.items()}
        for d, parts in published_classes().items()
    }
    large = {c for parts in lists.values() for c in parts["large"]}
    used = sorted({c for parts in lists.values() for each in parts.values() for c in each})
    others = [f"n9{i:07d}" for i in range(1000 - len(used))]
    rng = np.random.default_rng(0)
    image_folder(root / "train", {c: 6 if c in large else 2 for c in used} | dict.fromkeys(others, 1), rng)
    image_folder(root / "val", dict.fromkeys(used, 1), rng)
    (root / "unbalanced_dataset").mkdir()
    for name, parts in lists.items():
        chosen = [(c, n) for kind, n in (("large", 6), ("small", 2)) for c in parts[kind]]
        lines = ["class names : ", *(c for c, _ in chosen), "Train Images: "]
        lines += [f"/train/{c}/{c}_{i}.JPEG" for c, n in chosen for i in range(n)]
        (root / "unbalanced_dataset" / f"{name}.txt").write_text("\n".join(lines))
    first = {c for each in lists["D1"].values() for c in each}
    return sum(6 if c in large else 2 for c in first)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_published_d1_to_d10_in_miniature(ray_session, tmp_path, monkeypatch):
    """The project's own file, all of it, on folders and lists like the published ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ISD_RAY_CACHE", str(tmp_path / "cache"))
    bank = miniature(tmp_path)
    small = {
        "data.root": str(tmp_path), "model.backbone": "resnet8", "model.stem": "stride2", "data.image_size": SIDE,
        "train.epochs": 1, "train.batch_size": 32, "train.workers": 0, "queue.size": 64, "evaluate.baselines": False,
    }  # fmt: skip
    content = read_yaml(ROOT / "jobs/recipes/study_d1_d10.yaml") | {"resources": {"cpus": 1, "concurrent": 1}}
    content["pictures"] = {"map": "pca", "queries": 3}
    outcome = compare(content, "d1_d10", str(tmp_path / "runs"), small)
    assert len(outcome.finished) == 20
    setting = outcome.plan.settings[0]
    assert outcome.units(setting) == "split"
    for cell in outcome.plan.cells:
        facts = outcome.plan.facts[cell.subset]
        assert (facts.images, sum(facts.tested)) == (8 * 6 + 30 * 2, 38)
        groups = outcome.plan.grouping(cell.subset)
        assert {name: len(members) for name, members in groups.items()} == {"large": 8, "small": 30}
    text = (tmp_path / "runs/d1_d10/report/report.md").read_text()
    header = next(line for line in text.splitlines() if "| D1 | D2 |" in line)
    assert header.count("| D") == 10
    for group in ("All", "Large", "Small"):
        assert f"| {group} | Diff isd - moco\\_v2 |" in text
    result = outcome.runs[0].result or {}
    assert result["protocol"]["bank"]["images"] == bank > 8 * 6 + 30 * 2
