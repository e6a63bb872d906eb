"""Why a run of many did not get to its end, in one line and beside it: the others go on."""

import traceback

from isd_ray.ending import DEFECT, explain, first_line
from isd_ray.errors import MachineError, UserError
from isd_ray.train.folder import RunFolder

FAILURE = "failure.json"


def leave_failure(folder: RunFolder, error: Exception) -> str:
    """Write reason and traceback of the exception that is being handled into the run's folder; return the reason."""
    reason = reason_of(error)
    folder.write_json(FAILURE, {"reason": reason, "traceback": traceback.format_exc()})
    return reason


def read_failure(folder: RunFolder) -> str | None:
    """Return why a run failed, as it stands in its folder; None where it did not."""
    if not folder.exists(FAILURE):
        return None
    try:
        found = folder.read_json(FAILURE)
    except MachineError:
        raise
    except UserError as error:
        return str(error)
    reason = found.get("reason") if isinstance(found, dict) else None
    return reason if isinstance(reason, str) else f"{folder.place(FAILURE)} does not say why"


def reason_of(error: Exception) -> str:
    """Return in one line why a run failed."""
    line, code = explain(error)
    return f"{type(error).__name__}: {first_line(error)}" if code == DEFECT else line
