"""A small process above each job, for an end that leaves Python no word.

Ray's core ends the driver from C++ where its raylet or GCS dies, with tens of lines of its own; the
kernel ends it where memory is out. So a job works in a child: this process passes signals on to it, and
says one line where it ended without saying one. What native code prints meanwhile (on file descriptor 2)
goes to a file that this line names; the job's own lines go where they always went.
"""

import ctypes
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from isd_ray.ending import DEFECT, GOES_ON, MACHINE, run_job
from isd_ray.messages import note

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
FROM_KERNEL = 0x80  # si_code of Ctrl-C on a terminal, which reaches the child by itself
PR_SET_PDEATHSIG = 1


def run(main: Callable[[list[str]], int], arguments: Sequence[str]) -> int:
    """Run a job in a child and return its exit code; elsewhere than on Linux in this process."""
    if not sys.platform.startswith("linux"):
        return run_job(main, arguments)
    log, name = tempfile.mkstemp(prefix="isd_ray_", suffix=".log")
    told, tells = os.pipe()
    before, parent = signal.pthread_sigmask(signal.SIG_BLOCK, {*PASSED_ON, signal.SIGCHLD}), os.getpid()
    child = os.fork()
    if not child:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has died before that
            os._exit(DEFECT)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
        os.dup2(log, 2)
        code = run_job(main, arguments)
        os.write(tells, bytes([code]))
        return code
    os.close(tells)
    status = _wait(child)
    if said := os.read(told, 1):
        Path(name).unlink(missing_ok=True)
        return said[0]
    return _say_end(status, Path(name))


def _wait(child: int) -> int:
    """Pass signals on until the child has ended; returns its wait status."""
    while True:
        info = signal.sigwaitinfo({*PASSED_ON, signal.SIGCHLD})
        if info.si_signo != signal.SIGCHLD and info.si_code != FROM_KERNEL:
            os.kill(child, info.si_signo)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status


def _say_end(status: int, log: Path) -> int:
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGKILL:
        how = "it was killed from outside, perhaps for lack of memory"
    elif code < 0:
        how = f"it was ended by {signal.Signals(-code).name}"
    else:
        how = "Ray's core ended it, as it does where a process of Ray's on this machine has died"
    where = f"its last words: {log}; " if log.stat().st_size else ""
    note(f"error: the job's process ended without a word: {how}; {where}{GOES_ON}")
    return MACHINE
