"""Ray Train, as this project uses it: the calls to its API, which still changes between versions, stand here."""

import os
import sys
import threading
from collections.abc import Callable
from typing import Any, TextIO, cast

import ray
import torch
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer, get_device
from ray.util.placement_group import PlacementGroup, PlacementGroupID, remove_placement_group
from ray.util.queue import Queue

from isd_ray.config import Config
from isd_ray.errors import UserError
from isd_ray.train.folder import RunFolder
from isd_ray.train.state import Worker

Tell = Callable[[dict[str, Any]], bool]  # a row of validation.jsonl -> stop here?


class WorkerDied(Exception):
    """The process of a worker ended before its work did; says why in one line."""


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
    return "cpu"


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
    printer = None if config.train.workers == 0 else Printer(tell)
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
        function(config, RunFolder(folder.uri), worker)

    train = config.train
    threads = train.threads or default_threads(train.workers)
    resources = {"CPU": 1.0, "GPU": train.gpus_per_worker} if device == "cuda" else {"CPU": float(threads)}
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
    except RayActorError as error:  # Ray Train's controller, which is a process of its own
        raise WorkerDied(why_it_died(str(error))) from None
    finally:
        if printer:
            printer.close()
        folder.remove_folder("ray")  # Ray Train's own notes; ours are the checkpoints


class Outbox:
    """A worker's end of the way to the user: what is written here the driver prints."""

    def __init__(self, lines: Queue, answers: Queue | None = None) -> None:
        self.lines, self.answers = lines, answers

    def write(self, text: str) -> None:
        """Send the text; training goes on without waiting for it to be printed."""
        self.lines.actor.put_nowait.remote(text)  # type: ignore[attr-defined]

    def tell(self, numbers: dict[str, Any]) -> bool:
        """Send numbers, which have a `step`, on the same way and wait for the answer: whether to stop."""
        assert self.answers is not None
        self.lines.actor.put_nowait.remote(numbers)  # type: ignore[attr-defined]
        while True:
            step, stop = self.answers.get()
            if step == numbers["step"]:  # else meant for a worker that died before it could hear it
                return stop

    def flush(self) -> None:
        """Nothing is held back."""

    def isatty(self) -> bool:
        """A live line would not survive the way."""
        return False


class Printer:
    """The driver's end: prints the workers' lines as they come, free of the prefixes of Ray's own log.

    tell: takes the numbers that come on the same way.
    """

    def __init__(self, tell: Tell | None = None) -> None:
        self.lines, self.tell = Queue(actor_options={"num_cpus": 0}), tell
        self.answers = Queue(actor_options={"num_cpus": 0}) if tell else None
        self.thread = threading.Thread(target=self._print, daemon=True)
        self.thread.start()

    def _print(self) -> None:
        while (sent := self.lines.get()) is not None:
            if isinstance(sent, str):
                print(sent, end="", file=sys.stderr, flush=True)
            elif self.tell is not None and self.answers is not None:
                stop = False
                try:
                    stop = self.tell(sent)
                finally:
                    self.answers.put((sent["step"], stop))

    def close(self) -> None:
        """Print what is left and stop."""
        self.lines.put(None)
        self.thread.join()
        self.lines.shutdown()
        if self.answers is not None:  # an empty queue is false
            self.answers.shutdown()


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


def _cause(error: Exception) -> Exception:
    """Find what broke: a mistake of the user's on any worker first, then a death, else the first worker's error.

    Where one worker dies, the others fail at the connection to it.
    """
    failures = list(getattr(error, "worker_failures", {}).values())
    causes = [getattr(failure, "cause", None) or failure for failure in failures]
    mistakes = [cause for cause in causes if isinstance(cause, UserError)]
    looked = [getattr(cause, "health_check_failure", None) for cause in causes]
    deaths = [WorkerDied(why_it_died(str(found))) for found in looked if found is not None]
    return (mistakes or deaths or causes or [error])[0]


def why_it_died(text: str) -> str:
    """Return the one sentence of Ray's message on a dead process that says why."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason was given"]
    first = lines[-1] if "Traceback" in text else lines[0]  # a traceback ends with the error
    telling = next((line for line in lines if " because " in line), first)
    sentence, *_ = telling.split(". ")
    return f"its process ended: {sentence.rstrip('.')}"
