"""Groups of classes and their accuracies, by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isd_ray.errors import UserError
from isd_ray.evaluate.groups import class_groups, scores

CIFAR10_LT = [4500, 2697, 1617, 969, 581, 348, 208, 125, 75, 45]


def test_thirds_of_cifar_lt() -> None:
    assert class_groups(CIFAR10_LT) == {"many": [0, 1, 2, 3], "medium": [4, 5, 6], "few": [7, 8, 9]}
    cifar100 = [int(450 * 0.01 ** (i / 99)) for i in range(100)]
    assert {g: len(c) for g, c in class_groups(cifar100).items()} == {"many": 34, "medium": 33, "few": 33}


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40))
def test_thirds_part_the_classes_and_are_ordered_by_count(counts: list[int]) -> None:
    groups = class_groups(counts)
    if len(set(counts)) == 1:
        assert groups == {}
        return
    assert sorted(c for members in groups.values() for c in members) == list(range(len(counts)))
    assert len(groups.get("few", [])) == len(groups.get("medium", [])) == len(counts) // 3
    for upper, lower in (("many", "medium"), ("medium", "few")):
        if lower in groups:
            assert min(counts[c] for c in groups[upper]) >= max(counts[c] for c in groups[lower])


def test_thresholds_and_their_inclusive_form_differ_at_the_border_only() -> None:
    counts = [101, 100, 99, 21, 20, 19, 0]
    assert class_groups(counts, "thresholds") == {"many": [0], "medium": [1, 2, 3, 4], "few": [5, 6]}
    inclusive = class_groups(counts, "thresholds", inclusive=True)
    assert inclusive == {"many": [0, 1], "medium": [2, 3], "few": [4, 5, 6]}
    assert class_groups([500, 300], "thresholds") == {"many": [0, 1]}


def test_large_and_small_of_the_8_30_scheme() -> None:
    counts = [1300] * 7 + [772] + [100] * 30
    assert class_groups(counts, "large_small") == {"large": list(range(8)), "small": list(range(8, 38))}
    assert class_groups([5, 5, 5], "large_small") == {}
    assert class_groups([4000, 0], "large_small") == {"large": [0], "small": [1]}


def test_of_equal_counts_the_later_label_is_the_rarer() -> None:
    assert class_groups([9, 5, 5, 5, 5, 5]) == {"many": [0, 1], "medium": [2, 3], "few": [4, 5]}


def test_counts_may_be_a_tensor() -> None:
    assert class_groups(torch.tensor(CIFAR10_LT)) == class_groups(CIFAR10_LT)


def test_wrong_names_and_thresholds_are_refused() -> None:
    with pytest.raises(UserError, match="Did you mean 'thirds'"):
        class_groups(CIFAR10_LT, "third")
    with pytest.raises(UserError, match="few = 200 lies above many = 100"):
        class_groups(CIFAR10_LT, "thresholds", few=200)


def test_scores_by_hand() -> None:
    #                      class 0: 3 of 4         1: 1 of 2  2: 0 of 1  3: no test image
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    predictions = torch.tensor([0, 0, 0, 3, 1, 2, 0])
    s = scores(predictions, labels, 4, {"many": [0, 1], "few": [2, 3]})
    assert s["per_class"] == [75.0, 50.0, 0.0, None]
    assert s["accuracy"] == pytest.approx(100 * 4 / 7)
    assert s["class_mean"] == pytest.approx(125 / 3)
    assert s["groups"] == {"many": 62.5, "few": 0.0}
    assert s["std"] == pytest.approx(31.25)  # population std of two values: half their distance


def test_a_group_without_test_images_has_no_accuracy_and_no_std() -> None:
    s = scores(torch.tensor([0, 1]), torch.tensor([0, 1]), 3, {"many": [0, 1], "few": [2]})
    assert s["groups"] == {"many": 100.0, "few": None}
    assert s["std"] is None
    assert scores(torch.tensor([0]), torch.tensor([0]), 1, {})["std"] is None
