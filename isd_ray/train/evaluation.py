"""The evaluation of a run: its networks, an untrained one and raw pixels, on the labelled images of its data set.

The features of all networks are computed once and kept in the run folder, `features/CHECKPOINT/bank-HASH` and
`test-HASH`; HASH stands for images, networks and view, so an evaluation that asks the same reads them again.
"""

import hashlib
import json
import os
import time
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from isd_ray.config import Config
from isd_ray.data.catalog import Definition, Splits
from isd_ray.data.files import join
from isd_ray.data.imbalance import split_holdout
from isd_ray.data.index import class_counts, classes, labels, root
from isd_ray.data.stream import ordered
from isd_ray.errors import UserError
from isd_ray.evaluate.features import pixels
from isd_ray.evaluate.names import DEFAULT, size_faults, transfer_faults
from isd_ray.evaluate.protocol import TransferFeatures
from isd_ray.evaluate.score import evaluate_features, side_by_side
from isd_ray.train import cluster
from isd_ray.train.embedding import CentreView, Compute, describe, embed, read_labels, read_vectors
from isd_ray.train.folder import RunFolder, checkpoint_names, load_checkpoint
from isd_ray.train.neighbours import search_parts
from isd_ray.train.state import build_state
from isd_ray.train.transfer import TransferTables, open_transfer

SCRATCH = ".features-"  # beginning of the folder of an evaluation that keeps none


class Places(NamedTuple):
    """Folders of features: of the bank, the test set, and of each split of the sets to transfer to."""

    bank: str
    test: str
    transfer: dict[str, dict[str, str]]


def evaluate_run(
    config: Config, folder: RunFolder, splits: Splits, device: str, checkpoint: str | None = None
) -> dict[str, Any]:
    """Evaluate the newest (or the named) checkpoint; returns `metrics`, `groups`, `per_class`, `protocol`, `seconds`.

    Runs on the driver: features come from Ray actors where there are GPUs or `evaluate.workers`, and the protocols run
    where the device is. Without a labelled test set there is nothing to measure: `metrics` is {} and `note` says why.
    """
    bank = choose_bank(config, splits)
    if splits.test is None or bank is None:
        return {"metrics": {}, "note": "no labelled test set: the features were not evaluated", "seconds": {}}
    for table in (bank, splits.test):
        require_labels(table)
    started = time.perf_counter()
    trained = networks(config, folder, checkpoint)
    others = open_transfer(config)
    scratch = f"{SCRATCH}{os.urandom(4).hex()}"
    name = (checkpoint or checkpoint_names(folder)[-1]).removesuffix(".pt")
    at = folder.place("features" if config.evaluate.keep_features else scratch, name)
    try:
        places = compute_features(config, at, trained, bank, splits.test, others, device)
        seconds = {"features": round(time.perf_counter() - started, 3)}
        arguments = (config, places, splits, bank, list(trained), others, device)
        result = cluster.run_on(cluster.computes_here(config, device), score_run, *arguments)
    finally:
        folder.remove_folder(scratch)
    result["seconds"] = seconds | result["seconds"]
    result["protocol"]["test"]["name"] = "validation" if config.data.validation else "test"
    return result | {"classes": classes(splits.train)}


def compute_features(
    config: Config, uri: str, trained: dict[str, nn.Module], bank: pa.Table, test: pa.Table,
    others: dict[str, TransferTables], device: str,
) -> Places:  # fmt: skip
    """Compute the features that are not there yet; returns where they are."""
    data = config.data
    view = CentreView(data.image_size, tuple(data.mean), tuple(data.std))
    compute = how_to_compute(config, device)

    def keep(name: str, table: pa.Table) -> str:
        told = json.dumps(describe(table, trained, view, "float32"), sort_keys=True)
        place = join(uri, f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:8]}")
        print(f"features of {table.num_rows:,} {name} images", flush=True)
        embed(table, trained, view, place, compute, max_bad=data.max_bad, quiet=False)
        return place

    transfer = {
        name: {split: keep(f"{name}-{split}", table) for split, table in other.tables.items()}
        for name, other in others.items()
    }
    return Places(keep("bank", bank), keep("test", test), transfer)


def how_to_compute(config: Config, device: str) -> Compute:
    """Return where networks run: in as many actors as `evaluate.workers`, or as trained on GPUs, or in this process."""
    asked = config.evaluate.workers
    workers = asked or (0 if cluster.computes_here(config, device) else config.train.workers)
    threads = cluster.default_threads(max(workers, 1))
    return Compute(device, workers, config.train.gpus_per_worker, config.evaluate.batch_size, threads)


def score_run(
    config: Config, places: Places, splits: Splits, bank_table: pa.Table, trained: list[str],
    others: dict[str, TransferTables], device: str,
) -> dict[str, Any]:  # fmt: skip
    """Run the protocols on features that are there, for each network and for raw pixels."""
    options: dict[str, Any] = {
        "protocols": config.evaluate.protocols,
        "classes": len(classes(splits.train)),
        "train_counts": class_counts(splits.train).tolist(),
        "groups": grouping(splits.definition),
        "bank_name": bank_name(config, splits.definition),
        "seed": config.train.seed,
        "device": device,
    }

    def evaluate(name: str) -> tuple[dict[str, Any], Tensor]:
        if name == "pixels":
            (bank, of_bank), (test, of_test) = (pixels_of(t, config) for t in (bank_table, splits.test))
            return evaluate_features(bank, of_bank, test, of_test, **options), test
        transfer = {
            target: transfer_features(others[target], at, name) for target, at in places.transfer.items()
        }
        return score_features(places, name, config.evaluate.workers, options | {"transfer": transfer})

    names = [*trained, *(["pixels"] if config.evaluate.baselines else [])]
    return side_by_side(names, evaluate, lambda name: print(f"evaluating {name}", flush=True))


def score_features(
    places: Places, name: str, workers: int, options: dict[str, Any]
) -> tuple[dict[str, Any], Tensor]:
    """Run the protocols on one network's features; returns the result and the test features.

    A bank that takes more than half of the memory is searched part by part, as one is that has `workers` to search it.
    """
    test, bank_labels = read_vectors(places.test, name), read_labels(places.bank)
    fits = len(bank_labels) * test.shape[1] * test.element_size() <= memory() // 2

    def search(queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return search_parts(places.bank, name, len(bank_labels), queries, k, max(workers, 1))

    bank = read_vectors(places.bank, name) if fits else None
    if bank is not None and bank.shape[1] != test.shape[1]:
        raise UserError(
            f"features of '{name}' in {places.bank} and {places.test} differ in width: delete both folders"
        )
    options = options | {"search": search if workers > 1 or not fits else None}
    return evaluate_features(bank, bank_labels, test, read_labels(places.test), **options), test


def transfer_features(tables: TransferTables, places: dict[str, str], name: str) -> TransferFeatures:
    """Read the features of another set."""
    x = {split: read_vectors(place, name) for split, place in places.items()}
    y = {split: read_labels(place) for split, place in places.items()}
    validation = (x["val"], y["val"]) if "val" in x else None
    return TransferFeatures(x["train"], y["train"], x["test"], y["test"], tables.classes, validation)


def check_evaluation(config: Config, splits: Splits) -> None:
    """Refuse, before training, protocols that these sets cannot serve; raises UserError with every fault.

    The default protocols are left out where they cannot be had, and the result says so.
    """
    bank, evaluate = choose_bank(config, splits), config.evaluate
    if not evaluate.enabled or splits.test is None or bank is None:
        return
    counts = [class_counts(table).tolist() for table in (bank, splits.test)]
    faults = transfer_faults(evaluate.protocols, evaluate.transfer_root)
    faults += size_faults([name for name in evaluate.protocols if name not in DEFAULT], *counts)
    if faults:
        raise UserError("--evaluate.protocols: " + "; ".join(faults))
    open_transfer(config)


def networks(config: Config, folder: RunFolder, checkpoint: str | None) -> dict[str, nn.Module]:
    """Return student and (where there is one) teacher of the checkpoint, and the backbone before training."""
    state = build_state(config, torch.device("cpu"), images=1)
    untrained = build_state(config, torch.device("cpu"), images=1).method.encoders()["student"]
    saved = load_checkpoint(folder, checkpoint)
    if saved is None:
        raise UserError(f"{folder.uri}: no checkpoint yet; train the run first")
    state.load_networks(saved)
    trained = dict(state.method.encoders())
    return trained | ({"untrained": untrained} if config.evaluate.baselines else {})


def grouping(definition: Definition) -> str | dict[str, int]:
    """Return how the classes are grouped: "thirds", or thresholds as {"many": 100, "few": 20}."""
    rule = definition.groups
    return rule if isinstance(rule, str) else rule.model_dump()


def bank_name(config: Config, definition: Definition) -> str:
    """Return "balanced" or "train": accuracies against the two are different metrics."""
    return definition.bank if config.evaluate.bank == "auto" else config.evaluate.bank


def hold_out(config: Config, splits: Splits) -> Splits:
    """Return the splits with labelled training images in the place of the test set, taken out of the two others.

    They come from the bank (of which the rarest classes have most images), at most half of a class.
    """
    data, bank = config.data, choose_bank(config, splits)
    assert bank is not None
    assert data.validation is not None
    rest, held = split_holdout(bank, data.validation, data.subset_seed, most=0.5)
    if not len(held):
        raise UserError(
            f"--data.validation {data.validation}: no class has two labelled images to hold one out"
        )
    train = without(splits.train, held)
    return splits._replace(train=train, bank=train if bank is splits.train else rest, test=held)


def without(table: pa.Table, rows: pa.Table) -> pa.Table:
    """Return `table` without the images that `rows` names too. Only images of the same shards can be the same."""
    if root(table) != root(rows):
        return table
    name, other = (pc.binary_join_element_wise(t["shard"], t["key"], "\n") for t in (table, rows))
    return table.filter(pc.invert(pc.is_in(name, value_set=other.combine_chunks())))


def choose_bank(config: Config, splits: Splits) -> pa.Table | None:
    """Return the labelled images that queries are compared with."""
    return splits.train if bank_name(config, splits.definition) == "train" else splits.bank


def require_labels(table: pa.Table) -> None:
    """Refuse images to evaluate on that have no label."""
    unlabelled = int((labels(table) < 0).sum())
    if unlabelled:
        raise UserError(
            f"{unlabelled} images to evaluate on have no label; label them, or --evaluate.enabled false"
        )


def memory() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def pixels_of(table: pa.Table, config: Config) -> tuple[Tensor, Tensor]:
    """Return raw pixels as features, float32 [N, C * H * W], and labels int64 [N]."""
    images, of_images = load_labelled(table, config)
    return pixels(images), of_images


def load_labelled(table: pa.Table, config: Config) -> tuple[Tensor, Tensor]:
    """Decode the labelled rows: images uint8 [N, C, H, W] and labels int64 [N]; broken images are left out."""
    require_labels(table)
    size = config.data.image_size
    need = table.num_rows * 3 * size**2
    if need > memory() // 2:
        raise UserError(
            f"the labelled images take {need / 2**30:.0f} GiB decoded, more than half of this machine's memory; "
            "use --evaluate.bank train, or --evaluate.baselines false"
        )
    batches = list(ordered(table, size=size, max_bad=config.data.max_bad))
    return torch.cat([batch.image[:, 0] for batch in batches]), torch.cat([batch.label for batch in batches])
