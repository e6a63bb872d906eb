"""A small process above each job, for an end that leaves Python no word.

Ray's core ends the driver from C++ where its raylet or GCS dies, with tens of lines of its own; the
kernel ends it where memory is out. So a job works in a child: this process passes signals on to it, and
says one line where it ended without saying one. What native code prints meanwhile (on file descriptor 2),
and what Ray's own threads print, goes to a log, which is kept where the job failed; the job's own lines go
where they always went. Processes that the job leaves behind are ended before the command returns: none of
them writes while the same command goes on.
"""

import ctypes
import faulthandler
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import IO, TextIO

from isd_ray.ending import DEFECT, GOES_ON, MACHINE, run_job
from isd_ray.messages import note

Main = Callable[[list[str]], int]
PASSED_ON = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
FROM_KERNEL = 0x80  # si_code of Ctrl-C on a terminal, which reaches the child by itself
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
EXIT_SECONDS = 30  # that a job has to leave once it has said how it ended
TIDY_SECONDS = 2.0  # that what it has started has to end after it


def run(main: Main, arguments: Sequence[str]) -> int:
    """Run a job in a child and return its exit code; elsewhere than on Linux in this process."""
    if not sys.platform.startswith("linux"):
        return run_job(main, arguments)
    log = _log()
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans come to this process, not to init
    told, tells = os.pipe()
    before, parent = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON | {signal.SIGCHLD}), os.getpid()
    child = os.fork()
    if not child:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has died before that
            os._exit(DEFECT)

        def begin(given: list[str]) -> int:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)  # now they are heard
            return main(given)

        return _work(begin, arguments, tells, log)
    os.close(tells)
    status = _wait(child)
    said = os.read(told, 1)
    _end_orphans(TIDY_SECONDS if said else 0.0)
    return _say_end(said, status, log)


def _log() -> IO[bytes]:
    """Open a file without a name: there is nothing to tidy up, however this process ends."""
    try:
        return tempfile.TemporaryFile()
    except OSError:  # no room for it: what native code prints is lost, the job's own lines are not
        return open(os.devnull, "w+b")


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


# -- the child -----------------------------------------------------------------------------------------------


def _work(main: Main, arguments: Sequence[str], tells: int, log: IO[bytes]) -> int:
    """Run the job; tell its exit code before Ray and Python tidy up, in which they may fail or hang."""
    sys.stdout, sys.stderr = _Terminal(sys.stdout, log), _Terminal(sys.stderr, log)
    os.dup2(log.fileno(), 2)
    faulthandler.enable(log)  # else Ray has the stack of a crash printed on the terminal
    code = run_job(main, arguments)
    for stream in (sys.stdout, sys.stderr):
        stream.end()
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # it ends anyway
    os.write(tells, bytes([code]))
    signal.alarm(EXIT_SECONDS)
    return code


class _Terminal(TextIOWrapper):
    """Standard output or error of the job on a descriptor of its own; what Ray prints goes to the log."""

    def __init__(self, stream: TextIO, log: IO[bytes]) -> None:
        own, errors = os.fdopen(os.dup(stream.fileno()), "wb"), getattr(stream, "errors", None)
        buffered = (getattr(stream, name, True) for name in ("line_buffering", "write_through"))
        super().__init__(own, stream.encoding, errors, line_buffering=any(buffered))
        self.log, self.over = log, False

    def write(self, text: str) -> int:
        """Print text; what a thread of Ray's has to say goes to the log."""
        if not self.over and not threading.current_thread().name.startswith("ray_"):
            return super().write(text)
        with suppress(OSError):  # no room for it
            os.write(self.log.fileno(), text.encode(errors="replace"))
        return len(text)

    def end(self) -> None:
        """The job is over: what is printed from now on, as Ray tidies up, goes to the log."""
        with suppress(OSError):  # nobody reads
            self.flush()
        self.over = True


# -- the process above it ------------------------------------------------------------------------------------


def _wait(child: int) -> int:
    """Pass signals on until the child has ended; returns its wait status."""
    while True:
        info = signal.sigwaitinfo(PASSED_ON | {signal.SIGCHLD})
        if info.si_signo != signal.SIGCHLD and info.si_code != FROM_KERNEL:
            os.kill(child, info.si_signo)
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:  # orphans end here too
            if ended[0] == child:
                return ended[1]


def _end_orphans(seconds: float) -> None:
    """Wait so long for what the job has started and left behind, then end it."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return  # none is left
        if not ended:
            for pid in _children() if time.monotonic() >= deadline else []:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


def _children() -> list[int]:
    """Return the processes whose parent is this one."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = (place / "stat").read_text().rpartition(")")[2].split()[1]
        except (OSError, IndexError):
            continue  # it has ended
        if int(parent) == os.getpid():
            found.append(int(place.name))
    return found


def _say_end(said: bytes, status: int, log: IO[bytes]) -> int:
    """Return the exit code that the job has told; where it told none, say so in its place."""
    code = said[0] if said else MACHINE
    kept = _keep(log) if code in (MACHINE, DEFECT) else None
    if not said:
        where = f"its last words: {kept}; " if kept else ""
        note(f"error: the job's process ended without a word: {_how(status)}; {where}{GOES_ON}")
    elif kept:
        note(f"note: what Ray and other libraries printed: {kept}")
    return code


def _how(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGKILL:
        return "it was killed from outside, perhaps for lack of memory"
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}"
    return "Ray's core ended it, as it does where a process of Ray's on this machine has died"


def _keep(log: IO[bytes]) -> str | None:
    """Give the log a name, where anything stands in it and there is room for it."""
    log.seek(0, os.SEEK_END)
    if not log.tell():
        return None
    log.seek(0)
    try:
        with tempfile.NamedTemporaryFile(prefix="isd_ray_", suffix=".log", delete=False) as file:
            shutil.copyfileobj(log, file)
        return file.name
    except OSError:
        return None
