"""The cells of a study, run side by side: what is finished is never run again, what breaks is noted and left behind."""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import torch

from isd_ray.config import Config, validate
from isd_ray.data.catalog import Splits
from isd_ray.ending import why_it_died
from isd_ray.errors import MachineError, UserError, listed
from isd_ray.errors import shown as shown_value
from isd_ray.room import DRIVER_CPUS
from isd_ray.study.check import Plan
from isd_ray.study.faults import Faults
from isd_ray.study.pictures import make_pictures, read_pictures
from isd_ray.study.spec import Cell, Pictures
from isd_ray.study.subsets import opener
from isd_ray.train.cluster import WorkerDied, release_orphans
from isd_ray.train.failure import FAILURE, leave_failure
from isd_ray.train.folder import RunFolder, saved_config
from isd_ray.train.trainer import check_same, prepare_run, run_prepared

RESULT = "result.json"
TIDY_SECONDS = 2.0
HOW_FAST = (  # of evaluate: they change no number of a method
    "along",
    "baselines",
    "batch_size",
    "every",
    "workers",
    "keep_features",
    "transfer_root",
)
Notify = Callable[[str, Cell, str | None], None]  # ("started" | "ended", cell, why it failed)


@dataclass(frozen=True)
class Job:
    """One cell, and whether pictures of it are wanted."""

    cell: Cell
    pictures: bool


def cells_folder(folder: RunFolder) -> str:
    """Return where the runs of a study lie."""
    return folder.place("cells")


def cell_folder(folder: RunFolder, cell: Cell) -> RunFolder:
    """Return the run folder of a cell."""
    return folder.sub("cells", cell.name)


def shown(plan: Plan) -> list[Cell]:
    """Return the cells that pictures are made of: of every method, the first seed and split of each setting."""
    found: dict[tuple[Any, str], Cell] = {}
    for cell in plan.cells if plan.study.pictures.enabled else []:
        found.setdefault((cell.setting, cell.method), cell)
    return [cell for cell in found.values() if not cell.setting.control]


def check_cells(plan: Plan, folder: RunFolder) -> None:
    """Raise UserError for cells that were started or measured with other options than the study has now."""
    faults = Faults()
    for cell in plan.cells:
        run = cell_folder(folder, cell)
        if not run.exists("config.yaml"):
            if run.exists(RESULT):
                faults.add("config.yaml is gone; put it back, or remove that folder", run.uri)
            continue
        config = plan.config(cell, cells_folder(folder))
        try:
            check_same(config, run)
        except UserError as error:
            faults.add(f"{error} of the study, or remove that folder")
            continue
        if run.exists(RESULT):
            now = config.evaluate.model_dump(exclude=set(HOW_FAST))
            before = saved_config(run).evaluate.model_dump()
            changed = [
                f"evaluate.{k} was {shown_value(before[k])}, now {shown_value(v)}"
                for k, v in now.items()
                if before[k] != v
            ]
            if changed:
                faults.add(
                    f"it was measured otherwise ({listed(changed)}); remove its {RESULT} to measure anew",
                    run.uri,
                )
    faults.raise_if_any()


def jobs(plan: Plan, folder: RunFolder) -> list[Job]:
    """Return what is left to do."""
    wanted, left = set(shown(plan)), []
    for cell in plan.cells:
        run = cell_folder(folder, cell)
        classes = len(plan.facts[cell.subset].names)
        draw = cell in wanted and read_pictures(run, plan.study.pictures, classes) is None
        if draw or not run.exists(RESULT):
            left.append(Job(cell, draw))
    return left


def run(plan: Plan, folder: RunFolder, concurrent: int, gpus: float, notify: Notify) -> None:
    """Run what is left. A cell that fails, or whose process dies, is noted in its folder and ends nothing else."""
    waiting, tries = deque(jobs(plan, folder)), Counter[Cell]()
    live: dict[ray.ObjectRef, Job] = {}
    open_once = opener()
    while waiting or live:
        while waiting and len(live) < concurrent:
            job = waiting.popleft()
            notify("started", job.cell, None)
            try:
                live[_start(plan, folder, job, gpus, open_once)] = job
            except MachineError:
                raise
            except UserError as error:
                notify("ended", job.cell, leave_failure(cell_folder(folder, job.cell), error))
        if not live:
            continue
        done, _ = ray.wait(list(live), timeout=TIDY_SECONDS)
        release_orphans()  # of cells with workers that died: the next ones would wait for their place for ever
        if not done:
            continue
        job = live.pop(done[0])
        reason, died = _outcome(done[0])
        if died and tries[job.cell] < plan.study.resources.retries:
            tries[job.cell] += 1
            waiting.appendleft(job)
            continue
        if reason and not cell_folder(folder, job.cell).exists(FAILURE):
            cell_folder(folder, job.cell).write_json(FAILURE, {"reason": reason})
        notify("ended", job.cell, reason)


def _start(
    plan: Plan, folder: RunFolder, job: Job, gpus: float, open_once: Callable[[Config], Splits]
) -> ray.ObjectRef:
    """Fill the cell's folder and start its process. The definitions of data sets stay with the driver."""
    config = plan.config(job.cell, cells_folder(folder), gpus)
    run, splits = cell_folder(folder, job.cell), open_once(config)
    if run.exists(FAILURE):
        run.remove(FAILURE)  # of an attempt before this one
    if not run.exists(RESULT):
        prepare_run(config, splits)
    # With workers the driver takes next to nothing: they have a placement group of their own, which it could starve.
    workers, cpus = config.train.workers, plan.study.resources.cpus
    takes = {"num_cpus": DRIVER_CPUS} if workers else {"num_cpus": cpus, "num_gpus": gpus}
    task = ray.remote(**takes, max_retries=0)(run_cell)  # type: ignore[call-overload]
    wanted = plan.study.pictures.model_dump() if job.pictures else None
    return task.remote(config.model_dump(), run.uri, splits, wanted, plan.frequencies(job.cell.subset))


def run_cell(
    values: dict[str, Any], uri: str, splits: Splits, wanted: dict[str, Any] | None, counts: list[int]
) -> tuple[str | None, bool]:
    """Train, evaluate and draw one cell, in a process of its own.

    Returns why it failed, or None, and whether that is because the process of a Ray Train worker ended. A result that
    is there already is kept: then only the pictures are made.
    """
    config, folder = validate(values), RunFolder(uri)
    torch.set_num_threads(config.train.threads)
    try:
        if not folder.exists(RESULT):
            run_prepared(config, folder, splits, config.train.device)
        if wanted is not None:
            device = "cpu" if config.train.workers else config.train.device
            make_pictures(config, folder, splits, Pictures(**wanted), counts, device)
    except Exception as error:
        return leave_failure(folder, error), isinstance(error, WorkerDied)
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the next cell of this process needs the room
    return None, False


def _outcome(ended: ray.ObjectRef) -> tuple[str | None, bool]:
    """Return why a cell failed, or None, and whether that is because a process died."""
    try:
        return ray.get(ended)
    except ray.exceptions.RayError as error:
        return why_it_died(str(error)), True
