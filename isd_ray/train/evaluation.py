"""The evaluation of a run: its networks, an untrained one and raw pixels, on the labelled images of its data set."""

import os
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import nn

from isd_ray.config import Config
from isd_ray.data.augment import center_view
from isd_ray.data.catalog import Definition, Splits
from isd_ray.data.imbalance import split_holdout
from isd_ray.data.index import class_counts, classes, labels, root
from isd_ray.data.stream import ordered
from isd_ray.errors import UserError
from isd_ray.evaluate.protocols import evaluate_encoders
from isd_ray.train.folder import RunFolder, load_checkpoint
from isd_ray.train.state import build_state


def evaluate_run(
    config: Config, folder: RunFolder, splits: Splits, device: str, checkpoint: str | None = None
) -> dict[str, Any]:
    """Evaluate the newest (or the named) checkpoint; returns `metrics`, `groups`, `per_class`, `protocol`, `seconds`.

    Without a labelled test set there is nothing to measure: `metrics` is empty and `note` says why.
    """
    bank = choose_bank(config, splits)
    if splits.test is None or bank is None:
        return {"metrics": {}, "note": "no labelled test set: the features were not evaluated", "seconds": {}}
    where = torch.device(device)
    bank_images, bank_labels = load_labelled(bank, config)
    test_images, test_labels = load_labelled(splits.test, config)
    data = config.data

    def view(images: torch.Tensor) -> torch.Tensor:
        return center_view(images, data.image_size, data.mean, data.std)

    result = evaluate_encoders(
        {name: net.to(where) for name, net in networks(config, folder, checkpoint).items()},
        bank_images,
        bank_labels,
        test_images,
        test_labels,
        view=view,
        classes=len(classes(splits.train)),
        train_counts=class_counts(splits.train).tolist(),
        groups=grouping(splits.definition),
        bank_name=bank_name(config, splits.definition),
        with_pixels=config.evaluate.baselines,
        batch_size=config.evaluate.batch_size,
        device=where,
        protocols=config.evaluate.chosen,
        seed=config.train.seed,
        progress=lambda name: print(f"evaluating {name}", flush=True),
    )
    result["protocol"]["test"]["name"] = "validation" if config.data.validation else "test"
    return result | {"classes": classes(splits.train)}


def networks(config: Config, folder: RunFolder, checkpoint: str | None) -> dict[str, nn.Module]:
    """Return student and (where there is one) teacher of the checkpoint, and the backbone before training."""
    state = build_state(config, torch.device("cpu"), images=1)
    untrained = build_state(config, torch.device("cpu"), images=1).method.encoders()["student"]
    saved = load_checkpoint(folder, checkpoint)
    if saved is None:
        raise UserError(f"{folder.uri}: no checkpoint yet; train the run first")
    state.method.load_state_dict(saved["method"])
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


def load_labelled(table: pa.Table, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode the labelled rows: images uint8 [N, C, H, W] and labels int64 [N]; broken images are left out."""
    unlabelled = int((labels(table) < 0).sum())
    if unlabelled:
        raise UserError(
            f"{unlabelled} images to evaluate on have no label; label them, or --evaluate.enabled false"
        )
    size = config.data.image_size
    need, have = table.num_rows * 3 * size**2, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have // 2:
        raise UserError(
            f"the labelled images take {need / 2**30:.0f} GiB decoded, more than half of this machine's memory; "
            "use --evaluate.bank train, or --evaluate.enabled false"
        )
    batches = list(ordered(table, size=size, max_bad=config.data.max_bad))
    return torch.cat([batch.image[:, 0] for batch in batches]), torch.cat([batch.label for batch in batches])
