"""How many runs fit on a cluster side by side, each with its CPUs and its share of a GPU."""

import math

import ray

from isd_ray.errors import UserError

DATA_CPUS = 1  # CPUs that runs leave to the tasks that read images: without any they would wait for ever


def room(
    what: str, cpus: int, gpus: float | None = None, concurrent: int | None = None, workers: int = 0
) -> tuple[int, float]:
    """Return (runs at once, GPUs of a run or of each of its workers).

    what: the name of a run in messages. cpus, gpus: of a run, or of each of its `workers`, whose driver takes nothing;
    gpus None: one where the cluster has any. concurrent: how many runs are asked for; None: as many as fit. Raises
    UserError where the cluster can never hold one, or not as many at once.
    """
    have = ray.cluster_resources()
    all_cpus, all_gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
    share = gpus if gpus is not None else min(all_gpus, 1.0)
    parts = max(workers, 1)
    needs: dict[str, tuple[float, float]] = {"CPUs": (parts * cpus, all_cpus - DATA_CPUS)}
    if share:
        needs["GPUs"] = (parts * share, all_gpus)
    for unit, (need, free) in needs.items():
        if need > free:
            kept = f", {DATA_CPUS} of which is kept for reading images" if unit == "CPUs" else ""
            raise UserError(
                f"resources: a {what} takes {need:g} {unit} and this cluster has {have.get(unit[:3], 0):g}{kept}; "
                f"lower resources.{unit.lower()} or train.workers"
            )
    fitting = min(math.floor(free / need + 1e-9) for need, free in needs.values())
    if concurrent is not None and concurrent > fitting:
        raise UserError(
            f"resources.concurrent {concurrent}: {fitting} {what}s fit on this cluster at once; lower it"
        )
    return concurrent or fitting, share
