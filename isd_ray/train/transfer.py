"""Other labelled sets that features are transferred to, from torchvision's files to index tables."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from isd_ray.config import Config
from isd_ray.data import files, index
from isd_ray.data.catalog import default_cache
from isd_ray.data.shards import make_shards
from isd_ray.errors import UserError
from isd_ray.evaluate.names import parse
from isd_ray.evaluate.transfer_sets import TRANSFER_SETS, TransferSet

SEED = 0  # of the splits that are drawn: the same for every run, so that runs compare


@dataclass(frozen=True)
class TransferTables:
    """Index tables of `train`, `test` and, where the set has one, `val`; labels below `classes`."""

    tables: dict[str, pa.Table]
    classes: int


def open_transfer(config: Config) -> dict[str, TransferTables]:
    """Open the sets of the chosen protocols; raises UserError with every set that cannot be read.

    Shards are made once in the cache (ISD_RAY_CACHE), as for any other data set.
    """
    names = [name for name in map(parse, config.evaluate.protocols) if name.protocol.other_set]
    found, faults = {}, []
    for name in names:
        try:
            found[name.target] = open_set(TRANSFER_SETS[name.target], str(config.evaluate.transfer_root))
        except UserError as error:
            faults.append(f"transfer/{name.target}: {error}")
    if faults:
        raise UserError("; ".join(faults))
    return found


def open_set(chosen: TransferSet, root: str) -> TransferTables:
    """Return the tables of one set, whose files lie under `root` as torchvision puts them."""
    digest = hashlib.sha256(files.absolute(root).encode()).hexdigest()[:8]
    folder = str(Path(default_cache()) / f"transfer-{chosen.torchvision}-{digest}")

    def table(split: str) -> pa.Table:
        if files.exists(f"{folder}/{split}/{index.FILE_NAME}"):
            return index.read_index(f"{folder}/{split}")
        return make_shards(f"torchvision:{chosen.torchvision}", folder, split=split, root=root)

    train = table(chosen.train)
    if chosen.test is None:
        tables = dict(zip(("train", "test"), draw(train, chosen), strict=True))
    else:
        tables = {"train": train, "test": table(chosen.test)} | (
            {"val": table(chosen.val)} if chosen.val else {}
        )
    top = max(int(index.labels(part).max(initial=-1)) for part in tables.values())
    return TransferTables(tables, top + 1)


def draw(table: pa.Table, chosen: TransferSet) -> tuple[pa.Table, pa.Table]:
    """Draw `per_class` training and at most `test_per_class` test images of every class, both in index order.

    Raises UserError where a class has no image left to test on.
    """
    labels, order = index.labels(table), np.random.default_rng(SEED).permutation(table.num_rows)
    parts: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    for label in range(int(labels.max(initial=-1)) + 1):
        rows = order[labels[order] == label]
        if len(rows) <= chosen.per_class:
            raise UserError(f"class {label} has {len(rows)} images, needed are more than {chosen.per_class}")
        stop = None if chosen.test_per_class is None else chosen.per_class + chosen.test_per_class
        parts[0].append(rows[: chosen.per_class])
        parts[1].append(rows[chosen.per_class : stop])
    train, test = (table.take(np.sort(np.concatenate(part))) for part in parts)
    return train, test
