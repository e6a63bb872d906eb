"""Draws of labelled subsets, clusters and logistic regression: by hand, by their properties, against scikit-learn."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch.nn import functional as F

from isd_ray.evaluate import draws
from isd_ray.evaluate.clustering import agreement, clusters
from isd_ray.evaluate.logistic import LAMBDAS, choose, fit, middle_of_best, transfer

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(torch.tensor)


def blobs(n: int, d: int, classes: int, seed: int, noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    return centres[y] + noise * torch.randn(n, d, generator=g), y


@settings(max_examples=40, deadline=None)
@given(LABELS, st.integers(1, 12), st.integers(0, 5))
def test_a_balanced_draw_takes_as_many_of_each_class_and_grows_within_itself(y, images, seed) -> None:
    rows = draws.balanced(y, images, 6, seed)
    counts, drawn = torch.bincount(y, minlength=6), torch.bincount(y[rows], minlength=6)
    assert torch.equal(drawn, counts.clamp(max=images))
    assert len(rows.unique()) == len(rows)
    assert set(rows.tolist()) <= set(draws.balanced(y, images + 3, 6, seed).tolist())
    assert torch.equal(rows, draws.balanced(y, images, 6, seed))


@settings(max_examples=40, deadline=None)
@given(LABELS, st.integers(1, 100), st.integers(0, 5))
def test_a_share_is_drawn_from_every_class(y, percent, seed) -> None:
    drawn = torch.bincount(y[draws.share(y, percent, 5, seed)], minlength=5)
    assert drawn.tolist() == [(n * percent + 50) // 100 for n in torch.bincount(y, minlength=5).tolist()]


@settings(max_examples=40, deadline=None)
@given(LABELS, st.sampled_from([0.1, 0.2, 0.5]))
def test_a_split_parts_the_rows_and_leaves_every_class_something_to_train_on(y, part) -> None:
    rest, held = draws.split(y, part, 5, seed=1)
    assert torch.cat([rest, held]).sort().values.tolist() == list(range(len(y)))
    assert set(y[rest].tolist()) == set(y.tolist())
    for c, n in enumerate(torch.bincount(y, minlength=5).tolist()):
        assert int((y[held] == c).sum()) >= min(1, n - 1)


def test_draws_differ_with_the_seed() -> None:
    y = torch.arange(200) % 2
    assert not torch.equal(draws.balanced(y, 10, 2, 0), draws.balanced(y, 10, 2, 1))


def test_clusters_of_clear_groups_are_the_classes() -> None:
    x, y = blobs(150, 8, 3, 0, noise=0.05)
    found = clusters(x * torch.rand(150, 1).add(0.1), 3)  # only directions count
    assert agreement(found, y) == {"nmi": pytest.approx(100), "ari": pytest.approx(100)}
    assert agreement(torch.zeros_like(y), y) == {"nmi": pytest.approx(0), "ari": pytest.approx(0)}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=40),
    st.permutations(range(4)),
)
def test_agreement_is_scikit_learns_and_blind_to_the_names_of_clusters(pairs, names) -> None:
    a, b = torch.tensor(pairs).T
    expected = {"nmi": normalized_mutual_info_score(b, a), "ari": adjusted_rand_score(b, a)}
    assert agreement(a, b) == {key: pytest.approx(100 * value) for key, value in expected.items()}
    assert agreement(torch.tensor(names)[a], b) == {k: pytest.approx(v) for k, v in agreement(a, b).items()}


@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0])
def test_logistic_regression_is_scikit_learns(penalty: float) -> None:
    x, y = blobs(150, 6, 3, 0)
    weight, bias = fit(x.double(), y, 3, penalty)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        peer = LogisticRegression(C=1 / (penalty * 150), tol=1e-8, max_iter=2000).fit(
            x.double().numpy(), y.numpy()
        )
    assert torch.allclose(weight, torch.tensor(peer.coef_), atol=2e-3)
    shift = torch.tensor(peer.intercept_)  # biases are free of penalty: they are equal up to a constant
    assert torch.allclose(bias - bias.mean(), shift - shift.mean(), atol=2e-3)


def test_the_gradient_vanishes_where_the_fit_ends() -> None:
    x, y = blobs(200, 10, 4, 1)
    weight, bias = fit(x.double(), y, 4, 1e-3)
    error = (x.double() @ weight.T + bias).softmax(1) - F.one_hot(y, 4)
    assert (error.T @ x.double() / 200 + 1e-3 * weight).abs().max() < 2e-5
    assert error.mean(0).abs().max() < 2e-5


def test_the_penalty_is_chosen_on_held_out_images_and_the_head_fitted_again_on_all() -> None:
    x, y = blobs(90, 20, 3, 0, noise=3)
    test, _ = blobs(300, 20, 3, 1, noise=3)
    lambdas = (1e-6, 1e-3, 1e-1, 10.0)
    found, protocol, details = transfer(x, y, test, classes=3, metric="top-1", lambdas=lambdas, seed=4)
    rest, held = draws.split(y, 0.2, 3, 4)
    shown = choose(x[rest], y[rest], x[held], y[held], 3, "top-1", lambdas)
    assert details["validation_accuracy"] == max(shown.values())
    assert details["lambda"] == middle_of_best(shown)
    weight, bias = fit(torch.cat([x[rest], x[held]]), torch.cat([y[rest], y[held]]), 3, details["lambda"])
    assert torch.equal(found, (test @ weight.T + bias).argmax(1))
    assert (protocol["train_images"], protocol["chosen_on"]) == (90, "0.2 of every training class")
    own = transfer(
        x[rest], y[rest], test, classes=3, metric="top-1", validation=(x[held], y[held]), lambdas=lambdas
    )
    assert torch.equal(own[0], found)
    assert own[1]["chosen_on"] == "the set's validation split"


def test_the_mean_per_class_chooses_another_penalty_than_top_1_where_classes_are_uneven() -> None:
    """A strong penalty answers the frequent class: good for top-1, bad for the mean over classes."""
    g = torch.Generator().manual_seed(0)
    y = torch.tensor([0] * 190 + [1] * 10)
    x = torch.randn(200, 4, generator=g) + 0.8 * y[:, None]
    held = torch.cat([x, torch.randn(200, 4, generator=g) + 0.8 * y[:, None]]), torch.cat([y, y])
    top1, per_class = (
        choose(x, y, *held, 2, metric, (1e-3, 100.0)) for metric in ("top-1", "mean per class")
    )
    assert top1[100.0] == pytest.approx(95)
    assert per_class[100.0] == pytest.approx(50)
    assert per_class[1e-3] > 55


def test_of_equally_good_penalties_the_middle_one_is_taken() -> None:
    assert middle_of_best({1.0: 50, 10.0: 80, 100.0: 80, 1000.0: 80, 1e4: 70}) == 100.0
    assert middle_of_best({1.0: 80, 10.0: 80}) == 1.0
    assert middle_of_best({1.0: 10, 10.0: 80}) == 10.0


def test_the_penalties_are_the_published_45() -> None:
    assert len(LAMBDAS) == 45
    assert LAMBDAS[0] == pytest.approx(1e-6)
    assert LAMBDAS[-1] == pytest.approx(1e5)
