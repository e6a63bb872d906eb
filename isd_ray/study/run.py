"""A whole study, from the file to the report; given again, it goes on where it was stopped."""

import time
from collections.abc import Mapping
from typing import Any

import yaml

from isd_ray import session
from isd_ray.config import flatten, merge, validate
from isd_ray.ending import GOES_ON, first_line
from isd_ray.errors import MachineError, UserError
from isd_ray.messages import say
from isd_ray.room import local_cpus, room
from isd_ray.study import report, results, work
from isd_ray.study.check import Plan, check
from isd_ray.study.spec import Cell
from isd_ray.train.claim import claimed
from isd_ray.train.folder import RunFolder
from isd_ray.train.result import read_result
from isd_ray.train.trainer import run_uri


def compare(
    content: Mapping[str, Any],
    name: str,
    output: str = "runs",
    given: Mapping[str, Any] | None = None,
    report_only: bool = False,
) -> results.Outcome:
    """Run the cells of a study that are not finished yet, and write what they say into `output`/`name`.

    content: of the study's file. given: options of every run by dotted name, which win over the file's. report_only:
    run nothing, report what is there. Raises UserError, which lists all faults, before anything runs.
    """
    folder = RunFolder(run_uri(validate({"name": name, "output": output})))
    session.start_ray((given or {}).get("address"), _local_cpus(content, given or {}))
    plan = check(content, given)
    try:
        outcome = _compared(plan, folder, name, report_only)
    except OSError as error:
        raise MachineError(f"{folder.uri}: {first_line(error)}; mend that, and {GOES_ON}") from error
    _print_outcome(outcome, folder)
    return outcome


def _compared(plan: Plan, folder: RunFolder, name: str, report_only: bool) -> results.Outcome:
    """Run and report in the folder, which no other process may work on meanwhile."""
    with claimed(folder, "study"):
        work.check_cells(plan, folder)
        if not report_only:
            _run(plan, folder)
        outcome = results.collect(plan, folder)
        if not outcome.finished:
            reasons = sorted({run.failure for run in outcome.failed if run.failure})
            raise UserError(f"{folder.uri}: no cell is finished ({'; '.join(reasons) or 'none was started'})")
        results.write(outcome, folder)
        report.write(outcome, folder, name)
    return outcome


def _local_cpus(content: Mapping[str, Any], given: Mapping[str, Any]) -> int:
    """Return the CPUs that a Ray of our own must have. The file is not checked yet: what is no number counts as one."""
    resources, config = content.get("resources"), content.get("config")
    wanted = resources if isinstance(resources, Mapping) else {}
    options = flatten(merge(config if isinstance(config, Mapping) else {}, given))
    cpus, concurrent, workers = (
        number if isinstance(number, int) and number > 0 else None
        for number in (wanted.get("cpus"), wanted.get("concurrent"), options.get("train.workers"))
    )
    return local_cpus("cell", cpus or 1, concurrent, workers or 0, options.get("address"))


def _run(plan: Plan, folder: RunFolder) -> None:
    resources = plan.study.resources
    trains = [plan.config(cell).train for cell in plan.cells]
    workers, autoscale = max(t.workers for t in trains), any(t.autoscale for t in trains)
    concurrent, gpus = room("cell", resources.cpus, resources.gpus, resources.concurrent, workers, autoscale)
    folder.write("study.yaml", yaml.safe_dump(plan.written(), sort_keys=False).encode())
    say(f"study folder: {folder.uri}")
    left = work.jobs(plan, folder)
    say(f"{len(plan.cells)} cells, {len(left)} to run, {concurrent} at once")
    work.run(plan, folder, concurrent, gpus, _Board(plan, folder, len(left)))


class _Board:
    """Says, a line an event, what has happened and how long the rest may take."""

    def __init__(self, plan: Plan, folder: RunFolder, left: int) -> None:
        self.plan, self.folder, self.left, self.total = plan, folder, left, left
        self.began = time.monotonic()

    def __call__(self, event: str, cell: Cell, failure: str | None) -> None:
        """Print one event."""
        seconds = time.monotonic() - self.began
        if event == "started":
            say(f"[{seconds:6.0f} s] {cell.name} starts")
            return
        self.left -= 1
        rest = seconds / (self.total - self.left) * self.left
        about = f"; {self.left} left, about {_duration(rest)}" if self.left else ""
        say(
            f"[{seconds:6.0f} s] {cell.name}: {f'FAILED: {failure}' if failure else self.numbers(cell)}{about}"
        )

    def numbers(self, cell: Cell) -> str:
        """Return the study's metrics of a finished cell as text."""
        result = read_result(work.cell_folder(self.folder, cell))
        parts = []
        for metric in self.plan.study.metrics:
            network, name = metric.split(".")
            value = result["metrics"].get(network, {}).get(name)
            parts.append(f"{metric} {'-' if value is None else f'{value:.1f}'}")
        return ", ".join(parts)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _print_outcome(outcome: results.Outcome, folder: RunFolder) -> None:
    """Say what the report says first, what failed, and where everything lies."""
    for sentence in report.verdict(outcome):
        say(f"- {sentence}")
    for run in outcome.failed:
        say(f"failed: {run.cell.name}: {run.failure}")
    say(f"results: {folder.place(results.FILE)} and {folder.place(report.FOLDER, 'index.html')}")
