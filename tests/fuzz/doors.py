"""What holds at every door of the product, whatever is brought to it; checked here alone.

A job, or the function behind one, ends with a documented exit code and says why in a line or two: no defect, no
traceback, no control character, no secret. It takes bounded time and memory, and outside of the places that it was
told to write to it creates, changes and removes nothing.
"""

import io
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox import Sandbox

from isd_ray import ending
from isd_ray.ending import DONE, MACHINE, MISTAKE, run_job

SECRET = "5ecretKey"  # stands in URIs and is printed nowhere
CPU_SECONDS, SECONDS = 5.0, 30.0  # of a case: of this process, and on the clock of a busy machine
MEMORY = 2**30  # bytes by which the resident memory may grow in a case
ADDRESSES = 4 * 2**30  # bytes of address space beyond those in use: the machine belongs to others too
ERROR_LINES = 3
REPORT = os.environ.get("ISD_RAY_FUZZ_REPORT")  # file that gets the failures: tests then go on
counts: Counter[str] = Counter()  # cases by door

Job = Callable[[list[str]], int]


class TooSlow(BaseException):
    """A case has used up its time."""


@dataclass
class Answer:
    """What came out of a door."""

    code: int | None = None
    out: str = ""
    err: str = ""
    seconds: float = 0.0
    grown: int = 0
    slow: bool = False
    error: BaseException | None = None
    changed: list[str] = field(default_factory=list)

    def faults(self, codes: Sequence[int]) -> list[str]:
        """Say which promises were broken; `codes`: the exit codes that this door may end with."""
        said = self.out + self.err
        lines = self.err.splitlines()
        odd = sorted({c for c in said if c != "\n" and not c.isprintable()})
        checks = [
            (self.slow, f"it took more than {CPU_SECONDS:g} s of the processor, or {SECONDS:g} s"),
            (self.grown > MEMORY, f"it took {self.grown / 2**20:.0f} MiB more memory"),
            (self.code is None, "an exception came out of run_job"),
            (self.code == MACHINE and "out of memory" in self.err, "it ran out of memory"),
            (self.code is not None and self.code not in codes, f"exit code {self.code}, not one of {codes}"),
            ("Traceback (most recent call last)" in said, "a traceback was printed"),
            (len(lines) > ERROR_LINES, f"{len(lines)} lines on standard error"),
            (bool(odd), f"unprintable characters were printed: {odd[:5]!r}"),
            (SECRET in said, "a secret was printed"),
            (bool(self.changed), f"touched: {'; '.join(self.changed[:5])}"),
        ]
        if self.code in (MISTAKE, MACHINE):
            checks.append((not (lines and lines[-1].startswith("error: ")), "no line says what is wrong"))
        return [text for broken, text in checks if broken]

    def where(self) -> str:
        """Name the exception that came up, and the last place of the product that it passed."""
        if self.error is None:
            return ""
        frames = [f for f in traceback.extract_tb(self.error.__traceback__) if "isd_ray/" in f.filename]
        last = f" in {frames[-1].filename.rpartition('isd_ray/')[2]}:{frames[-1].name}" if frames else ""
        return f"{type(self.error).__name__}{last}"


def knock(
    door: str,
    job: Job,
    arguments: Sequence[str],
    sandbox: Sandbox,
    *,
    writes: Sequence[Path] = (),
    keeps: Sequence[Path] = (),
    codes: Sequence[int] = (DONE, MISTAKE),
    about: Any = "",
) -> Answer:
    """Call a job as a command would be, and hold what comes of it against the promises.

    writes: the places that it may fill; keeps: files in them that are somebody else's. about: the case, in words, where
    the arguments do not tell it.
    """
    counts[door] += 1
    answer = Answer()
    before = sandbox.snapshot(writes) | sandbox.files(keeps)

    def main(given: list[str]) -> int:
        try:
            return job(given)
        except BaseException as error:
            answer.error = error
            raise

    with _on_stage(sandbox), _heard(answer), _measured(answer), _timed(answer):
        try:
            answer.code = run_job(main, arguments)
        except BaseException as error:
            answer.error = error
    answer.changed = sandbox.changes(before, sandbox.snapshot(writes) | sandbox.files(keeps))
    if faults := answer.faults(codes):
        _report(door, answer, faults, arguments, about)
    return answer


def _report(door: str, answer: Answer, faults: list[str], arguments: Sequence[str], about: Any) -> None:
    test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]
    case = {
        "door": door,
        "test": test,
        "faults": faults,
        "where": answer.where(),
        "about": repr(about)[:2000],
    }
    case |= {"arguments": repr(list(arguments))[:2000], "out": answer.out[-600:], "err": answer.err[-2500:]}
    if REPORT is None:
        told = "\n".join(f"{name}: {value}" for name, value in case.items())
        raise AssertionError(f"{door}: {'; '.join(faults)}\n{told}")
    with open(REPORT, "a") as file:
        file.write(json.dumps(case) + "\n")


# -- the surroundings of a case ------------------------------------------------------------------------------


@contextmanager
def _on_stage(sandbox: Sandbox) -> Iterator[None]:
    """Give the process the sandbox's folders, and take back what a job leaves set."""
    variables, folder, temporary = dict(os.environ), os.getcwd(), tempfile.tempdir
    os.environ |= sandbox.variables()
    tempfile.tempdir = None  # read anew from the variables
    os.chdir(sandbox.work)
    heard = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)
        ending._in_job = False
        os.chdir(folder)
        tempfile.tempdir = temporary
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        os.environ |= variables


_out, _err = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115 (they live as long as the process)


@contextmanager
def _heard(answer: Answer) -> Iterator[None]:
    """Note what is printed, also by libraries in C, and warnings as Python prints them by default."""
    streams, saved = (sys.stdout, sys.stderr), (os.dup(1), os.dup(2))
    for stream in streams:
        stream.flush()
    for file, number in ((_out, 1), (_err, 2)):
        file.seek(0)
        file.truncate()
        os.dup2(file.fileno(), number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    try:
        with warnings.catch_warnings():
            _warn_as_by_default()
            yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = streams
        for number, kept in ((1, saved[0]), (2, saved[1])):
            os.dup2(kept, number)
            os.close(kept)
        answer.out, answer.err = (_text(file) for file in (_out, _err))


def _text(file: io.BufferedRandom) -> str:
    file.seek(0)
    return file.read().decode("utf-8", errors="replace")


def _warn_as_by_default() -> None:
    warnings.resetwarnings()
    for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", kind)

    def show(message: Warning | str, kind: type[Warning], file: str, line: int, *_: Any) -> None:
        sys.stderr.write(warnings.formatwarning(message, kind, file, line))

    warnings.showwarning = show  # pytest keeps them to itself


@contextmanager
def _measured(answer: Answer) -> Iterator[None]:
    """Note by how much the memory of the process grew at most; a limit keeps a case from taking the machine's."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = _status()
    resource.setrlimit(resource.RLIMIT_AS, (before["VmSize"] + ADDRESSES, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        answer.grown = _status()["VmHWM"] - before["VmRSS"]


def _status() -> dict[str, int]:
    """Return this process's sizes in bytes, as Linux names them."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


@contextmanager
def _timed(answer: Answer) -> Iterator[None]:
    """End a case that takes too long."""
    started, used = time.monotonic(), time.process_time()

    def look(*_: object) -> None:
        if time.process_time() - used > CPU_SECONDS or time.monotonic() - started > SECONDS:
            answer.slow = True
            raise TooSlow

    former = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        answer.seconds = time.monotonic() - started
