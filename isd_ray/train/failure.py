"""Why a run of many did not get to its end, in one line and beside it: the others go on."""

import traceback

import torch

from isd_ray.errors import UserError
from isd_ray.train.cluster import WorkerDied
from isd_ray.train.folder import RunFolder

FAILURE = "failure.json"


def leave_failure(folder: RunFolder, error: Exception) -> str:
    """Write reason and traceback of the exception that is being handled into the run's folder; return the reason."""
    reason = reason_of(error)
    folder.write_json(FAILURE, {"reason": reason, "traceback": traceback.format_exc()})
    return reason


def reason_of(error: Exception) -> str:
    """Say in one line why a run failed."""
    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, UserError | WorkerDied):
        return first
    full = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "allocate memory" in first
    return f"out of memory: {first}" if full else f"{type(error).__name__}: {first}"
