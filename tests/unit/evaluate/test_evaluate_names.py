"""Names of protocols and every fault that shows before anything runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from isd_ray.config import resolve, to_yaml, validate
from isd_ray.errors import UserError
from isd_ray.evaluate.names import (
    ALONG,
    class_faults,
    examples,
    listing,
    name_faults,
    parse,
    size_faults,
    transfer_faults,
)
from isd_ray.evaluate.protocols import PROTOCOLS
from isd_ray.evaluate.protocols.labels import share_of

DOCS = Path(__file__).parents[3] / "docs/evaluation.md"


@pytest.mark.parametrize(
    ("name", "form", "number", "target", "title"),
    [
        ("knn20", "knnK", 20, "", "20-NN"),
        ("knn200_weighted", "knnK_weighted", 200, "", "200-NN\nweighted"),
        ("fewshot5", "fewshotN", 5, "", "5-shot"),
        ("labels100", "labelsP", 100, "", "100 %\nlabels"),
        ("linear_bcl", "linear_bcl", 0, "", "linear\nBCL"),
        ("transfer/dtd", "transfer/SET", 0, "dtd", "to\ndtd"),
    ],
)
def test_a_name_is_read_into_its_parts(name: str, form: str, number: int, target: str, title: str) -> None:
    found = parse(name)
    assert (found.protocol.form, found.number, found.target) == (form, number, target)
    assert found.title == title


def test_every_name_belongs_to_one_protocol() -> None:
    for protocol in PROTOCOLS:
        assert protocol.examples
        for name in protocol.examples:
            assert [p for p in PROTOCOLS if re.fullmatch(p.pattern, name)] == [protocol], name
            assert "." not in name, "goals and metrics are network.metric.group"
    forms = [protocol.form for protocol in PROTOCOLS]
    assert len(set(forms)) == len(forms)


def test_every_protocol_is_listed_with_what_it_is_and_needs() -> None:
    lines = listing().splitlines()
    assert [line.split()[0] for line in lines] == [protocol.form for protocol in PROTOCOLS]
    for line, protocol in zip(lines, PROTOCOLS, strict=True):
        assert protocol.help in line
        assert ("bank in memory" in line) == protocol.whole_bank
        assert not protocol.whole_bank or protocol.bank


def test_the_documentation_says_what_the_protocols_are() -> None:
    """The first two columns of its table are the records'; a protocol that is gone has no row."""
    records = {protocol.form: protocol.help for protocol in PROTOCOLS}
    part = DOCS.read_text().split("## The table")[1].split("\n## ")[0]
    rows = [line.split(" | ")[:2] for line in part.splitlines() if line.startswith("| `")]
    told = {form.strip("|` "): what for form, what in rows}
    assert len(told) >= 10
    assert told.items() <= records.items()


def test_names_are_known_without_torch() -> None:
    code = "import sys, isd_ray.config, isd_ray.evaluate.names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("linear_sdlcr", "Did you mean 'linear_sdclr'?"),
        ("knn0", "unknown protocol 'knn0'"),
        ("knn" + "9" * 5000, "unknown protocol 'knn999"),
        ("knn\u0663", "unknown protocol 'knn"),
        ("knn1\x1b", r"unknown protocol 'knn1\x1b'"),
        ("labels101", "unknown protocol 'labels101'"),
        ("fewshot", "Did you mean 'fewshot10'?"),
        ("transfer/cifar11", "Did you mean 'transfer/cifar10'?"),
        ("transfer/xyz", "transfer/SET: transfer/food101, transfer/cifar10"),
        ("knn20 ", "Did you mean 'knn20'?"),
        ("", "unknown protocol ''"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        parse(name)
    assert words in str(error.value)
    assert len(str(error.value)) < 800
    assert str(error.value).isprintable()


def test_faults_of_names_come_at_once() -> None:
    faults = name_faults(["lineer", "nmi", "nmi", "linear"])
    assert len(faults) == 2
    assert "unknown protocol 'lineer'. Did you mean 'linear'?" in faults[0]
    assert "protocol 'nmi' is named twice" in faults[1]
    assert name_faults(["linear"], cheap=True) != []
    assert len(name_faults([])) == len(name_faults([], cheap=True)) == 1
    assert name_faults(examples()) == name_faults(examples(cheap=True), cheap=True) == []


def test_transfer_needs_to_know_where_the_sets_lie() -> None:
    fault = transfer_faults(["nmi", "transfer/pets"], None)[0]
    assert "transfer/pets: give --evaluate.transfer_root" in fault
    assert transfer_faults(["transfer/pets"], "/data") == transfer_faults(["nmi"], None) == []


def test_what_the_sets_are_too_small_for_is_said() -> None:
    names = ["knn100", "knn101", "fewshot10", "fewshot11", "labels5", "labels4", "nmi"]
    assert list(size_faults(names, [80, 10, 10, 0], [9, 9, 0, 9])) == [
        "knn101: the bank has 100 images, fewer than k = 101",
        "fewshot11: class 1 has 10 images in the bank, fewer than 11",
        "labels4: class 1 has 10 images in the bank, of which 4 % is none",
    ]
    possible = [name for name in examples() if name != "knn200_weighted"]
    assert list(size_faults(possible, [100] * 3, [5] * 3)) == []
    assert list(size_faults(["nmi"], [100, 0], [5, 0])) == [
        "nmi: the test set has 1 classes; clusters are compared with at least 2"
    ]
    assert "a classifier needs at least 2" in next(size_faults(["linear"], [1], [1]))


def test_classes_that_one_set_lacks_are_named() -> None:
    assert class_faults([100] * 3, [5] * 3) == []
    untested, unlabelled = class_faults([80, 10, 10, 0], [9, 9, 0, 9])
    assert "class 2 has labelled images and no test image" in untested
    assert "class 3 has test images and none in the bank" in unlabelled


@given(st.integers(0, 5000), st.integers(1, 100))
def test_a_share_is_never_more_than_half_an_image_off(images: int, percent: int) -> None:
    assert abs(share_of(images, percent) - images * percent / 100) <= 0.5
    assert share_of(images, 100) == images


def test_the_configuration_refuses_names_that_do_not_exist() -> None:
    with pytest.raises(UserError, match=r"evaluate.protocols.*'knn_20'.*Did you mean 'knn20'.*twice"):
        resolve({"evaluate.protocols": ["knn_20", "nmi", "nmi"]})
    with pytest.raises(UserError, match=r"evaluate.along.*linear takes too long.*choose of .*knnK"):
        resolve({"evaluate.along": ["knn20", "linear"]})


@pytest.mark.parametrize("read", [validate, resolve])
def test_linear_false_of_a_saved_run_is_protocols_without_linear(read) -> None:
    """Older runs have saved both; what is written today has one way to say it."""
    assert read({"evaluate": {"linear": False}}).evaluate.protocols == list(ALONG)
    saved = yaml.safe_load(to_yaml(validate({})))
    assert "linear" not in saved["evaluate"]
    for linear, left in ((False, ["nmi"]), (True, ["linear", "nmi"])):
        saved["evaluate"] |= {"linear": linear, "protocols": ["linear", "nmi"]}
        assert read(saved).evaluate.protocols == left
    with pytest.raises(UserError, match=r"evaluate\.linear"):
        read({"evaluate": {"linear": "maybe"}})
