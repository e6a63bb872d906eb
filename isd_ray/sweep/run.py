"""A whole sweep, from the file to the report; given again, it goes on where it was stopped."""

from collections.abc import Mapping
from typing import Any

import yaml

from isd_ray import session
from isd_ray.config import flatten, merge, validate
from isd_ray.ending import GOES_ON
from isd_ray.errors import MachineError, UserError
from isd_ray.messages import say
from isd_ray.room import local_cpus, room
from isd_ray.sweep import report, results
from isd_ray.sweep.check import Plan, check, resolved
from isd_ray.sweep.journal import FILE
from isd_ray.sweep.live import Board, short
from isd_ray.sweep.search import Search
from isd_ray.sweep.space import Space
from isd_ray.train.claim import claimed
from isd_ray.train.folder import RunFolder
from isd_ray.train.trainer import FREE, FREE_SECTIONS, check_sizes, open_splits, run_uri
from isd_ray.train.validation import faults_along

# Parts of a space that may change when a sweep is continued: they say how much is tried and where.
FREE_PARTS = {"description", "confirm", "resources"}


def sweep(
    space: Space, name: str, output: str = "runs", given: Mapping[str, Any] | None = None
) -> results.Outcome:
    """Search a space and write what was found into `output`/`name`; returns it too.

    given: options of every run by dotted name, which win over the file's. Raises UserError for what cannot work,
    before anything starts.
    """
    folder = RunFolder(run_uri(validate({"name": name, "output": output})))
    plan = check(space, given)
    try:
        outcome = _searched(plan, folder, name)
    except OSError as error:  # from a task of Ray's, a whole traceback that ends with it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise MachineError(f"{folder.uri}: {reason}; mend that, and {GOES_ON}") from error
    print_outcome(plan, folder, outcome)
    return outcome


def _searched(plan: Plan, folder: RunFolder, name: str) -> results.Outcome:
    """Search and write everything into the folder, which no other process may work on meanwhile."""
    from isd_ray.sweep import tune

    with claimed(folder, "sweep"):
        check_same(plan, folder)
        resources, workers = plan.space.resources, int(plan.base["train"].get("workers", 0))
        address = plan.base.get("address")
        session.start_ray(
            address, local_cpus("trial", resources.cpus, resources.concurrent, workers, address)
        )
        config = resolved(plan, plan.default)
        splits = open_splits(config)
        check_sizes(config, splits.train)
        if faults := faults_along(plan.space.metrics, config, splits):
            raise UserError("goals: " + "; ".join(faults))
        if (text := plan.broken(plan.default, splits.train.num_rows)) is not None:
            raise UserError(
                f"the default breaks the constraint '{text}': there are {splits.train.num_rows:,} images"
            )
        concurrent, gpus = room(
            "trial",
            resources.cpus,
            resources.gpus,
            resources.concurrent,
            workers,
            config.train.autoscale,
        )
        folder.write("space.yaml", yaml.safe_dump(written(plan), sort_keys=False).encode())
        say(f"sweep folder: {folder.uri}")
        search = Search(plan, folder, splits.train.num_rows)
        with Board(plan.space) as board:
            tune.run(plan, search, concurrent, gpus, board)
        outcome = results.collect(search)
        results.write(plan, search, outcome)
        report.write(plan, folder, name, outcome)
    return outcome


def written(plan: Plan) -> dict[str, Any]:
    """Return the space as it is kept beside its results, with the command line's options in it."""
    return plan.space.model_dump() | {"config": flatten(plan.base)}


def check_same(plan: Plan, folder: RunFolder) -> None:
    """Refuse to continue a sweep with another space; more trials are welcome."""
    if not folder.exists("space.yaml"):
        if folder.exists(FILE):
            raise UserError(
                f"{folder.uri} holds a sweep, but its space.yaml is gone; put it back, or choose another --name"
            )
        return
    try:
        before = _fixed(yaml.safe_load(folder.read("space.yaml")))
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, AttributeError):
        raise UserError(
            f"{folder.place('space.yaml')} is damaged; put it back, or choose another --name"
        ) from None
    now = _fixed(written(plan))
    changed = [
        f"{k} was {before.get(k)!r}, now {now.get(k)!r}" for k in now | before if before.get(k) != now.get(k)
    ]
    if changed:
        raise UserError(
            f"{folder.uri} holds a sweep of another space ({'; '.join(changed)}); choose another --name"
        )


def _fixed(space: Mapping[str, Any]) -> dict[str, Any]:
    config = {k: v for k, v in space["config"].items() if k not in FREE and not k.startswith(FREE_SECTIONS)}
    budget = {k: v for k, v in space["budget"].items() if k != "trials"}
    rest = {k: v for k, v in space.items() if k not in FREE_PARTS}
    return flatten(rest | {"config": config, "budget": budget})


def print_outcome(plan: Plan, folder: RunFolder, outcome: results.Outcome) -> None:
    """Say who won, against what, and where everything lies."""
    goals, winner, default = plan.space.goals, outcome.winner, outcome.default
    states = [t.state for t in outcome.trials]
    counts = ", ".join(f"{states.count(s)} {s}" for s in ("finished", "stopped", "failed") if s in states)
    say(f"{len(states)} trials: {counts}")
    for t in outcome.trials:
        if t.reason:
            say(f"  trial {t.number}: {t.reason}")
    if len(goals) == 2:
        say(f"Pareto front: {', '.join(f'trial {t.number}' for t in outcome.front)}")
    say(f"best: trial {winner.number}, {results.describe(winner, goals)}")
    if default is not winner and default.runs:
        say(f"default: {results.describe(default, goals)}")
    changed = merge(
        {name: value for name, value in winner.values.items() if default.values.get(name) != value}
    )
    say("  " + "  ".join(f"--{name} {short(value)}" for name, value in flatten(changed).items()))
    say(f"results: {folder.place('trials.parquet')} and report.html; the best one on all training images:")
    say(f"  python jobs/pretrain.py --config {folder.place('best.yaml')}")
