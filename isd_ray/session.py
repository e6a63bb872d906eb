"""One Ray for every job: join the cluster that is there, or start a local one, quietly."""

import logging
import os
import sys
from pathlib import Path

import ray
from ray.exceptions import RayError

from isd_ray.ending import first_line, hear_signals
from isd_ray.errors import MachineError, UserError, printable

PACKAGE = Path(__file__).parent
OBJECT_STORE_BYTES = 2 * 2**30
DATA_CPUS = 2  # logical CPUs of a local Ray beyond the workers', so that data tasks never wait for them


def inside_job() -> bool:
    """Tell whether this process was started by `ray job submit`: its working folder is then a throw-away copy."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def is_local(address: str | None = None) -> bool:
    """Tell whether `start_ray` would start a Ray on this machine: there is none yet, and none is to be joined."""
    return not ray.is_initialized() and not address and not os.environ.get("RAY_ADDRESS")


def start_ray(address: str | None = None, workers: int = 0) -> None:
    """Join the cluster at `address` or RAY_ADDRESS, else start a local Ray with room for `workers` and data tasks.

    Nothing happens where this process has a Ray already. Workers can import this package everywhere: a job's working
    folder holds it, else it travels with the driver. Raises UserError where there is no Ray at the address.
    """
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        _join(address)
    else:
        _start(workers)
    hear_signals()


def _start(workers: int) -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        ray.init(
            address="local",  # else Ray would join a cluster that somebody else has started on this machine
            num_cpus=max(os.cpu_count() or 1, workers + DATA_CPUS),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.ERROR,
            log_to_driver=False,  # workers' lines for the user come through train.lines.Printer
        )
    except (RayError, RuntimeError, OSError, ValueError) as error:
        raise MachineError(
            f"Ray did not start on this machine ({first_line(error)[:300]}); free memory, processes or disk, and "
            "see the newest logs under the system's temporary folder, ray/session_latest/logs"
        ) from None


def _join(address: str) -> None:
    try:
        package = None if inside_job() else {"py_modules": [str(PACKAGE)]}
        ray.init(address=address, runtime_env=package, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RayError, ValueError, RuntimeError) as error:
        raise UserError(
            f"no Ray answers at {printable(address)[:200]} ({first_line(error)[:300]}); start one with 'ray start "
            "--head'"
        ) from None
