"""Jobs that are hurt while they run, and the one property that holds for all of them.

A command goes on by itself, or ends in time with a documented exit code and one line, and the same command
then finishes in the bits of a run that was left alone. Nothing stays behind.
"""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
MARK = "ISD_RAY_TEST_MARK"  # in the environment of a job and of all that it starts
PATIENCE = 150.0  # seconds that anything may take
TIDY = 30.0  # seconds after which nothing of a job is left
OF_RAY = re.compile(r"\(raylet\)|\*\*\* |\[\d{4}-\d\d-\d\d .* [EWFC] |StackTrace|Traceback|  File \"")
OUTPUT = re.compile(r"epoch \d+/\d+  |waiting for |note: |$")  # lines on standard error that are no complaint
ROLES = {
    "job": "jobs/",  # the driver and its supervisor
    "worker": "ray::RayTrainWorker",
    "controller": "ray::TrainController",
    "lines": "ray::_QueueActor",
    "raylet": "raylet/raylet",
    "gcs": "gcs/gcs_server",
    "task": "ray::read_range",
}


def processes(mark: str) -> dict[int, str]:
    """Return the command lines of the processes that carry the mark, by their number."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (place / "environ").read_bytes():
                found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended, or belongs to somebody else
            continue
    return found


def shared_files() -> set[str]:
    """Return the files in shared memory that no process uses."""
    names = {entry.name for entry in os.scandir("/dev/shm") if entry.is_file()}
    for place in Path("/proc").glob("[0-9]*/maps") if names else ():
        with suppress(OSError):
            used = place.read_text(errors="replace")
            names = {name for name in names if f"/dev/shm/{name}" not in used}
    return names


class Job:
    """A job in a process of its own; `folder`: of its run."""

    def __init__(self, options: Mapping[str, Any], home: Path, script: str = "pretrain", **more: str) -> None:
        self.mark, self.folder = uuid.uuid4().hex, Path(str(options["output"])) / str(options["name"])
        self.around, self.shared = home.parent, shared_files()
        self.others = self.foreign()
        arguments = [
            f"--{name}={json.dumps(v) if isinstance(v, list | dict) else v}" for name, v in options.items()
        ]
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith("RAY_") or k == "RAY_worker_niceness"
        }
        environment |= {MARK: self.mark, "HOME": str(home), **more}
        self.files = [(home / f"{self.mark}.{name}").open("w+") for name in ("out", "err")]
        command = [sys.executable, str(ROOT / "jobs" / f"{script}.py"), *arguments]
        self.process = subprocess.Popen(
            command,
            env=environment,
            cwd=home,
            stdout=self.files[0],
            stderr=self.files[1],
            start_new_session=True,
        )

    def until(self, true: Callable[[], Any], what: str) -> Any:
        """Wait until something holds; returns it."""
        end = time.monotonic() + PATIENCE
        while not (found := true()):
            assert self.process.poll() is None, f"the job ended before {what}: {self.said()}"
            assert time.monotonic() < end, f"waited {PATIENCE:.0f} s for {what}: {self.said()}"
            time.sleep(0.02)
        return found

    def steps(self) -> int:
        """The last step that metrics.jsonl knows."""
        try:
            return json.loads((self.folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        except (OSError, ValueError, IndexError):
            return 0

    def at(self, step: int) -> None:
        """Wait until this step is done."""
        self.until(lambda: self.steps() >= step, f"step {step}")

    def hurt(self, role: str, sent: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the driver, or to all processes of a role."""
        if role == "driver":
            self.process.send_signal(sent)
            return
        found = self.until(
            lambda: [p for p, line in processes(self.mark).items() if ROLES[role] in line], f"a {role}"
        )
        for number in found:
            os.kill(number, sent)

    def end(self) -> int:
        """Wait for the end of the job, and of all that it has started; returns the exit code."""
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the job hangs: {self.said()}") from None
        end = time.monotonic() + TIDY
        while left := processes(self.mark):
            assert time.monotonic() < end, f"left behind: {left}"
            time.sleep(0.1)
        return code

    def foreign(self) -> dict[Path, bytes]:
        """The files beside the run's folder, with their content."""
        there = [p for p in (self.around / "runs").rglob("*") if p.is_file()]
        return {p: p.read_bytes() for p in there if not p.is_relative_to(self.folder)}

    def said(self) -> str:
        """Everything on standard error so far."""
        return Path(self.files[1].name).read_text()

    def complaints(self) -> list[str]:
        """The lines on standard error that are neither progress nor notes."""
        return [line for line in self.said().splitlines() if not OUTPUT.match(line)]


def ends_well(job: Job, *codes: int) -> None:
    """The property of one command: its code is one of `codes`, and what it complains of is one line."""
    code, lines = job.end(), job.complaints()
    assert code in codes, f"exit code {code}: {job.said()}"
    assert len(lines) == (code != 0), job.said()
    printed = Path(job.files[0].name).read_text() + job.said()
    assert not OF_RAY.search(printed), printed
    wordless = code == -signal.SIGKILL or "ended without a word" in job.said()
    assert wordless or not list(job.folder.glob(".ray-*"))  # else the next command removes them
    assert job.foreign() == job.others
    assert not shared_files() - job.shared


def weights(content: bytes) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint by its place in it."""
    return dict(_tensors(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)))


def _tensors(value: Any, place: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield place, value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _tensors(part, f"{place}.{name}")
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _tensors(part, f"{place}.{number}")


def last_checkpoint(folder: Path) -> bytes:
    """Return the newest checkpoint of a run on a disk."""
    return max((folder / "checkpoints").glob("step-*.pt")).read_bytes()


def same_bits(one: bytes, other: bytes) -> bool:
    """Return whether two checkpoints hold the same tensors, to the last bit."""
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
