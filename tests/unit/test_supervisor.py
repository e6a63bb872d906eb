"""However a job ends, it ends with one word, of its own or its supervisor's, and leaves nothing behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

JOBS = Path(__file__).parents[2] / "jobs"

CODE = """
import ctypes, os, signal, subprocess, sys, threading, time
from isd_ray.supervisor import run
def main(arguments):
    print(os.getpid(), flush=True)
    print("ours", file=sys.stderr)
    os.write(2, b"native words\\n")
    exec(arguments[0])
    return 0
sys.exit(run(main, sys.argv[1:]))
"""


def job(code: str, **more: Any) -> subprocess.Popen:
    """Start a job whose main function runs this code, after its number and two lines on standard error."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | {"text": True} | more
    return subprocess.Popen([sys.executable, "-c", CODE, code], **pipes)


def alive(number: int) -> bool:
    """Return whether a process is there and has not ended."""
    try:
        return "State:\tZ" not in Path(f"/proc/{number}/status").read_text()
    except OSError:
        return False


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
    assert len([line for line in lines if line.startswith("error: ")]) == (word is not None)
    assert len(lines) <= 3
    assert word is None or word in lines[1]
    assert "native words" not in err
    logs = [Path(found) for found in re.findall(r"/\S+isd_ray_\w+\.log", err)]
    assert len(logs) == (exit_code == 3)
    for log in logs:
        assert log.read_text().startswith("native words\n")
        log.unlink()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("group", [False, True])
def test_signals_reach_the_job_once(sent, code, group):
    with job("time.sleep(60)", start_new_session=True) as process:
        process.stdout.readline()
        (os.killpg if group else os.kill)(process.pid, sent)
        assert process.wait(30) == code
        assert process.stderr.read().count("the same command goes on") == 1


def test_the_job_dies_with_its_supervisor():
    with job("time.sleep(60)") as process:
        child = int(process.stdout.readline())
        process.kill()
    end = time.monotonic() + 10
    while alive(child):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_what_rays_threads_print_stays_out_of_sight():
    code = "t = threading.Thread(target=print, args=['(raylet) dump'], name='ray_listen')\n"
    out, err = (process := job(f"{code}t.start(); t.join(); print('end')")).communicate(timeout=60)
    assert (process.returncode, out.splitlines()[1:], err) == (0, ["end"], "ours\n")


@pytest.mark.parametrize("end", ["pass", "raise KeyboardInterrupt", "os._exit(1)"])
def test_nothing_that_a_job_has_started_outlives_the_command(end):
    none = "stdin=-3, stdout=-3, stderr=-3, start_new_session=True"
    code = f"print(subprocess.Popen(['sleep', '300'], {none}).pid, flush=True)\n{end}"
    out, err = job(code).communicate(timeout=60)
    assert not alive(int(out.splitlines()[1]))
    for log in re.findall(r"/\S+isd_ray_\w+\.log", err):
        Path(log).unlink()


def test_signals_while_it_ends_change_nothing():
    """Whatever comes once the job has said how it ends: Ray and Python tidy up undisturbed."""
    code = "import atexit\natexit.register(lambda: [os.write(1, b'ending\\n'), sys.stdin.read()])"
    with job(code) as process:
        process.stdout.readline()
        assert process.stdout.readline() == "ending\n"
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        process.stdin.close()
        assert process.wait(30) == 0
        assert process.stderr.read() == "ours\n"


@pytest.mark.parametrize("name", ["pretrain", "sweep", "compare", "evaluate", "embed", "make_shards"])
def test_a_job_hears_signals_before_it_loads_what_is_large(name):
    """What is imported before somebody listens: a Ctrl-C meanwhile would be a traceback."""
    code = f"import runpy, sys; runpy.run_path({str(JOBS / name)!r} + '.py')\n"
    code += "print(*{'torch', 'ray', 'pyarrow', 'pydantic'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
