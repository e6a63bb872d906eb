"""Ray Train, as this project uses it: the calls to its API, which still changes between versions, stand here."""

import os
import re
import sys
import threading
from collections.abc import Callable
from typing import Any, TextIO, cast

import ray
import torch
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
from ray.exceptions import RayActorError
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer, get_device
from ray.util.placement_group import PlacementGroup, PlacementGroupID, remove_placement_group

from isd_ray.config import Config
from isd_ray.ending import GOES_ON, root_of, why_it_died
from isd_ray.errors import MachineError, UserError
from isd_ray.train.folder import RunFolder
from isd_ray.train.lines import Outbox, Printer, Tell
from isd_ray.train.state import Worker

NOTES = ".ray-"  # beginning of the folder of Ray Train's or Tune's own notes; ours are the checkpoints
START_SECONDS = 60  # that Ray Train waits for room for all workers before it asks the cluster once more


class WorkerDied(MachineError):
    """The process of a worker ended before its work did; says why in one line."""


def choose_device(config: Config) -> str:
    """Return "cuda" or "cpu"; raises UserError when the workers ask for more than the cluster has.

    With `train.autoscale` more than the nodes that are up now may be asked for; where GPUs may come, the device must
    be said.
    """
    train, have = config.train, ray.cluster_resources()
    gpus, cpus = have.get("GPU", 0), _physical_cpus(have)
    hint = "use %s; or, where the cluster's autoscaler can bring them, --train.autoscale true"
    if train.autoscale:
        if train.device == "auto" and not gpus:
            raise UserError("--train.autoscale: no GPU is up now; say --train.device cuda, or cpu")
        return "cuda" if gpus and train.device == "auto" else train.device
    if train.device == "cuda" and not gpus:
        raise UserError(f"--train.device cuda: this cluster has no GPU; {hint % '--train.device cpu'}")
    if train.device != "cpu" and gpus:
        taken = train.workers * train.gpus_per_worker
        if taken > gpus:
            raise UserError(
                f"--train.workers {train.workers}: they take {taken:g} GPUs and this cluster has {gpus:g}; "
                f"{hint % 'fewer workers or a smaller --train.gpus_per_worker'}"
            )
        return "cuda"
    if train.workers > cpus:
        raise UserError(
            f"--train.workers {train.workers}: this cluster has {cpus:g} cores; {hint % f'at most {cpus:g}'}"
        )
    _require_cores(train.workers, train.threads)
    return "cpu"


def _require_cores(workers: int, threads: int) -> None:
    """Refuse threads that no node has cores for: Ray would wait for such a node for ever."""
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    most = max(
        (n for n in range(1, int(max(nodes)) + 1) if sum(cpus // n for cpus in nodes) >= workers), default=1
    )
    if workers and threads > most:
        raise UserError(
            f"--train.threads {threads}: {workers} workers with so many cores each do not fit on this cluster, whose "
            f"nodes have {', '.join(f'{cpus:g}' for cpus in sorted(nodes, reverse=True)[:8])}; use at most {most}"
        )


def default_threads(workers: int) -> int:
    """Return the torch threads of a CPU worker: its share of all cores but one, which data and Ray need.

    A thread too many costs more than it brings: a parallel region waits for its slowest thread.
    """
    cores = _physical_cpus(ray.cluster_resources())
    return max(1, int(cores - 1) // max(workers, 1))


def run_workers(
    function: Callable[[Config, RunFolder, Worker], None],
    config: Config,
    folder: RunFolder,
    device: str,
    tell: Tell | None = None,
) -> None:
    """Run `function` on every Ray Train worker; an error of a worker comes out as the error that it was.

    Raises WorkerDied where a process ended instead.
    tell: called here with what rank 0 tells; where it answers True, all workers stop training there.
    """
    train = config.train
    threads = train.threads or default_threads(train.workers)
    resources = {"CPU": 1.0, "GPU": train.gpus_per_worker} if device == "cuda" else {"CPU": float(threads)}
    asked = (
        f"{train.workers} workers with {' and '.join(f'{n:g} {unit}' for unit, n in resources.items())} each"
    )
    printer = None if train.workers == 0 else Printer(tell, waits_for=asked)
    lines, answers = (printer.lines, printer.answers) if printer else (None, None)
    direct = [None if printer else tell]  # a `tell` of this process does not travel to workers

    def worker_loop(_: dict[str, Any]) -> None:
        if device == "cpu":
            torch.set_num_threads(threads)
        if lines is None:
            worker = Worker(0, 1, torch.device(device), sys.stderr, direct[0])
        else:
            context, out = ray.train.get_context(), Outbox(lines, answers)
            where = get_device() if device == "cuda" else torch.device(device)
            rank, world = context.get_world_rank(), context.get_world_size()
            worker = Worker(rank, world, where, cast(TextIO, out), None if answers is None else out.tell)
            out.begin()
        function(config, RunFolder(folder.uri), worker)

    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(START_SECONDS)
    notes = folder.sub(new_notes(folder))
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
            storage_path=notes.path,
            storage_filesystem=notes.filesystem,
            failure_config=FailureConfig(
                max_failures=train.max_failures,
                controller_failure_limit=int(train.start_seconds // START_SECONDS),  # type: ignore[call-arg]
            ),
        ),
    )
    try:
        if printer:
            _in_thread(trainer.fit)
        else:
            trainer.fit()
    except ControllerError as error:
        found = (str(error.controller_failure).splitlines() or [""])[0]
        if (
            isinstance(error.controller_failure, TimeoutError)
            or "imeout" in type(error.controller_failure).__name__
        ):
            found = f"waited {train.start_seconds:g} s for room for {asked}; see `ray status`, or raise"
            raise MachineError(f"{found} --train.start_seconds; {GOES_ON}") from None
        raise MachineError(f"Ray Train: {found}; {GOES_ON}") from None
    except TrainingFailedError as error:
        raise _cause(error) from None
    except RayActorError as error:  # Ray Train's controller, which is a process of its own
        raise WorkerDied(f"Ray Train's controller: {why_it_died(str(error))}; {GOES_ON}") from None
    finally:
        if printer:
            printer.close()
        remove_notes(folder)


def new_notes(folder: RunFolder) -> str:
    """Return a name for the notes of Ray that no file of anybody's has."""
    remove_notes(folder)  # of an attempt that was killed
    return f"{NOTES}{os.urandom(4).hex()}"


def remove_notes(folder: RunFolder) -> None:
    """Remove Ray's notes of this attempt and of those before it, which nobody reads."""
    for name in folder.names(files=False):
        if re.fullmatch(rf"{re.escape(NOTES)}[0-9a-f]{{8}}", name):
            folder.remove_folder(name)


def _in_thread(call: Callable[[], Any]) -> None:
    """Run `call` in a thread and wait: a Ctrl-C or SIGTERM then ends the wait, and with it this process, at once.

    In the main thread Ray Train takes Ctrl-C for itself, and ends the process without a word and with exit code 1.
    """
    failed: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)  # a join without a limit would not hear a signal on every system
    if failed:
        raise failed[0]


def computes_here(config: Config, device: str) -> bool:
    """Tell whether this process has the device: every one has a CPU, and without workers it trains on its own GPU."""
    return device == "cpu" or (config.train.workers == 0 and torch.cuda.is_available())


def release_orphans() -> None:
    """Free the CPUs and GPUs of workers whose run died without ending them; other jobs' are left alone.

    Ray Train reserves them in a placement group that lasts as long as this driver. Its own cleaner asks the dashboard
    whether the run still lives, and a local Ray has none (Ray 2.60).
    """
    job = ray.get_runtime_context().get_job_id()
    for group in ray._private.state.state._connect_and_get_accessor().get_placement_group_table():
        data = PlacementGroupTableData.FromString(group)
        if data.creator_job_id.hex() != job or data.state == PlacementGroupTableData.REMOVED:
            continue
        by_actor = not ray.ActorID(data.creator_actor_id).is_nil()  # else it is the driver's own, which lives
        if by_actor and data.creator_actor_dead:
            remove_placement_group(PlacementGroup(PlacementGroupID(data.placement_group_id)))


def run_on(here: bool, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in this process, or else in a task that takes a GPU."""
    if here:
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


def _cause(error: BaseException) -> BaseException:
    """Find what broke: a mistake of the user's on any worker first, then a death, else the first worker's error.

    Where one worker dies, the others fail at the connection to it.
    """
    failures = list(getattr(error, "worker_failures", {}).values())
    causes: list[BaseException] = [
        root_of(getattr(failure, "cause", None) or failure) for failure in failures
    ]
    mistakes = [cause for cause in causes if isinstance(cause, UserError)]
    looked = [getattr(cause, "health_check_failure", None) for cause in causes]
    deaths = [
        WorkerDied(f"a worker: {why_it_died(str(found))}; {GOES_ON}") for found in looked if found is not None
    ]
    return (mistakes or deaths or causes or [error])[0]
