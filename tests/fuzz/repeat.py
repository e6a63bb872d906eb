"""`make fuzz`: the fuzz suite again and again with fresh seeds, until the time is over.

Prints the seeds, how many cases there were, and how to repeat a run that failed.
"""

import argparse
import os
import re
import secrets
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent
CASES = re.compile(r"^ *([\d,]+)  cases at", re.MULTILINE)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--minutes", type=float, default=30.0)
    end = time.monotonic() + 60 * options.parse_args().minutes
    cases, failed, runs = 0, [], 0
    while time.monotonic() < end:
        seed = str(secrets.randbelow(2**31))
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(FOLDER)]
        done = subprocess.run(
            command, env=os.environ | {"ISD_RAY_FUZZ_SEED": seed}, capture_output=True, text=True
        )
        counted = sum(int(number.replace(",", "")) for number in CASES.findall(done.stdout))
        cases, runs = cases + counted, runs + 1
        print(f"seed {seed}: {counted:,} cases, exit code {done.returncode}", flush=True)
        if done.returncode:
            failed.append(seed)
            print(done.stdout[-6000:], flush=True)
    print(f"{cases:,} cases in {runs} runs, {len(failed)} of them with failures")
    for seed in failed:
        print(f"  ISD_RAY_FUZZ_SEED={seed} python -m pytest tests/fuzz")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
