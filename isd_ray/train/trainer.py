"""From a configuration to an evaluated backbone: prepare the run folder, train on Ray, evaluate, write the result."""

import hashlib
import io
import json
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from isd_ray import interop, session
from isd_ray.config import Config, flatten, merge, to_yaml, validate
from isd_ray.data.catalog import Splits, open_dataset
from isd_ray.data.files import join
from isd_ray.errors import UserError, listed, shown
from isd_ray.evaluate.table import print_table
from isd_ray.messages import say
from isd_ray.methods import find_method
from isd_ray.train import cluster
from isd_ray.train.claim import claimed, refuse_foreign
from isd_ray.train.cost import cost
from isd_ray.train.evaluation import check_evaluation, evaluate_run, hold_out
from isd_ray.train.folder import (
    RunFolder,
    checkpoint_names,
    load_checkpoint,
    read_lines,
    read_saved,
    saved_config,
)
from isd_ray.train.learnable import check_learnable, check_steps
from isd_ray.train.loggers import send_result
from isd_ray.train.loop import train
from isd_ray.train.parts import run_shares, run_stages, sentence
from isd_ray.train.result import read_result
from isd_ray.train.state import build_state
from isd_ray.train.teacher import load_teacher
from isd_ray.train.validation import WATCHED, how_watched, watched_tables

# Options that may change between the start of a run and its continuation: they do not change what is learned.
FREE = {
    "name", "output", "address", "data.root", "data.shards", "data.download", "data.cache", "train.workers",
    "train.threads", "train.log_every", "train.loggers", "train.checkpoint_seconds", "train.keep_checkpoints",
    "train.max_failures", "train.start_seconds", "train.autoscale", "train.device", "train.gpus_per_worker",
    "queue.layout",
}  # fmt: skip
FREE_SECTIONS = ("evaluate.",)


def pretrain(config: Config, tell: cluster.Tell | None = None) -> dict[str, Any]:
    """Train and evaluate one run; returns what is written to result.json.

    tell: called with each row of validation.jsonl (`--evaluate.every`) as soon as it is measured; where it returns True
    the run ends there.

    A run of the same name that was interrupted continues from its newest checkpoint; a finished one is returned as it
    is. Raises UserError, before anything is written, for input that cannot work.
    """
    folder = RunFolder(run_uri(config))
    if folder.exists("result.json"):
        check_same(config, folder)
        say(f"{folder.uri}: this run is finished; its result follows. Choose another --name to train anew.")
        return read_result(folder)
    if not never_began(folder):
        check_same(config, folder)
    refuse_foreign(folder, "run")
    check_learnable(config)
    load_teacher(config)  # one that cannot be loaded is refused before anything is written
    session.start_ray(config.address, config.train.workers)
    device = cluster.choose_device(config)
    splits = open_splits(config)
    check_sizes(config, splits.train)
    check_evaluation(config, splits)
    with claimed(folder, "run"):
        forget_never_began(config, folder)
        prepare(config, folder, splits)
        say(f"run folder: {folder.uri}")
        return run_prepared(config, folder, splits, device, tell)


def never_began(folder: RunFolder) -> bool:
    """Return whether a folder holds no run, or one that has no checkpoint yet: its options may still change."""
    return not folder.exists("config.yaml") or not checkpoint_names(folder)


def forget_never_began(config: Config, folder: RunFolder) -> None:
    """Make room for this run where one with other options never came to a checkpoint."""
    if not folder.exists("config.yaml") or not never_began(folder) or not changed_options(config, folder):
        return
    say(f"note: {folder.uri} holds a run with other options that has no checkpoint; this one takes its place")
    for name in ("selection.parquet", "bank.parquet", "validation.parquet", WATCHED, "metrics.jsonl"):
        if folder.exists(name):
            folder.remove(name)


def run_prepared(
    config: Config, folder: RunFolder, splits: Splits, device: str, tell: cluster.Tell | None = None
) -> dict[str, Any]:
    """Train and evaluate in a folder that `prepare` has filled; returns what is written to result.json.

    It needs no definition of the data set, so it also works on the nodes of a cluster.
    """
    seconds = train_prepared(config, folder, device, tell)
    export(config, folder)
    result = summary(config, folder, seconds)
    if config.evaluate.enabled:
        result |= evaluate_run(config, folder, splits, device)
        result["seconds"] = seconds | result["seconds"]
    folder.write_json("result.json", result)
    send_result(config, folder, result, sys.stderr)
    return result


def train_prepared(
    config: Config, folder: RunFolder, device: str, tell: cluster.Tell | None = None
) -> dict[str, float]:
    """Train in a folder that `prepare` has filled, from its newest checkpoint; returns the seconds it took."""
    started = time.monotonic()
    cluster.run_workers(train, config, folder, device, tell)
    return {"train": round(time.monotonic() - started, 1)}


def run_uri(config: Config) -> str:
    """Return the run's folder. The default name holds a hash of all that changes what is learned."""
    output = config.output
    relative = "://" not in output and not Path(output).expanduser().is_absolute()
    if relative and session.inside_job():
        output = str(Path.home() / "isd_ray" / output)
        say(
            f"output: {output} (a job's working folder is thrown away; give --output an absolute path or URI)"
        )
    return join(output, config.name or default_name(config))


def default_name(config: Config) -> str:
    """Return method, data set and eight digits that stand for the other options."""
    text = json.dumps(fixed_options(config.model_dump()), sort_keys=True)
    return f"{config.method.name}-{Path(config.data.dataset).stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def fixed_options(values: dict[str, Any]) -> dict[str, Any]:
    """Return the options, by dotted name, that must not change while a run lasts."""
    flat = flatten(values)
    return {k: v for k, v in flat.items() if k not in FREE and not k.startswith(FREE_SECTIONS)}


def check_same(config: Config, folder: RunFolder) -> None:
    """Refuse to continue a run with other options than it was started with."""
    if changed := changed_options(config, folder):
        raise UserError(
            f"{folder.uri} holds a run with other options ({listed(changed)}); choose another --name"
        )


def changed_options(config: Config, folder: RunFolder) -> list[str]:
    """Say which options of a run are others than it was started with; raises UserError where its file is damaged."""
    before, now = fixed_options(read_saved(folder)), fixed_options(config.model_dump())
    return [
        f"{k} was {shown(before[k])}, now {shown(v)}"
        for k, v in now.items()
        if k in before and before[k] != v
    ]


def open_splits(config: Config) -> Splits:
    """Open the data set, choose the pretraining subset and, where asked, hold images out to evaluate on."""
    data = config.data
    splits = open_dataset(
        data.dataset,
        root=data.root,
        shards=data.shards,
        scheme=data.scheme,
        ratio=data.ratio,
        seed=data.subset_seed,
        class_order=data.class_order,
        download=data.download,
        options=data.scheme_options,
    )
    return hold_out(config, splits) if data.validation else splits


def check_sizes(config: Config, table: pa.Table, quiet: bool = False) -> None:
    """Compare batch and queue (of a method that has one) with the number of images; say what a large queue means.

    Raises UserError for sizes that cannot work.
    """
    images, queue, train = table.num_rows, config.queue.size, config.train
    ranks = max(train.workers, 1)
    if train.batch_size // ranks < 2 * train.accumulate:
        raise UserError(
            f"--train.batch_size {train.batch_size}: {ranks} workers and {train.accumulate} parts a step leave fewer "
            "than two images a part; use a larger batch or fewer parts"
        )
    if not images:
        raise UserError(f"data set {config.data.dataset}: no images; check --data.root or --data.shards")
    check_steps(config, images)
    if config.train.batch_size > images:
        raise UserError(f"--train.batch_size {config.train.batch_size}: the data set has {images:,} images")
    if not find_method(config.method.name).uses_queue:
        return
    if queue > images:
        raise UserError(
            f"--queue.size {queue}: the data set has {images:,} images; use at most a quarter ({images // 4:,})"
        )
    if queue > images / 4 and not quiet:
        masked = (
            "its own anchors are masked" if config.queue.exclude_own else "its own anchors are NOT masked"
        )
        say(
            f"note: the queue ({queue:,}) is larger than a quarter of the data set ({images:,} images), so that an "
            f"image often meets anchors of its own; {masked} (--queue.exclude_own)"
        )


def prepare_run(config: Config, splits: Splits) -> None:
    """Fill a run's folder, on the driver: the definitions of data sets do not travel to the nodes of a cluster.

    Raises UserError for a setting that cannot work.
    """
    folder = RunFolder(run_uri(config))
    if not never_began(folder):
        check_same(config, folder)
    forget_never_began(config, folder)
    check_sizes(config, splits.train, quiet=True)
    prepare(config, folder, splits)


def prepare(config: Config, folder: RunFolder, splits: Splits) -> None:
    """Write what the run is made of: its options and its rows. A continued run keeps the rows it began with."""
    tables = {"selection.parquet": splits.train}
    if config.evaluate.every:
        tables |= watched_tables(config, splits)
        folder.write_json(WATCHED, how_watched(config, splits))
    for name, table in tables.items():
        if not folder.exists(name):
            sink = io.BytesIO()
            pq.write_table(table, sink)
            folder.write(name, sink.getvalue())
    folder.write("config.yaml", to_yaml(config).encode())


def export(config: Config, folder: RunFolder) -> None:
    """Write the trained student backbone as safetensors."""
    state = build_state(config, torch.device("cpu"), images=1)
    saved = load_checkpoint(folder)
    if saved is None:
        raise UserError(
            f"{folder.uri}: training ended without a checkpoint; is the folder shared by all nodes?"
        )
    state.load_networks(saved)
    with tempfile.TemporaryDirectory() as local:
        path = Path(local) / "backbone.safetensors"
        interop.export_backbone(state.method.encoders()["student"], path, config.data.mean, config.data.std)
        folder.write(path.name, path.read_bytes())


def summary(config: Config, folder: RunFolder, seconds: dict[str, float]) -> dict[str, Any]:
    """Return what is known of a run without evaluating it."""
    lines = [row for row in read_lines(folder, "metrics.jsonl") if "images_per_second" in row]
    if not lines:
        raise UserError(f"{folder.place('metrics.jsonl')} has no whole line; put it back as it was")
    rates = sorted(line["images_per_second"] for line in lines)
    parts, stages = run_shares(lines), run_stages(lines)
    names = ("torch", "torchvision", "ray", "pyarrow", "numpy", "timm")
    return {
        "name": folder.name,
        "folder": folder.uri,
        "seconds": seconds,
        "images_per_second": round(rates[len(rates) // 2], 1),
        "cost": cost(config),
        "time_shares": {part: round(share, 4) for part, share in parts.items()},
        "time_note": sentence(parts, stages),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
        "config": config.model_dump(),
    }


def evaluate(
    run: str,
    checkpoint: str | None,
    options: dict[str, Any],
    places: dict[str, Any],
    address: str | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint of an existing run and write evaluation-<checkpoint>.json beside it.

    options: fields of `evaluate` that replace the run's own; places: where the data lies now. None keeps the run's.
    address: of a Ray cluster. The one that the run was trained on is not obeyed: a run folder that somebody else has
    made must not choose where this process connects.
    """
    folder = RunFolder(run)
    saved = saved_config(folder).model_dump() | {"address": address}
    given = {f"evaluate.{k}": v for k, v in options.items()} | {f"data.{k}": v for k, v in places.items()}
    given["evaluate.enabled"] = True  # also of a run that was not evaluated when it ended
    config = validate(merge(saved, {k: v for k, v in given.items() if v is not None}))
    session.start_ray(config.address, 0)
    device = cluster.choose_device(config)
    splits = open_splits(config)
    check_evaluation(config, splits)
    result = summary(config, folder, {})
    result |= evaluate_run(config, folder, splits, device, checkpoint)
    name = checkpoint or checkpoint_names(folder)[-1]
    folder.write_json(f"evaluation-{name.removesuffix('.pt')}.json", result)
    return result


def print_result(result: dict[str, Any]) -> None:
    """Print the table of accuracies and where everything lies."""
    if result.get("metrics"):
        print_table(result, class_names=result["classes"])
    elif "note" in result:
        say(result["note"])
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in result["seconds"].items())
    say(f"{result['images_per_second']:.0f} images/s; {seconds}")
    passes = "{student_forward:g} forward + {teacher_forward:g} of the teacher, {backward:g} backward, {gflop:g} GFLOP"
    say(f"an image a step: {passes.format(**result['cost'])}")
    if result.get("time_note"):
        say(result["time_note"])
    say(f"results: {join(result['folder'], 'result.json')}")
