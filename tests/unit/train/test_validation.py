"""Rows of the evaluation on the way: what a protocol has, and nothing that it has not."""

import sys

import pytest
import torch

from isd_ray.config import validate
from isd_ray.evaluate.names import examples, parse
from isd_ray.evaluate.score import evaluate_features, side_by_side
from isd_ray.train.folder import RunFolder
from isd_ray.train.state import Worker
from isd_ray.train.validation import Watch

GROUPED = {"", ".class_mean", ".many", ".medium", ".few"}


@pytest.mark.parametrize("metric", [*examples(cheap=True), "knn500"])
def test_a_row_has_the_numbers_of_each_cheap_protocol(monkeypatch, tmp_path, metric: str) -> None:
    labels = torch.arange(240) % 3
    features = torch.randn(240, 4, generator=torch.Generator().manual_seed(0)) + torch.eye(4)[labels]
    config = validate({"evaluate": {"along": [metric], "every": 1}})

    class State:
        step = 20

    def evaluate(watch: Watch, state: State) -> dict:
        options = {"classes": 3, "train_counts": [9, 5, 1], "protocols": watch.config.evaluate.along}
        found = evaluate_features(features, labels, features, labels, **options)
        return side_by_side(["student"], lambda name: (found, features))

    monkeypatch.setattr(Watch, "evaluate", evaluate)
    worker = Worker(rank=0, world=1, device=torch.device("cpu"), out=sys.stdout)
    row = Watch(config, RunFolder(str(tmp_path)), worker, 10, 0).row(State())
    numbers = {name: value for name, value in row.items() if name not in ("step", "epoch", "time")}
    parts = GROUPED if parse(metric).protocol.by_class else {""}
    assert set(numbers) == ({f"student.{metric}{part}" for part in parts} if metric != "knn500" else set())
    assert all(isinstance(value, float) for value in numbers.values())
