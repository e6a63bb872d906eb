"""`make fuzz`: the whole suite with one fresh seed after another, until the time is over.

python tests/fuzz/repeat.py --minutes 30

Prints the cases at each door, every kind of failure once, and the command that repeats it. Exit code 1
where there was one.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
SHOWN = 400  # characters of what is known of a case
Failure = dict[str, Any]


def repeat(seed: int, report: Path) -> list[str]:
    """Run the suite once; its failures and counts go to the report. Returns what else went wrong."""
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-q", "-p", "no:cacheprovider", "--tb=short"]
    variables = {"ISD_RAY_FUZZ_SEED": str(seed), "ISD_RAY_FUZZ_REPORT": str(report)}
    variables["ISD_RAY_FUZZ_SHARE"] = "1"
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode == 0:
        return []
    last = (done.stdout + done.stderr).strip()[-2000:]
    return [f"seed {seed}: pytest ended with {done.returncode}:\n{last}"]


def read(report: Path, seed: int) -> tuple[Counter[str], list[Failure]]:
    """Return cases by door, and failures with their seed."""
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    counts = Counter[str]()
    for line in lines:
        counts.update(line.get("counts", {}))
    return counts, [line | {"seed": seed} for line in lines if "counts" not in line]


def kind(failure: Failure) -> tuple[str, ...]:
    """Return what makes failures alike: the door, the place, and what was promised."""
    return failure["door"], failure["where"], *(fault[:20] for fault in failure["faults"])


def describe(failure: Failure, times: int) -> str:
    """Return what failed, and how to see it again."""
    test = f"ISD_RAY_FUZZ_SEED={failure['seed']} {sys.executable} -m pytest '{failure['test']}'"
    case = failure["about"] if failure["about"] != "''" else failure["arguments"]
    said = [f"{failure['door']}: {'; '.join(failure['faults'])} ({times} times)"]
    said += [f"  {failure['where']}"] if failure["where"] else []
    return "\n".join([*said, f"  case: {case[:SHOWN]}", f"  said: {failure['err'][-SHOWN:]!r}", f"  {test}"])


def main() -> int:
    """Run until the time is over."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--minutes", type=float, default=30.0)
    end = time.monotonic() + 60 * options.parse_args().minutes
    first = random.SystemRandom().randrange(1, 10**9)
    counts, times, smallest = Counter[str](), Counter[tuple[str, ...]](), dict[tuple[str, ...], Failure]()
    others: list[str] = []
    turn = 0
    with tempfile.TemporaryDirectory(prefix="isd_ray_fuzz_") as folder:
        while time.monotonic() < end:
            seed, report = first + turn, Path(folder, f"{turn}.jsonl")
            report.touch()
            others += repeat(seed, report)
            found, failures = read(report, seed)
            counts += found
            for failure in failures:
                times[kind(failure)] += 1
                known = smallest.setdefault(kind(failure), failure)
                if len(failure["about"]) < len(known["about"]):
                    smallest[kind(failure)] = failure
            print(f"seed {seed}: {found.total():,} cases, {len(failures)} failures", flush=True)
            turn += 1
    for door, number in sorted(counts.items()):
        print(f"{number:9,}  {door}")
    for failure in smallest.values():
        print(describe(failure, times[kind(failure)]))
    for text in others:
        print(text)
    kinds = f"{len(smallest)} kinds of failures" if smallest else "no failure"
    print(
        f"{counts.total():,} cases at {len(counts)} doors with seeds {first} to {first + turn - 1}: {kinds}"
    )
    return 1 if smallest or others else 0


if __name__ == "__main__":
    sys.exit(main())
