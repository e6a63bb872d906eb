"""A job that ends without a word of its own ends with one of its supervisor's."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CODE = """
import ctypes, os, signal, sys, time
from isd_ray.supervisor import run
def main(arguments):
    print(os.getpid(), flush=True)
    print("ours", file=sys.stderr)
    os.write(2, b"native words\\n")
    exec(arguments[0])
    return 0
sys.exit(run(main, sys.argv[1:]))
"""


def job(code: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", CODE, code], **pipes)


@pytest.mark.parametrize(
    ("code", "exit_code", "word"),
    [
        ("", 0, None),
        ("raise MemoryError", 3, "out of memory"),
        ("os._exit(1)", 3, "Ray's core ended it"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 3, "killed from outside"),
        ("ctypes.string_at(0)", 3, "SIGSEGV"),
    ],
)
def test_the_end_of_a_job_is_one_line(code, exit_code, word):
    _, err = (process := job(code)).communicate(timeout=60)
    lines = err.splitlines()
    assert process.returncode == exit_code
    assert lines[0] == "ours"
    assert len(lines) == (1 if word is None else 2)
    assert word is None or word in lines[1]
    assert "native words" not in err
    if "its last words: " in err:
        log = Path(lines[1].split("its last words: ")[1].split(";")[0])
        assert "native words" in log.read_text()
        log.unlink()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("group", [False, True])
def test_signals_reach_the_job_once(sent, code, group):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    command = [sys.executable, "-c", CODE, "time.sleep(60)"]
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.readline()
        (os.killpg if group else os.kill)(process.pid, sent)
        assert process.wait(30) == code
        assert process.stderr.read().count("the same command goes on") == 1


def test_the_job_dies_with_its_supervisor():
    with job("time.sleep(60)") as process:
        child = int(process.stdout.readline())
        process.kill()
    end = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "State:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
