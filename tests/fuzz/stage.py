"""The product in one process: what would start Ray, or ask it, is answered here, and runs here."""

import errno
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch
from pyarrow import fs as pafs

from isd_ray import session
from isd_ray.config import validate
from isd_ray.data import files, parallel, store
from isd_ray.errors import UserError
from isd_ray.study import work
from isd_ray.sweep import tune
from isd_ray.sweep.search import Job, Search
from isd_ray.sweep.trial import run_config
from isd_ray.train import cluster, encoder, evaluation, trainer
from isd_ray.train.folder import RunFolder
from isd_ray.train.state import Worker
from isd_ray.train.trainer import open_splits, prepare_run
from isd_ray.train.validation import FILE, read_rows

CPUS = 2.0
COST = {"student_forward": 1.0, "teacher_forward": 1.0, "backward": 1.0, "gflop": 0.0017}


def set_stage(patch: pytest.MonkeyPatch) -> None:
    """Replace what needs Ray, until the patch is undone."""
    patch.setattr(ray, "init", _refuse)
    patch.setattr(ray, "is_initialized", lambda: False)
    patch.setattr(ray, "cluster_resources", lambda: {"CPU": CPUS, "object_store_memory": 2.0**30})
    patch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": CPUS}}])
    for module in (session, parallel):
        patch.setattr(module, "start_ray", lambda *_: None)
    patch.setattr(parallel, "_in_ray", lambda call, items, _, seen: [seen(call(*item)) for item in items])
    patch.setattr(cluster, "run_workers", run_workers)
    for module in (encoder, evaluation):
        patch.setattr(module, "how_to_compute", in_this_process(module.how_to_compute))
    patch.setattr(tune, "run", run_trials)
    patch.setattr(work, "ray", Tasks())
    patch.setattr(work, "release_orphans", lambda: None)
    patch.setattr(store, "WAIT", 0.0)
    patch.setattr(files, "pafs", Stores())
    patch.setattr(trainer, "cost", lambda _: COST)  # most of the time of a run that is this small


class Store(pafs.FileSystemHandler):
    """A store that nobody reaches."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_"):
            return super().__getattribute__(name)
        raise OSError(errno.ECONNREFUSED, "Connection refused")


Store.__abstractmethods__ = frozenset()


class Stores:
    """Arrow's file systems, with buckets that are asked in no network."""

    def __getattr__(self, name: str) -> Any:
        return getattr(pafs, name)

    class FileSystem:
        """What a URI is opened with."""

        @staticmethod
        def from_uri(uri: str) -> tuple[pafs.FileSystem, str]:
            if not re.match(r"(s3|gs|gcs|abfs|abfss|hdfs|viewfs)://", uri):
                return pafs.FileSystem.from_uri(uri)
            known = re.fullmatch(r"\w+://([\w:@.-]+)(/[^?]*)?(\?[\w=.:&-]*)?", uri)
            if known is None:
                raise pa.ArrowInvalid(f"Cannot parse URI: '{uri}'")
            return pafs.PyFileSystem(Store()), f"bucket{known[2] or ''}"


def _refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("this case would have started Ray")


def in_this_process(how_to_compute: Callable[..., Any]) -> Callable[..., Any]:
    """Have features computed here, whatever number of actors was asked for."""
    return lambda *arguments: replace(how_to_compute(*arguments), workers=0)


def run_workers(
    function: Callable[..., None], config: Any, folder: RunFolder, device: str, tell: Any = None
) -> None:
    """Train as the one worker there is."""
    function(config, RunFolder(folder.uri), Worker(0, 1, torch.device(device), sys.stderr, tell))


class Ended:
    """What a task that has run would be referred to by; and, started by `remote`, the task itself."""

    def __init__(self, function: Callable[..., Any], value: Any = None) -> None:
        self.function, self.value = function, value

    def remote(self, *arguments: Any) -> "Ended":
        return Ended(self.function, self.function(*arguments))


class Tasks:
    """Ray's tasks: each runs when it is started."""

    exceptions, ObjectRef = ray.exceptions, ray.ObjectRef

    @staticmethod
    def remote(**_: Any) -> Callable[..., Any]:
        return Ended

    @staticmethod
    def wait(references: list[Ended], **_: Any) -> tuple[list[Ended], list[Ended]]:
        return references[:1], references[1:]

    @staticmethod
    def get(reference: Ended) -> Any:
        return reference.value


def run_trials(plan: Any, search: Search, concurrent: int, gpus: float, notify: Any) -> None:
    """Play Tune: trials one after another; a run that has no rows to its end gets made-up ones."""
    epochs, every = plan.space.budget.epochs, plan.space.validation.every
    while isinstance(job := search.next(), Job):
        notify("started", job, {})
        try:
            for seed in job.seeds:
                config = run_config(plan, search.folder.uri, job, seed, gpus)
                text = config.model_dump_json(include={"data": True, "evaluate": {"bank"}})
                prepare_run(config, open_splits(validate(json.loads(text))))
                if not _heard(search, job, seed, range(every, epochs + 1, every), notify):
                    break
        except UserError as error:
            search.ended(job, str(error))
            notify("ended", job, {"failure": str(error)})
            continue
        search.ended(job, None)
        notify("ended", job, {"failure": None})


def _heard(search: Search, job: Job, seed: int, epochs: range, notify: Any) -> bool:
    """Tell the search what a run measures; returns whether it goes on to its end."""
    folder = search.run_folder(job.number, seed)
    rows = read_rows(folder)
    if search.goals_of(job.number, seed) is None:
        rows = [{"step": e, "epoch": e} | {g: 40.0 + e for g in search.goals} for e in epochs]
        folder.write(FILE, "".join(json.dumps(row) + "\n" for row in rows).encode())
    for row in rows:
        told = row | {"seed": seed}
        stop = search.heard(job, told)
        notify("row", job, told | {"stop": stop})
        if stop:
            return False
    return True
