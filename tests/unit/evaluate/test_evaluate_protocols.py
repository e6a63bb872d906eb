import io
import json

import pytest
import torch
from torch import nn

from isd_ray.errors import UserError
from isd_ray.evaluate.linear import LinearRecipe
from isd_ray.evaluate.names import ALONG
from isd_ray.evaluate.score import evaluate_encoders, evaluate_features
from isd_ray.evaluate.table import markdown, print_table

METRICS = ["knn1", "knn20", "knn200_weighted", "linear"]
SHORT = LinearRecipe(epochs=2)


def one_hot_set(n: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.arange(n) % classes
    return torch.eye(classes)[y] + 1e-3 * torch.rand(
        n, classes, generator=torch.Generator().manual_seed(n)
    ), y


def coloured(n: int, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose class is their brightest channel."""
    y = torch.arange(n) % classes
    images = torch.randint(60, (n, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    images[torch.arange(n), y] += 150
    return images, y


@pytest.fixture(scope="module")
def result() -> dict:
    bank, bank_labels = coloured(30)
    test, test_labels = coloured(12)
    torch.manual_seed(0)
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    constant = nn.Sequential(nn.Conv2d(3, 2, 4), nn.BatchNorm2d(2), nn.Flatten())
    nn.init.zeros_(constant[0].weight)
    return evaluate_encoders(
        {"student": pool, "untrained": constant}, bank, bank_labels, list(test.split(5)), test_labels,
        view=lambda x: x.float() / 255, classes=3, train_counts=[30, 10, 3], bank_name="balanced train set",
    )  # fmt: skip


def test_perfect_features_score_100_and_groups_follow_the_pretraining_counts() -> None:
    bank, y = one_hot_set(210, 4)
    test, wanted = one_hot_set(40, 4)
    r = evaluate_features(bank, y, test, wanted, classes=4, train_counts=[1, 50, 20, 7])
    assert r["metrics"] == dict.fromkeys(METRICS, 100.0)
    assert r["groups"]["knn20"] == {"many": 100.0, "medium": 100.0, "few": 100.0}
    assert r["protocol"]["groups"]["classes"] == {"many": [1, 2], "medium": [3], "few": [0]}
    assert r["std"]["linear"] == 0
    assert r["protocol"]["bank"] == {
        "name": "unnamed",
        "images": 210,
        "largest_class": 53,
        "smallest_class": 52,
    }
    assert "left_out" not in r["protocol"]["knn200_weighted"]


def test_every_metric_reads_its_own_neighbours() -> None:
    """One bank image of class 0 lies on the query, the next 19 are of class 1, the other 180 of class 2."""
    angle = torch.cat([torch.zeros(1), torch.full((19,), 0.1), torch.full((180,), 0.2)])
    bank = torch.stack([angle.cos(), angle.sin()], 1)
    y = torch.tensor([0] + [1] * 19 + [2] * 180)
    found = {}
    for c in range(3):
        r = evaluate_features(bank, y, torch.tensor([[1.0, 0.0]]), torch.tensor([c]), classes=3,
                              train_counts=[1, 1, 1], protocols=ALONG)  # fmt: skip
        found |= {m: c for m, accuracy in r["metrics"].items() if accuracy == 100}
    assert found == {"knn1": 0, "knn20": 1, "knn200_weighted": 2}
    assert r["groups"]["knn1"] == {}  # equal counts: no class is rarer than another


def test_a_bank_smaller_than_k_leaves_the_metric_out_and_says_so() -> None:
    bank, y = one_hot_set(30, 3)
    r = evaluate_features(bank, y, bank, y, classes=3, train_counts=[3, 2, 1], linear_recipe=SHORT)
    assert r["metrics"]["knn20"] == 100
    for section in ("metrics", "groups", "per_class", "std", "class_mean"):
        assert r[section]["knn200_weighted"] is None
    assert "30 images, fewer than k = 200" in r["protocol"]["knn200_weighted"]["left_out"]


def test_a_class_without_test_images_has_no_number() -> None:
    bank, y = one_hot_set(60, 3)
    test, wanted = bank[y != 1], y[y != 1]
    r = evaluate_features(bank, y, test, wanted, classes=3, train_counts=[9, 5, 1], protocols=ALONG)
    assert r["per_class"]["knn20"] == [100.0, None, 100.0]
    assert r["groups"]["knn20"] == {"many": 100.0, "medium": None, "few": 100.0}
    assert r["std"]["knn20"] is None


def test_bad_features_and_counts_are_named() -> None:
    bank, y = one_hot_set(30, 3)
    options = {"classes": 3, "train_counts": [3, 2, 1], "protocols": ALONG}
    broken = bank.clone()
    broken[4, 1] = float("nan")
    with pytest.raises(UserError, match="1 of 30 feature vectors of the test set are not finite"):
        evaluate_features(bank, y, broken, y, **options)
    with pytest.raises(UserError, match="2 entries for 3 classes"):
        evaluate_features(bank, y, bank, y, **{**options, "train_counts": [1, 2]})
    images, labels = coloured(6)
    with pytest.raises(UserError, match="only once"):
        evaluate_encoders({}, iter([images]), labels, images, labels, view=lambda x: x, **options)


def test_a_diverged_encoder_is_named() -> None:
    images, labels = coloured(6)
    diverged = nn.Conv2d(3, 2, 4)
    nn.init.constant_(diverged.weight, float("inf"))
    encoders = {"student": nn.Flatten(), "teacher": diverged}
    with pytest.raises(UserError, match="Evaluation of teacher: 6 of 6 feature vectors of the bank"):
        evaluate_encoders(encoders, images, labels, images, labels, view=lambda x: x.float(), classes=3,
                          train_counts=[1, 2, 3], protocols=ALONG)  # fmt: skip


def test_encoders_and_pixels_stand_side_by_side(result: dict) -> None:
    assert list(result["metrics"]) == ["student", "untrained", "pixels"]
    assert all(list(m) == METRICS for m in result["metrics"].values())
    assert result["metrics"]["student"]["knn1"] == 100
    assert result["metrics"]["pixels"]["knn1"] == 100
    assert result["metrics"]["untrained"]["linear"] == pytest.approx(100 / 3)  # all features equal: one class
    assert result["collapse"]["untrained"]["std"] == pytest.approx(0, abs=1e-6)
    assert result["collapse"]["student"]["dim"] == 3
    assert result["groups"]["student"]["knn20"].keys() == {"many", "medium", "few"}
    assert set(result["seconds"]) == set(result["metrics"])
    assert json.loads(json.dumps(result))["protocol"]["knn20"]["k"] == 20


def test_the_table_fits_100_columns_without_colour(result: dict) -> None:
    out = io.StringIO()
    print_table(result, out, class_names=["red", "green", "blue"])
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    for part in (
        "student",
        "untrained",
        "pixels",
        "20-NN",
        "linear",
        "few",
        "per class, student: red ",
        "200-NN weighted is left out",
    ):
        assert part in text
    assert "Bank (balanced train set): 30 labelled images, 10 to 10 a class." in text


def test_markdown_has_one_row_an_encoder(result: dict) -> None:
    lines = [line for line in markdown(result).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3
    assert len({line.count("|") for line in lines}) == 1
    assert "| 20-NN medium | 20-NN few | 20-NN std |" in lines[0]
    assert lines[2].startswith("| student | 100.0 | ")
    assert " - |" in lines[2]  # the metric that was left out
