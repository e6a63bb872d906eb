"""The class-balanced silhouette against its formula, and wherever protocols are known."""

import pytest
import torch
from torch.nn import functional as F

from isd_ray.config import resolve
from isd_ray.evaluate.names import listing, parse, size_faults
from isd_ray.evaluate.score import evaluate_features
from isd_ray.sweep.check import check
from isd_ray.sweep.space import Space

NAME = "silhouette"


def score(features: torch.Tensor, labels: torch.Tensor, classes: int = 3) -> dict:
    return evaluate_features(
        features, labels, features, labels, classes=classes, train_counts=[9, 5, 1][:classes], protocols=[NAME]
    )  # fmt: skip


def plainly(features: torch.Tensor, labels: torch.Tensor) -> float:
    """Rousseeuw's definition, image by image in float64; a class of one image has 0."""
    x, by_class = F.normalize(features.double(), dim=1), {}
    for i, own in enumerate(labels.tolist()):
        apart = {}
        for c in labels.unique().tolist():
            others = [j for j in range(len(x)) if labels[j] == c and j != i]
            apart[c] = sum(float(1 - x[i] @ x[j]) for j in others) / len(others) if others else None
        a, b = apart.pop(own), min(value for value in apart.values() if value is not None)
        by_class.setdefault(own, []).append(0.0 if a is None else (b - a) / max(a, b))
    means = [sum(values) / len(values) for values in by_class.values()]
    return 100 * sum(means) / len(means)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_mean_over_classes_of_the_silhouettes(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0] * 12 + [1] * 5 + [2])  # of uneven classes, one with an image alone
    features = torch.randn(18, 4, generator=g) + torch.eye(4)[labels]
    found = score(features, labels)
    assert found["metrics"][NAME] == pytest.approx(plainly(features, labels), abs=1e-3)
    assert found["groups"][NAME] is found["per_class"][NAME] is None
    assert found["protocol"][NAME]["version"] == 1


def test_it_tells_classes_apart_and_ignores_lengths() -> None:
    labels = torch.arange(12) % 3
    features = torch.eye(3)[labels] * torch.arange(1, 13)[:, None]
    assert score(features, labels)["metrics"][NAME] == pytest.approx(100, abs=1e-3)
    assert score(features, labels.roll(1).sort().values)["metrics"][NAME] < 0


def test_it_is_left_out_where_nothing_can_be_compared() -> None:
    assert "1 classes" in next(size_faults([NAME], [3], [3]))
    assert "some must have 2" in next(size_faults([NAME], [3, 3], [1, 1]))
    assert list(size_faults([NAME], [0, 0], [2, 1])) == []
    left = score(torch.randn(3, 2), torch.arange(3))
    assert left["metrics"][NAME] is None
    assert "one test image" in left["protocol"][NAME]["left_out"]


def test_a_run_its_way_a_sweep_and_the_help_know_it() -> None:
    assert parse(NAME).title == "silhouette\nby class"
    assert NAME in listing()
    both = {"evaluate.protocols": [NAME], "evaluate.along": [NAME]}
    assert resolve(both).evaluate.along == [NAME]
    space = {"method.temperature": {"loguniform": [0.05, 0.3]}}
    plan = check(Space(space=space, goals=[f"student.{NAME}"]))
    assert NAME in plan.space.config_of(plan.base, {}).evaluate.along
