"""How many cases, and which: the same ones every time, until another seed is asked for."""

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, seed, settings

SEED = int(os.environ.get("ISD_RAY_FUZZ_SEED", "0"))
SHARE = float(os.environ.get("ISD_RAY_FUZZ_SHARE", "0.37"))  # of all cases: two minutes


def fuzz(cases: int, **strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test with so many cases, drawn from strategies by the name of an argument."""
    wanted = settings(
        max_examples=max(1, round(cases * SHARE)),
        deadline=None,  # doors.py has its own, of the processor's time
        database=None,  # what was found before must not change what is tried now
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    return lambda test: seed(SEED)(wanted(given(**strategies)(test)))
