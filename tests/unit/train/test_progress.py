"""Progress lines by a clock of the test's own, and metrics files across kills and resumes."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs

from isd_ray.train.folder import RunFolder
from isd_ray.train.progress import MetricsWriter, Progress, duration


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(progress: Progress, clock: Clock, steps: range, seconds: float = 1.0) -> None:
    for step in steps:
        clock.now += seconds
        progress.step(step, 1 / step, {"queue_fill": step / 100}, 0.25 * seconds, lr=0.05)


def test_plain_lines_come_at_the_interval_and_at_the_end_with_the_true_figures() -> None:
    out, clock = io.StringIO(), Clock()
    run(Progress(1, 25, 64, out=out, interval=10, clock=clock), clock, range(1, 26))
    assert out.getvalue().splitlines() == [
        "epoch 1/1  step 10/25  loss 0.1000  lr 0.05  64 images/s  waited 25%  queue_fill 0.1  ETA 0:00:15",
        "epoch 1/1  step 20/25  loss 0.0500  lr 0.05  64 images/s  waited 25%  queue_fill 0.2  ETA 0:00:05",
        "epoch 1/1  step 25/25  loss 0.0400  lr 0.05  64 images/s  waited 25%  queue_fill 0.25  ETA 0:00:00",
    ]


def test_calls_may_be_far_between() -> None:
    out, clock = io.StringIO(), Clock()
    run(Progress(1, 100, 8, out=out, interval=10, clock=clock), clock, range(20, 60, 20), seconds=20)
    first, second = out.getvalue().splitlines()
    assert "step 20/100" in first
    assert "8 images/s" in first
    assert "step 40/100" in second
    assert "8 images/s" in second


def test_a_resumed_run_measures_only_its_own_steps() -> None:
    out, clock = io.StringIO(), Clock()
    progress = Progress(2, 50, 8, start_step=60, out=out, interval=10, clock=clock)
    run(progress, clock, range(61, 66), seconds=2)
    (line,) = out.getvalue().splitlines()
    assert line.startswith("epoch 2/2  step 65/100")
    assert "4 images/s" in line
    assert line.endswith("ETA 0:01:10")


def test_a_terminal_gets_a_live_line() -> None:
    out, clock = Terminal(), Clock()
    progress = Progress(1, 100, 8, out=out, interval=10, clock=clock)
    run(progress, clock, range(1, 6))
    progress.close()
    progress.close()
    assert "step 5/100" in out.getvalue()
    assert "\x1b" in out.getvalue()


@given(st.integers(0, 10**6))
def test_duration_reads_back(seconds: int) -> None:
    h, m, s = duration(seconds).split(":")
    assert int(h) * 3600 + int(m) * 60 + int(s) == seconds
    assert len(m) == len(s) == 2


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resume_drops_later_steps_and_torn_lines(tmp_path: Path) -> None:
    writer = MetricsWriter(RunFolder(str(tmp_path)))
    for step in range(1, 8):
        writer.write({"step": step, "loss": float(step)})
    writer.close()  # each line was visible before: see the next test
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    resumed = MetricsWriter(RunFolder(str(tmp_path)), start_step=5)
    assert [row["step"] for row in read(tmp_path)] == [1, 2, 3, 4, 5]
    resumed.write({"step": 6, "loss": 60.0})
    resumed.close()
    assert [(row["step"], row["loss"]) for row in read(tmp_path)][4:] == [(5, 5.0), (6, 60.0)]
    assert [f.name for f in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_lines_are_readable_at_once_and_hold_no_nan(tmp_path: Path) -> None:
    writer = MetricsWriter(RunFolder(str(tmp_path)))
    writer.write({"step": 1, "loss": math.nan, "lr": torch.tensor(0.5), "epoch_end": True})
    (row,) = read(tmp_path)
    assert row["loss"] is None
    assert row["lr"] == 0.5
    assert row["epoch_end"] is True
    assert row["time"] > 1e9
    writer.close()
    writer.close()


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    first = MetricsWriter(RunFolder(str(tmp_path)))
    first.write({"step": 1})
    first.close()
    MetricsWriter(RunFolder(str(tmp_path))).close()
    assert read(tmp_path) == []


def test_a_remote_folder_is_written_whole_at_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fs.SubTreeFileSystem(
        str(tmp_path), fs.LocalFileSystem()
    )  # no LocalFileSystem: stands for a bucket
    monkeypatch.setattr("isd_ray.train.folder.open_filesystem", lambda uri: (store, "run"))
    writer = MetricsWriter(RunFolder("bucket://run"))
    writer.write({"step": 1, "loss": 0.5})
    assert read(tmp_path / "run") == []
    writer.flush()
    assert read(tmp_path / "run")[0]["loss"] == 0.5
    writer.write({"step": 2})
    writer.close()
    MetricsWriter(RunFolder("bucket://run"), start_step=1).close()
    assert [row["step"] for row in read(tmp_path / "run")] == [1]
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_uris_and_paths_mean_the_same_local_folder(tmp_path: Path) -> None:
    writer = MetricsWriter(RunFolder(tmp_path.as_uri()))
    writer.write({"step": 3})
    writer.close()
    assert read(tmp_path)[0]["step"] == 3
