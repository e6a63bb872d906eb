"""How a job ends: its exit code, and one line for whatever went wrong.

0: done. 1: done, but something in the result is wrong (runs of a study that failed, shards that are
damaged). 2: a mistake in options, files or data. 3: the machine failed (disk, store, network, memory,
a process): the same command goes on. 70: a defect of this program, with its traceback. 130 and 143:
stopped by Ctrl-C or SIGTERM: the same command goes on.
"""

import errno
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from isd_ray.errors import MachineError, UserError
from isd_ray.messages import note

DONE, FOUND, MISTAKE, MACHINE, DEFECT = 0, 1, 2, 3, 70
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
GOES_ON = "the same command goes on"
LINE = 2000  # characters of a message that are printed

REMEDIES = {  # what to do about a failed call of the operating system
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the quota of the disk is used up; free some space",
    errno.EROFS: "the disk is read-only; choose a place that can be written",
    errno.EACCES: "no permission; change it, or choose another place",
    errno.EPERM: "no permission; change it, or choose another place",
    errno.ENOTDIR: "a part of the path is a file; choose another place",
    errno.EEXIST: "something else is there; choose another place",
    errno.EISDIR: "that is a folder; choose another place",
    errno.ENAMETOOLONG: "the path is too long; choose a shorter one",
    errno.EMFILE: "too many open files; raise `ulimit -n`",
    errno.EIO: "the disk does not read or write; check it",
    errno.ENOMEM: "no memory is left; use a smaller batch or fewer workers",
}
CHOICES = {  # what a person has chosen wrongly, not a machine that fails
    errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EEXIST,
}  # fmt: skip


class Terminated(BaseException):
    """SIGTERM has come: `ray job stop`, a batch system's end of time, a shutdown."""


def run_job(main: Callable[[list[str]], int], arguments: Sequence[str]) -> int:
    """Run the main function of a job and return its exit code; any failure is said on standard error."""
    global _in_job
    _in_job = True
    hear_signals()
    try:
        code = main(list(arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except SystemExit as end:  # of --help, or of Ray's own answer to SIGTERM while it starts
        return int(end.code or 0) if end.code != signal.SIGTERM else _said(Terminated())
    except BaseException as error:
        return _said(error)


def _said(error: BaseException) -> int:
    """Say what failed; returns the exit code."""
    line, code = explain(error)
    if code == DEFECT:
        traceback.print_exception(error)
    note(f"error: {line[:LINE]}")
    return code


_in_job = False  # in a library's or a test's process signals are not ours
ONE_MOMENT = 1.0  # seconds in which a second Ctrl-C is an echo of the first, from a group of processes


def hear_signals() -> None:
    """Have SIGTERM end a job as Ctrl-C does, tidily. Ray takes SIGTERM for itself when it starts: call it after."""
    if not _in_job or threading.current_thread() is not threading.main_thread():
        return
    last = -ONE_MOMENT

    def terminate(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: the end has begun
        raise Terminated

    def interrupt(*_: object) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before >= ONE_MOMENT:
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as what a script starts with `&` has it
        signal.signal(signal.SIGINT, interrupt)


def explain(error: BaseException) -> tuple[str, int]:
    """Return one line that says what failed and what to do, and the exit code."""
    error = root_of(error)
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return f"stopped; {GOES_ON}", INTERRUPTED
    if isinstance(error, Terminated):
        return f"terminated; {GOES_ON}", TERMINATED
    if (line := of_memory(error) or of_ray(error)) is not None:
        return line, MACHINE
    if isinstance(error, OSError):
        code = MISTAKE if numbered(error).errno in CHOICES else MACHINE
        return f"{of_system(error)}; then {GOES_ON}", code
    return (
        f"this is a defect of isd_ray ({type(error).__name__}): please report it with the lines above",
        DEFECT,
    )


def root_of(error: BaseException) -> BaseException:
    """Return what a task of Ray's raised, from under what Ray wraps around it; other errors as they are."""
    while "ray" in sys.modules and isinstance(error, sys.modules["ray"].exceptions.RayTaskError):
        cause = getattr(error, "cause", None)
        if not isinstance(cause, BaseException):
            return error
        error = cause
    return error


def numbered(error: OSError) -> OSError:
    """Return the error with the system's number; Arrow leaves it out where a folder is read as a file."""
    if error.errno is None and first_line(error).endswith(" is a directory"):
        return OSError(errno.EISDIR, os.strerror(errno.EISDIR), error.filename)
    return error


def of_system(error: OSError) -> str:
    """Return what the operating system or a store refused, and the remedy."""
    error = numbered(error)
    place = f"{os.fspath(error.filename)}: " if isinstance(error.filename, str | os.PathLike) else ""
    said = error.strerror or first_line(error)
    remedy = REMEDIES.get(error.errno or 0, "mend that")
    return f"{place}{said} ({remedy})" if remedy != "mend that" else f"{place}{said}; {remedy}"


def of_memory(error: BaseException) -> str | None:
    """Return the line of an error that means that memory ran out, of the machine or of a GPU; else None."""
    told = first_line(error)
    full = isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "ArrowMemoryError")
    if not full and not (isinstance(error, RuntimeError) and "allocate memory" in told):
        return None
    return f"out of memory ({told[:300] or 'no more is known'}); use a smaller batch, or fewer workers"


def of_ray(error: BaseException) -> str | None:
    """Return the line of an error of Ray itself, not of what it ran; else None."""
    if "ray" not in sys.modules:
        return None
    import ray

    ours = isinstance(error, ray.exceptions.RayTaskError)  # what a task ran has failed, not Ray
    if ours or not isinstance(error, ray.exceptions.RayError):
        return None
    return f"Ray: {why_it_died(str(error))}; {GOES_ON}"


def why_it_died(text: str) -> str:
    """Return the one sentence of Ray's message on a dead process that says why."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason was given"]
    first = lines[-1] if "Traceback" in text else lines[0]  # a traceback ends with the error
    telling = next((line for line in lines if " because " in line), first)
    sentence, *_ = telling.split(". ")
    return f"its process ended: {sentence.rstrip('.')}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip().splitlines() or [""])[0]


def broken(place: str, error: OSError) -> UserError:
    """Return the error of a place that cannot be read or written: a wrong choice, or a failure of the machine."""
    error = numbered(error)
    kind = UserError if error.errno in CHOICES else MachineError
    return kind(f"{place}: {of_system(OSError(error.errno, error.strerror or first_line(error)))}")
