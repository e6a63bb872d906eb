"""Results keep their form and their numbers: what version 1 of each protocol stored for fixed features.

kept.json is what `evaluate_features` returned for them. Who changes a protocol's settings gives it another version.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from isd_ray.evaluate.protocol import TransferFeatures
from isd_ray.evaluate.score import evaluate_features

CLASSES = 5
KEPT = json.loads(Path(__file__).with_name("kept.json").read_text())


def clouds(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.arange(n) % CLASSES
    centres = torch.randn(CLASSES, 8, generator=torch.Generator().manual_seed(7))
    return centres[y] + 1.2 * torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)), y


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    bank, y = clouds(300, 1)
    test, wanted = clouds(120, 2)
    keep = wanted != 4
    keep[:20] = True
    other = TransferFeatures(*clouds(100, 3), *clouds(55, 4), CLASSES, clouds(40, 99))
    found = evaluate_features(
        bank, y, test[keep], wanted[keep], classes=CLASSES, train_counts=[200, 60, 60, 15, 3],
        protocols=list(KEPT["metrics"]), transfer={"dtd": other}, bank_name="b",
    )  # fmt: skip
    return json.loads(json.dumps(found))


def test_what_is_stored_of_a_protocol_is_what_was_stored(result: dict[str, Any]) -> None:
    assert result["protocol"] == KEPT["protocol"]
    assert {name: list(settings) for name, settings in result["protocol"].items()} == {
        name: list(settings) for name, settings in KEPT["protocol"].items()
    }


@pytest.mark.parametrize("section", [name for name in KEPT if name != "protocol"])
def test_the_numbers_are_what_they_were(result: dict[str, Any], section: str) -> None:
    assert list(result) == list(KEPT)
    assert shape(result[section]) == shape(KEPT[section])
    pairs = list(zip(numbers(result[section]), numbers(KEPT[section]), strict=True))
    assert sum(a == pytest.approx(b, abs=1e-6) for a, b in pairs) >= 0.9 * len(pairs)
    assert all(a == pytest.approx(b, abs=100 / 11) for a, b in pairs)  # an image of a class of 11


def shape(value: Any) -> Any:
    """Names and places without the numbers."""
    if isinstance(value, dict):
        return {name: shape(part) for name, part in value.items()}
    if isinstance(value, list):
        return [shape(part) for part in value]
    return type(value)


def numbers(value: Any) -> list[float]:
    """All numbers, in order."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return [number for part in parts for number in numbers(part)]
    return [] if value is None else [float(value)]
