"""Evaluation on the way, on held-out training images, for people and sweeps that choose by it.

The numbers go to validation.jsonl in the run folder, one row an evaluated epoch. The test set takes no part.
"""

import json
import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from isd_ray.config import Config
from isd_ray.data.augment import center_view
from isd_ray.data.catalog import Splits
from isd_ray.data.index import class_counts, classes
from isd_ray.errors import UserError
from isd_ray.evaluate.names import ALONG, size_faults
from isd_ray.evaluate.score import evaluate_encoders
from isd_ray.train.evaluation import bank_name, choose_bank, grouping, load_labelled
from isd_ray.train.folder import Row, RunFolder, is_count, read_lines, read_table
from isd_ray.train.state import State, Worker

FILE = "validation.jsonl"
WATCHED = "watched.json"


def watched_tables(config: Config, splits: Splits) -> dict[str, pa.Table]:
    """Return the tables that the evaluation on the way reads, by file name in the run folder.

    Raises UserError where there are none, or where they cannot serve what is to be measured.
    """
    asked = [name for name in config.evaluate.along if name not in ALONG]
    if faults := faults_along(asked, config, splits):
        raise UserError("--evaluate.along: " + "; ".join(faults))
    bank, held = _bank_and_held(config, splits)
    return {"bank.parquet": bank, "validation.parquet": held}


def faults_along(names: Sequence[str], config: Config, splits: Splits) -> list[str]:
    """Return a fault for each of these protocols that cannot run on the images for the way.

    Raises UserError where there are none.
    """
    counts = [class_counts(table).tolist() for table in _bank_and_held(config, splits)]
    return list(size_faults(names, *counts))


def _bank_and_held(config: Config, splits: Splits) -> tuple[pa.Table, pa.Table]:
    bank = choose_bank(config, splits)
    if not config.data.validation or splits.test is None or bank is None:
        raise UserError(
            f"--evaluate.every {config.evaluate.every}: it needs --data.validation N, images to evaluate on; the test "
            "set is looked at once, when the run is over"
        )
    return bank, splits.test


def how_watched(config: Config, splits: Splits) -> dict[str, Any]:
    """Return what the evaluation on the way must know of the data set, whose definition stays with the driver."""
    return {"bank_name": bank_name(config, splits.definition), "groups": grouping(splits.definition)}


def read_rows(folder: RunFolder) -> list[Row]:
    """Return the rows of a run, in order of their steps; a line torn by a kill is left out."""
    rows = [row for row in read_lines(folder, FILE) if is_count(row.get("epoch"))]
    return sorted(rows, key=lambda row: row["step"])


class Watch:
    """Evaluates student and teacher after every `evaluate.every` epochs and the last, on rank 0.

    A row stands in the file before the checkpoint of its step is saved, so a run that continues from a checkpoint has
    all rows up to it; later ones are dropped and measured anew.
    """

    def __init__(self, config: Config, folder: RunFolder, worker: Worker, steps: int, step: int) -> None:
        self.config, self.folder, self.worker, self.steps = config, folder, worker, steps
        self.images: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self.rows: list[Row] = []
        self.stop = False  # whoever listens wants no more of this run; alike on all ranks
        if config.evaluate.every and worker.rank == 0:
            self.rows = [row for row in read_rows(folder) if row["step"] <= step]

    def __call__(self, state: State) -> bool:
        """Evaluate where it is due after this step; tell whether it was, alike on all ranks."""
        if not self.due(state.step):
            return False
        if self.worker.rank == 0:
            row = self.row(state)
            self.rows.append(row)
            self.folder.write(FILE, "".join(json.dumps(r) + "\n" for r in self.rows).encode())
            self.stop = bool(self.worker.tell and self.worker.tell(row))
        if self.worker.world > 1:
            stop = torch.tensor(float(self.stop), device=self.worker.device)
            dist.broadcast(stop, src=0)
            self.stop = bool(stop)
        return True

    def due(self, step: int) -> bool:
        """Tell whether an evaluated epoch ends with this step."""
        epoch, rest = divmod(step, self.steps)
        every = self.config.evaluate.every
        return every > 0 and rest == 0 and (epoch % every == 0 or epoch == self.config.train.epochs)

    def row(self, state: State) -> Row:
        """Measure one row: step, epoch, seconds since 1970, and `network.metric` and `network.metric.group` in %."""
        result = self.evaluate(state)
        row: Row = {"step": state.step, "epoch": state.step // self.steps, "time": round(time.time(), 3)}
        for network, metrics in result["metrics"].items():
            for metric, number in metrics.items():
                if number is None:
                    continue
                row[f"{network}.{metric}"] = number
                if (groups := result["groups"][network][metric]) is not None:
                    means = {"class_mean": result["class_mean"][network][metric]} | groups
                    row |= {f"{network}.{metric}.{group}": value for group, value in means.items()}
        return row

    def evaluate(self, state: State) -> dict[str, Any]:
        """Evaluate the networks as they are; the images are decoded at the first call."""
        names = ("selection.parquet", "bank.parquet", "validation.parquet")
        selection, bank, held = (read_table(self.folder, name) for name in names)
        if self.images is None:
            self.images = (*load_labelled(bank, self.config), *load_labelled(held, self.config))
        data = self.config.data

        def view(images: Tensor) -> Tensor:
            return center_view(images, data.image_size, data.mean, data.std)

        return evaluate_encoders(
            state.method.encoders(),
            *self.images,
            view=view,
            classes=len(classes(selection)),
            train_counts=class_counts(selection).tolist(),
            **self.folder.read_json(WATCHED),
            with_pixels=False,
            batch_size=self.config.evaluate.batch_size,
            device=self.worker.device,
            protocols=self.config.evaluate.along,
            seed=self.config.train.seed,
        )
