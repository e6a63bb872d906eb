"""Names of protocols and every fault that shows before anything runs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isd_ray.config import resolve
from isd_ray.errors import UserError
from isd_ray.evaluate.measures import MEASURES
from isd_ray.evaluate.names import EXAMPLES, FAMILIES, Name, check_protocols, parse, share_of


def test_names_are_read_into_family_and_number() -> None:
    assert parse("knn20") == Name("knn", 20)
    assert parse("knn200_weighted") == Name("knn_weighted", 200)
    assert parse("fewshot5") == Name("fewshot", 5)
    assert parse("labels100") == Name("labels", 100)
    assert parse("linear_bcl") == Name("linear_bcl")
    assert parse("transfer/dtd") == Name("transfer", target="dtd")
    assert {parse(name).family for name in EXAMPLES} == set(FAMILIES.values()) == set(MEASURES)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("linear_sdlcr", "Did you mean 'linear_sdclr'?"),
        ("knn0", "unknown protocol 'knn0'"),
        ("labels101", "unknown protocol 'labels101'"),
        ("fewshot", "Did you mean 'fewshot10'?"),
        ("transfer/cifar11", "Did you mean 'transfer/cifar10'?"),
        ("knn20 ", "Did you mean 'knn20'?"),
        ("", "unknown protocol ''"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        parse(name)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_all_faults_come_at_once() -> None:
    names = ["knn100", "knn101", "fewshot10", "fewshot11", "labels5", "labels4", "lineer", "nmi", "nmi",
             "transfer/pets"]  # fmt: skip
    faults = check_protocols(names, [80, 10, 10, 0], [9, 9, 0, 9])
    assert len(faults) == 8
    for words in (
        "unknown protocol 'lineer'. Did you mean 'linear'?",
        "protocol 'nmi' is named twice",
        "transfer/pets: give --evaluate.transfer_root",
        "knn101: the bank has 100 images, fewer than k = 101",
        "fewshot11: class 1 has 10 images in the bank, fewer than 11",
        "labels4: class 1 has 10 images in the bank, of which 4 % is none",
        "class 2 has labelled images and no test image",
        "class 3 has test images and none in the bank",
    ):
        assert any(words in fault for fault in faults), words


def test_what_can_run_has_no_fault() -> None:
    possible = [name for name in EXAMPLES if name != "knn200_weighted"]
    assert check_protocols(possible, [100] * 3, [5] * 3, transfer_root="/data") == []
    assert check_protocols(["nmi"], [100, 0], [5, 0]) == [
        "nmi: the test set has 1 classes; clusters are compared with at least 2"
    ]
    assert check_protocols([], [1], [1]) != []
    assert "a classifier needs at least 2" in check_protocols(["linear"], [1], [1])[0]


@given(st.integers(0, 5000), st.integers(1, 100))
def test_a_share_is_never_more_than_half_an_image_off(images: int, percent: int) -> None:
    assert abs(share_of(images, percent) - images * percent / 100) <= 0.5
    assert share_of(images, 100) == images


def test_the_configuration_refuses_names_that_do_not_exist() -> None:
    with pytest.raises(UserError, match=r"evaluate.protocols.*'knn_20'.*Did you mean 'knn20'.*twice"):
        resolve({"evaluate.protocols": ["knn_20", "nmi", "nmi"]})
    assert resolve({"evaluate.linear": False}).evaluate.chosen == ["knn1", "knn20", "knn200_weighted"]
