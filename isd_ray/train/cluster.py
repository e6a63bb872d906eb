"""Ray, as this project uses it: every call to an API that still changes between versions stands here."""

import os
import sys
from collections.abc import Callable
from typing import Any

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else each line of a worker appears twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the controller's poll; the default of 2 s delays start and end
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # hundreds of lines in a job's log
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
for _name, _value in QUIET.items():  # read by Ray at import
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
from ray.exceptions import RayError  # noqa: E402
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError  # noqa: E402
from ray.train.torch import TorchTrainer, get_device  # noqa: E402

from isd_ray.config import Config  # noqa: E402
from isd_ray.errors import UserError  # noqa: E402
from isd_ray.train.folder import RunFolder  # noqa: E402
from isd_ray.train.state import Worker  # noqa: E402

OBJECT_STORE_BYTES = 2 * 2**30
DATA_CPUS = 2  # logical CPUs of a local Ray beyond the workers', so that data tasks never wait for them


def inside_job() -> bool:
    """Tell whether this process was started by `ray job submit`: its working folder is then a throw-away copy."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def start_ray(address: str | None, workers: int) -> None:
    """Connect to the cluster, or start a local Ray; nothing happens where this process has one already."""
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address, log_to_driver=True)
        except (ConnectionError, RayError, ValueError) as error:
            raise UserError(f"Ray at {address}: {error}; start it with 'ray start --head'") from None
        return
    os.environ["PYTHONPATH"] = os.pathsep.join(
        p for p in sys.path if p
    )  # workers import what this process does
    ray.init(
        num_cpus=max(os.cpu_count() or 1, workers + DATA_CPUS),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level="error",
    )


def choose_device(config: Config) -> str:
    """Return "cuda" or "cpu"; raises UserError when the workers ask for more than the cluster has."""
    train, have = config.train, ray.cluster_resources()
    gpus, cpus = have.get("GPU", 0), _physical_cpus(have)
    if train.device == "cuda" and not gpus:
        raise UserError("--train.device cuda: this cluster has no GPU; use --train.device cpu")
    if train.device != "cpu" and gpus:
        if train.workers * train.gpus_per_worker > gpus:
            raise UserError(
                f"--train.workers {train.workers}: they take {train.workers * train.gpus_per_worker:g} GPUs and this "
                f"cluster has {gpus:g}; use fewer workers or a smaller --train.gpus_per_worker"
            )
        return "cuda"
    if train.workers > cpus:
        raise UserError(
            f"--train.workers {train.workers}: this cluster has {cpus:g} cores; use at most {cpus:g}"
        )
    if train.sync_batch_norm:
        raise UserError("--train.sync_batch_norm true: torch has it on GPUs only; leave it out on CPU")
    return "cpu"


def run_workers(
    function: Callable[[Config, RunFolder, Worker], None], config: Config, folder: RunFolder, device: str
) -> None:
    """Run `function` on every Ray Train worker; an error of a worker comes out as the error that it was."""

    def worker_loop(_: dict[str, Any]) -> None:
        context = ray.train.get_context()
        where = get_device()
        function(
            config, RunFolder(folder.uri), Worker(context.get_world_rank(), context.get_world_size(), where)
        )

    train = config.train
    resources = {"CPU": 1.0} | ({"GPU": train.gpus_per_worker} if device == "cuda" else {})
    trainer = TorchTrainer(
        worker_loop,
        train_loop_config={},
        scaling_config=ScalingConfig(
            num_workers=train.workers,
            use_gpu=device == "cuda",
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=f"attempt-{os.getpid()}-{os.urandom(4).hex()}",  # a name used before would resume Ray's own state
            storage_path=f"{folder.uri}/ray",
            failure_config=FailureConfig(max_failures=train.max_failures),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _cause(error) from None


def run_on(device: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function where the device is: in this process on CPU, in a task that takes a GPU otherwise."""
    if device == "cpu":
        return function(*arguments)
    task = ray.remote(num_gpus=1)(function)
    try:
        return ray.get(task.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError) else error) from None


def _physical_cpus(have: dict[str, float]) -> float:
    """Cores of the cluster. A local Ray of ours counts more logical CPUs than the machine has cores."""
    nodes = len([node for node in ray.nodes() if node["Alive"]])
    return min(have.get("CPU", 0), os.cpu_count() or 1) if nodes == 1 else have.get("CPU", 0)


def _cause(error: Exception) -> Exception:
    """Find what broke: a mistake of the user's on any worker first, else the first worker's error."""
    failures = list(getattr(error, "worker_failures", {}).values())
    causes = [getattr(failure, "cause", None) or failure for failure in failures]
    mistakes = [cause for cause in causes if isinstance(cause, UserError)]
    return (mistakes or causes or [error])[0]
