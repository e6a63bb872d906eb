"""The published linear forms against plain float64 loops, and every protocol in one result."""

import json

import pytest
import torch
from torch.nn import functional as F

from isd_ray.evaluate.draws import balanced, share
from isd_ray.evaluate.linear import (
    BCL_RECIPE,
    SDCLR_FEWSHOT_RECIPE,
    SDCLR_RECIPE,
    LinearRecipe,
    epoch_order,
    initial_head,
    linear,
)
from isd_ray.evaluate.protocol import TransferFeatures
from isd_ray.evaluate.score import SECTIONS, evaluate_features

CLASSES = 4


def separable(n: int, d: int = 6, seed: int = 0, noise: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    centres = torch.randn(CLASSES, d, generator=torch.Generator().manual_seed(7))
    return centres[y] + noise * torch.randn(n, d, generator=g), y


def error_of(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return ((x @ w.T + b).softmax(1) - F.one_hot(y, CLASSES)) / len(y)


def assert_same_answers(found: torch.Tensor, logits: torch.Tensor) -> None:
    top = logits.topk(2).values
    clear = top[:, 0] - top[:, 1] > 1e-3 * logits.abs().max()  # float32 may swap what is closer
    assert clear.float().mean() > 0.95
    assert torch.equal(found[clear], logits.argmax(1)[clear])


def test_sdclr_is_sgd_on_raw_features_with_steps_of_a_tenth() -> None:
    x, y = separable(60)
    test = torch.randn(300, 6, generator=torch.Generator().manual_seed(3))
    recipe = LinearRecipe(epochs=5, batch_size=25, lr=0.3, weight_decay=0, milestones=(2, 4), normalise=False,
                          init_std=0.01)  # fmt: skip
    w, b = (p.double() for p in initial_head(6, CLASSES, 1, 0.01))
    vw, vb = torch.zeros_like(w), torch.zeros_like(b)
    for epoch in range(5):
        lr = 0.3 * 0.1 ** sum(epoch >= m for m in (2, 4))
        for i in epoch_order(60, epoch, 1).split(25):
            error = error_of(x[i].double(), y[i], w, b)
            vw, vb = 0.9 * vw + error.T @ x[i].double(), 0.9 * vb + error.sum(0)
            w, b = w - lr * vw, b - lr * vb
    found, _ = linear([x], y, test, classes=CLASSES, recipe=recipe, seed=1)
    assert_same_answers(found, test.double() @ w.T + b)


def test_bcl_is_adam_with_a_rate_that_falls_exponentially() -> None:
    x, y = separable(60)
    test = torch.randn(300, 6, generator=torch.Generator().manual_seed(3))
    recipe = LinearRecipe(epochs=8, batch_size=25, lr=1e-1, weight_decay=0.1, milestones=(), optimiser="adam",
                          final_lr=1e-3, normalise=False)  # fmt: skip
    parameters = [p.double() for p in initial_head(6, CLASSES, 1)]
    first, second, step = [0.0, 0.0], [0.0, 0.0], 0
    for epoch in range(8):
        lr = 1e-1 * (1e-2) ** (epoch / 8)
        for i in epoch_order(60, epoch, 1).split(25):
            step += 1
            error = error_of(x[i].double(), y[i], *parameters)
            for j, g in enumerate((error.T @ x[i].double(), error.sum(0))):
                g = g + 0.1 * parameters[j]
                first[j], second[j] = 0.9 * first[j] + 0.1 * g, 0.999 * second[j] + 0.001 * g * g
                mean, square = first[j] / (1 - 0.9**step), second[j] / (1 - 0.999**step)
                parameters[j] = parameters[j] - lr * mean / (square.sqrt() + 1e-8)
    found, _ = linear([x], y, test, classes=CLASSES, recipe=recipe, seed=1)
    assert_same_answers(found, test.double() @ parameters[0].T + parameters[1])


def test_the_recipes_are_the_published_ones() -> None:
    assert (SDCLR_RECIPE.lr, SDCLR_RECIPE.weight_decay, SDCLR_RECIPE.epochs) == (30, 0, 30)
    assert (SDCLR_RECIPE.milestones, SDCLR_RECIPE.batch_size, SDCLR_RECIPE.init_std) == ((10, 20), 128, 0.01)
    assert (SDCLR_FEWSHOT_RECIPE.epochs, SDCLR_FEWSHOT_RECIPE.milestones) == (100, (40, 60))
    assert (BCL_RECIPE.lr, BCL_RECIPE.final_lr, BCL_RECIPE.epochs) == (1e-2, 1e-6, 500)
    assert (BCL_RECIPE.weight_decay, BCL_RECIPE.batch_size, BCL_RECIPE.optimiser) == (5e-6, 1000, "adam")
    assert not any(recipe.normalise for recipe in (SDCLR_RECIPE, SDCLR_FEWSHOT_RECIPE, BCL_RECIPE))


EVERY = ["knn1", "knn5_weighted", "linear", "linear_sdclr", "linear_bcl", "fewshot3", "labels10", "nmi", "ari",
         "transfer/pets", "transfer/cifar10"]  # fmt: skip


@pytest.fixture(scope="module")
def result() -> dict:
    bank, y = separable(80, noise=0.1)
    test, wanted = separable(40, seed=1, noise=0.1)
    keep = wanted != 3
    x, z = separable(60, seed=2, noise=0.1)
    hits = torch.tensor([0] * 30 + [1] * 10)  # of an uneven test set, whose class 1 looks like class 2
    pets = TransferFeatures(x, z, test[[0] * 30 + [2] * 10], hits, CLASSES)
    return evaluate_features(bank, y, test[keep], wanted[keep], classes=CLASSES, train_counts=[40, 20, 5, 1],
                             protocols=EVERY, transfer={"pets": pets, "cifar10": pets},
                             linear_recipe=LinearRecipe(epochs=30, batch_size=8, lr=0.1))  # fmt: skip


def test_every_protocol_has_its_numbers_and_is_stored(result: dict) -> None:
    assert all(list(result[section]) == EVERY for section in SECTIONS)
    named = {
        "isd_knn",
        "npid_knn",
        "linear",
        "sdclr_linear",
        "bcl_linear",
        "sdclr_fewshot",
        "kmeans",
        "logistic_lbfgs",
    }
    assert {result["protocol"][name]["name"] for name in EVERY} == named
    assert all(result["protocol"][name]["version"] == 1 for name in EVERY)
    for name in EVERY[:7]:
        assert result["metrics"][name] == 100, name
        assert result["per_class"][name] == [100, 100, 100, None], name
        assert result["groups"][name].keys() == {"many", "medium", "few"}
    assert json.loads(json.dumps(result))["protocol"]["fewshot3"]["labels"] == "3 a class"


def test_clusters_have_one_number_and_no_groups(result: dict) -> None:
    for name in ("nmi", "ari"):
        assert result["metrics"][name] == pytest.approx(100)
        assert result["groups"][name] is None
        assert result["per_class"][name] is None
    assert result["protocol"]["nmi"]["clusters"] == 3  # the test set lacks a class


def test_transfer_is_reported_by_the_metric_of_the_set(result: dict) -> None:
    assert result["metrics"]["transfer/pets"] == 50  # mean of class 0 and class 1
    assert result["metrics"]["transfer/cifar10"] == 75
    assert result["class_mean"]["transfer/cifar10"] == 50
    assert result["per_class"]["transfer/pets"] == [100, 0, None, None]
    assert result["groups"]["transfer/pets"] == {}
    assert result["protocol"]["transfer/pets"]["metric"] == "mean per class"
    assert "lambda" in result["details"]["transfer/pets"]


def test_few_shot_is_the_mean_over_its_draws() -> None:
    bank, y = separable(80, noise=2.0)
    test, wanted = separable(200, seed=1, noise=2.0)
    r = evaluate_features(bank, y, test, wanted, classes=CLASSES, train_counts=[4, 3, 2, 1], protocols=["fewshot2"],
                          seed=3)  # fmt: skip
    single = []
    for seed in range(15, 20):
        rows = balanced(y, 2, CLASSES, seed)
        found, _ = linear(
            [bank[rows]], y[rows], test, classes=CLASSES, recipe=SDCLR_FEWSHOT_RECIPE, seed=seed
        )
        single.append(100 * float((found == wanted).float().mean()))
    assert r["details"]["fewshot2"]["accuracy_of_draws"] == pytest.approx(single)
    assert len(set(single)) > 1
    assert r["metrics"]["fewshot2"] == pytest.approx(sum(single) / 5)
    assert r["class_mean"]["fewshot2"] == pytest.approx(sum(r["per_class"]["fewshot2"]) / 4)


def test_labels_are_a_share_of_every_class() -> None:
    bank, y = separable(80, noise=1.0)
    test, wanted = separable(100, seed=1, noise=1.0)
    options = {"classes": CLASSES, "train_counts": [4, 3, 2, 1], "linear_recipe": LinearRecipe(epochs=4)}
    r = evaluate_features(bank, y, test, wanted, protocols=["labels10", "linear"], seed=2, **options)
    rows = share(y, 10, CLASSES, 2)
    found, _ = linear([bank[rows]], y[rows], test, classes=CLASSES, recipe=LinearRecipe(epochs=4), seed=2)
    assert r["metrics"]["labels10"] == pytest.approx(100 * float((found == wanted).float().mean()))
    assert r["protocol"]["labels10"]["train_images"] == 8
    assert r["metrics"]["labels10"] != r["metrics"]["linear"]


def test_what_cannot_be_had_is_left_out_with_its_reason() -> None:
    bank, y = separable(20)
    names = ["knn1", "knn30", "fewshot6", "labels1", "transfer/dtd"]
    r = evaluate_features(bank, y, bank, y, classes=CLASSES, train_counts=[4, 3, 2, 1], protocols=names)
    reasons = ["20 images, fewer than k = 30", "5 images in the bank, fewer than 6", "of which 1 % is none",
               "no features of this set"]  # fmt: skip
    assert r["metrics"] == {"knn1": 100, **dict.fromkeys(names[1:])}
    for name, words in zip(names[1:], reasons, strict=True):
        assert words in r["protocol"][name]["left_out"]


def test_a_bank_that_is_not_in_memory_is_searched_and_trains_nothing() -> None:
    bank, y = separable(20)

    def search(queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert k == 3
        return torch.ones(len(queries), k), torch.arange(20)[:, None].repeat(1, k)

    r = evaluate_features(None, y, bank, y, classes=CLASSES, train_counts=[4, 3, 2, 1],
                          protocols=["knn1", "knn3", "linear"], search=search)  # fmt: skip
    assert r["metrics"] == {"knn1": 100, "knn3": 100, "linear": None}
    assert "does not fit" in r["protocol"]["linear"]["left_out"]
