"""Whatever a job meets, it ends with one line and a code that says whose turn it is."""

import errno
import os
import signal
import subprocess
import sys

import pytest
import ray
import torch

from isd_ray.ending import explain, of_system, root_of, run_job
from isd_ray.errors import MachineError, UserError
from isd_ray.messages import Arguments, note, say

ENDS = [
    (UserError("--x 1: use 2"), 2, "--x 1: use 2"),
    (MachineError("store away"), 3, "store away"),
    (KeyboardInterrupt(), 130, "stopped; the same command goes on"),
    (MemoryError(), 3, "out of memory"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory."), 3, "out of memory"),
    (RuntimeError("[enforce fail] can't allocate memory: you tried"), 3, "out of memory"),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/x"), 3, "/data/x: No space left on device"),
    (PermissionError(errno.EACCES, "Permission denied", "/data/x"), 2, "/data/x: Permission denied"),
    (ConnectionResetError(errno.ECONNRESET, "reset"), 3, "reset; mend that"),
    (ray.exceptions.RayActorError(), 3, "Ray: its process ended"),
    (ray.exceptions.ObjectStoreFullError(), 3, "Ray: "),
]


@pytest.mark.parametrize(("error", "code", "said"), ENDS, ids=[type(e).__name__ for e, *_ in ENDS])
def test_every_failure_is_one_line_with_its_code(error, code, said, capsys):
    def main(_):
        raise error

    assert run_job(main, []) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {said}")
    assert printed.err.count("\n") == 1


def test_a_defect_of_ours_is_no_mistake_of_theirs(capsys):
    assert run_job(lambda _: [][1], []) == 70
    assert "IndexError" in capsys.readouterr().err


def test_what_is_said_has_no_control_characters(capsys):
    say("a\x1b[31m\nerror: forged\x00")
    note("b\r\u202ec")
    printed = capsys.readouterr()
    assert printed.out == "a\\x1b[31m\\nerror: forged\\x00\n"
    assert printed.err == "b\\r\\u202ec\n"


def test_mistakes_in_options_are_one_line(capsys):
    def main(arguments):
        parser = Arguments("What it does")
        parser.add_argument("--count", type=int)
        return parser.parse_args(arguments).count

    assert run_job(main, ["--count", "7"]) == 7
    assert run_job(main, ["--count", "x"]) == run_job(main, ["--cuont", "1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("--help lists the options" in line for line in lines)


def test_the_error_of_a_task_is_what_the_task_raised():
    cause = MachineError("the disk is full")
    assert root_of(ray.exceptions.RayTaskError("f", "Traceback ...", cause)) is cause
    assert explain(ray.exceptions.RayTaskError("f", "Traceback ...", cause)) == ("the disk is full", 3)


def test_a_path_is_named_where_the_system_knows_it():
    assert of_system(OSError(errno.EROFS, "Read-only file system", "/x")).startswith("/x: Read-only")


CODE = """
import signal, sys
from isd_ray.ending import run_job
def main(_):
    print("ready", flush=True)
    signal.pause()
sys.exit(run_job(main, []))
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_job_with_a_word(sent, code):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", CODE], **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(sent)
        assert process.wait(20) == code
        said = process.stderr.read()
    assert said.endswith("the same command goes on\n")
    assert said.count("\n") == 1


def test_a_reader_that_leaves_is_no_error():
    code = "import sys; from isd_ray.ending import run_job\n"
    code += "sys.exit(run_job(lambda _: [print(i) for i in range(99999)] and 0, []))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as job:
        job.stdout.readline()
        job.stdout.close()
        assert job.wait(20) == 0
        assert job.stderr.read() == b""
