"""How many runs fit on a cluster side by side, each with its CPUs and its share of a GPU."""

import math
import os

import ray

from isd_ray import session
from isd_ray.errors import UserError

DATA_CPUS = 1  # CPUs that runs leave to the tasks that read images: without any they would wait for ever
DRIVER_CPUS = 0.001  # of a run with workers


def room(
    what: str,
    cpus: int,
    gpus: float | None = None,
    concurrent: int | None = None,
    workers: int = 0,
    autoscale: bool = False,
) -> tuple[int, float]:
    """Return (runs at once, GPUs of a run or of each of its workers).

    what: the name of a run in messages. cpus, gpus: of a run, or of each of its `workers`, which are on one node each;
    gpus None: one where the cluster has any. concurrent: how many runs are asked for; None: as many as fit. autoscale:
    the cluster may bring more nodes than are up, so that what fits cannot be known and must be said. Raises UserError
    where the cluster can never hold one, or not as many at once.
    """
    if autoscale:
        if concurrent is None or gpus is None:
            raise UserError(
                "--train.autoscale: give resources.concurrent and resources.gpus, since what fits on nodes that are "
                "not up yet is not known"
            )
        return concurrent, gpus
    have = ray.cluster_resources()
    all_cpus, all_gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
    share = gpus if gpus is not None else min(all_gpus, 1.0)
    parts = max(workers, 1)
    takes = parts * cpus + (DRIVER_CPUS if workers else 0)
    needs: dict[str, tuple[float, float]] = {"CPUs": (takes, all_cpus - DATA_CPUS)}
    if share:
        needs["GPUs"] = (parts * share, all_gpus)
    for unit, (need, free) in needs.items():
        if need > free:
            kept = f", {DATA_CPUS} of which is kept for reading images" if unit == "CPUs" else ""
            raise UserError(
                f"resources: a {what} takes {need:g} {unit} and this cluster has {have.get(unit[:3], 0):g}{kept}; "
                f"lower resources.{unit.lower()} or train.workers"
            )
    slots = sum(_fits(node["Resources"], cpus, share) for node in ray.nodes() if node["Alive"])
    if slots < parts:
        raise UserError(
            f"resources: {parts} times {cpus} CPUs and {share:g} GPUs, each on one node, are more than the "
            "nodes of this cluster hold; lower resources.cpus, resources.gpus or train.workers"
        )
    fitting = min(slots // parts, *(math.floor(free / need + 1e-9) for need, free in needs.values()))
    if concurrent is not None and concurrent > fitting:
        raise UserError(
            f"resources.concurrent {concurrent}: {fitting} {what}s fit on this cluster at once; lower it"
        )
    return concurrent or fitting, share


def share_fault(gpus: float | None) -> str | None:
    """Say why Ray cannot give so many GPUs: it counts thousandths of one, and several only whole."""
    if gpus and (gpus < 0.001 or (gpus > 1 and not float(gpus).is_integer())):
        return f"resources.gpus {gpus:g}: give a share from 0.001 to 1, or a whole number"
    return None


def local_cpus(what: str, cpus: int, concurrent: int | None, workers: int, address: str | None) -> int:
    """Return the CPUs that runs take on a Ray of this machine; one in use already, or elsewhere, has what it has.

    Raises UserError where a run takes more than the machine has cores: Ray itself would count as many as it is told.
    """
    cores, need = os.cpu_count() or 1, max(workers, 1) * cpus
    if need > cores and session.is_local(address):
        raise UserError(
            f"resources: a {what} takes {need} CPUs and this machine has {cores}; lower resources.cpus or train.workers"
        )
    return min(concurrent or 1, max(cores // need, 2)) * need


def _fits(node: dict[str, float], cpus: float, gpus: float) -> int:
    """Return how many times this many CPUs and GPUs lie on one node."""
    by_cpu = math.floor(node.get("CPU", 0.0) / cpus + 1e-9)
    return min(by_cpu, math.floor(node.get("GPU", 0.0) / gpus + 1e-9)) if gpus else by_cpu
