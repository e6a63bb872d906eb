"""Whatever a command line or a YAML file says is taken or refused: in words that harm nobody."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from isd_ray.config import Config, flatten, option_names, parse, resolve, to_yaml
from isd_ray.errors import UserError
from isd_ray.methods import METHODS
from isd_ray.study import check as study_check
from isd_ray.study.spec import Study
from isd_ray.sweep.check import check as check_space
from isd_ray.sweep.space import Budget, Space
from isd_ray.train.learnable import check_learnable
from isd_ray.values import faults_of
from isd_ray.yaml_files import parse_mapping

SECRET = "hUsh/hUsh+1"
FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
HUGE = st.sampled_from([10**30, 2**63, -(10**400)])
NUMBERS = st.integers() | st.integers(-10, 10) | st.floats() | HUGE
PLACES = st.sampled_from(
    [
        f"s3://KEY:{SECRET}@bucket/x", f"s3://bucket/x?secret_key={SECRET}", "s3://", "file://",
        f"nosuch://user:{SECRET}@host", "s3://bucket/x", "~nosuch/x", "../..", "/", "", " ", "a\0b",
        "\x1b[31mred", "x" * 5000,
    ]
)  # fmt: skip
WORDS = st.sampled_from(
    ["isd", "resnet18", "timm:nosuch", "knn20", "weak", "cifar10_lt", "nan", "1e400", "9" * 5000]
)
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=30) | PLACES | WORDS
VALUES = st.recursive(
    SCALARS,
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=8), v, max_size=3),
    max_leaves=8,
)
NAMES = (
    st.sampled_from(option_names())
    | st.sampled_from(["train", "data.", ".", "", "Train.lr"])
    | st.text(max_size=12)
)
OPTIONS = st.dictionaries(NAMES, VALUES, max_size=4)


def answer(call: Callable[[], Any], lines: int = 3) -> Any:
    """Return what a call returns, None where it is refused; the refusal is looked at."""
    try:
        return call()
    except UserError as error:
        text = str(error)
    assert text
    assert len(text.splitlines()) <= lines
    assert all(line.isprintable() for line in text.split("\n"))
    assert len(text) < 1000 * lines
    assert "hUsh" not in text
    return None


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


GIVEN = st.text(max_size=20) | SCALARS.map(str) | VALUES.map(repr)


@FEW
@given(st.lists(st.tuples(NAMES, GIVEN), max_size=3))
@example([("data.scheme_options", nested(900))])
@example([("data.scheme_options", "x=" + "[" * 5000)])
@example([("data.mean", "[" * 5000)])
@example([("train.epochs", "9" * 50_000)])
@example([("name", f"s3://KEY:{SECRET}@b"), ("nosuch", "1")])
@example([(f"s3://KEY:{SECRET}@b", "1")])
def test_any_command_line(pairs):
    arguments = [part for name, value in pairs if name != "help" for part in (f"--{name}", value)]
    config = answer(lambda: parse(arguments))
    if config is not None:
        usable(config)


@FEW
@given(st.lists(st.text(max_size=12) | PLACES, max_size=4))
def test_any_words_on_the_command_line(words):
    answer(lambda: parse([word for word in words if not word.startswith(("-h", "--h"))]))


@FEW
@given(OPTIONS)
@example({"train": {"lr": 1}, "train.lr": 2})
@example({"train.epochs": True, "data.mean": [math.nan] * 3, "name": "../x"})
@example({"data.scheme_options": {"files": [f"s3://KEY:{SECRET}@b"]}})
@example({"data.scheme_options": {f"s3://KEY:{SECRET}@b": {}}})
def test_any_options_of_a_file(options):
    text = yaml.safe_dump(options)
    config = answer(lambda: resolve(parse_mapping(text, "config file x.yaml")))
    if config is not None:
        usable(config)


def usable(config: Config) -> None:
    """What was taken can be saved, read back, and looked at before a run."""
    assert resolve(parse_mapping(to_yaml(config), "config.yaml")) == config
    numbers = [v for v in flatten(config.model_dump()).values() if isinstance(v, float)]
    assert all(map(math.isfinite, numbers))
    answer(lambda: check_learnable(config))


SETTINGS = st.sampled_from(
    [
        "method.temperature",
        "method.momentum",
        "train.lr",
        "queue.size",
        "method.views",
        "model.backbone",
        "name",
    ]
) | st.text(max_size=10)
RANGES = st.fixed_dictionaries(
    {},
    optional={
        name: st.lists(NUMBERS, min_size=2, max_size=2) | VALUES
        for name in ("uniform", "loguniform", "int", "choice", "step", "when", "nosuch")
    },
)
CONSTRAINTS = st.text("abc.<>=+-*/()1 \"'\\_", max_size=30)
SPACES = st.fixed_dictionaries(
    {"space": st.dictionaries(SETTINGS, RANGES | VALUES, max_size=3) | VALUES},
    optional={
        "config": OPTIONS | VALUES,
        "constraints": st.lists(CONSTRAINTS | SCALARS, max_size=3) | VALUES,
        "goals": st.lists(st.sampled_from(["student.knn20", "x"]) | SCALARS, max_size=3) | VALUES,
        "start": st.lists(OPTIONS, max_size=2) | VALUES,
        "budget": st.dictionaries(st.sampled_from(list(Budget.model_fields)), VALUES) | VALUES,
        "description": SCALARS,
    },
)


def read_as_space(content: dict[str, Any]) -> Any:
    try:
        return Space(**parse_mapping(yaml.safe_dump(content), "space x.yaml"))
    except ValidationError as error:
        raise UserError("; ".join(faults_of(Space, error)[:3])) from None


@FEW
@given(SPACES)
@example({"space": {"train.lr": {"uniform": [0.1, 0.2], "when": {f"s3://K:{SECRET}@b": 1}}}})
@example({"space": {"train.lr": {f"s3://K:{SECRET}@b": [1]}}})
@example({"space": {"train.lr": {"loguniform": [0.01, 0.1]}}, "constraints": ["-" * 400 + "1 < 2"]})
@example({"space": {"train.lr": {"loguniform": [0.01, 0.1]}}, "constraints": ["(" * 400 + "1 < 2"]})
@example({"space": {"train.lr": {"loguniform": [0.01, 0.1]}}, "budget": {"trials": 10**12}})
@example({"space": {"model.backbone": {"choice": ["resnet8", "resnet19"]}}})
def test_any_space(content):
    space = answer(lambda: read_as_space(content))
    if space is not None:
        answer(lambda: check_space(space), lines=10)  # one line, of up to twenty faults


def named(*names: str, of: Any) -> Any:
    return st.dictionaries(st.sampled_from(names) | st.text(max_size=8), of, max_size=2) | VALUES


IMBALANCE = st.fixed_dictionaries(
    {"scheme": st.sampled_from(["exponential", "step", "nosuch"])},
    optional={
        "ratio": NUMBERS,
        "options": VALUES,
        "splits": st.lists(SCALARS, max_size=3) | VALUES,
    },
)
STUDIES = st.fixed_dictionaries(
    {
        "methods": named("isd", "moco_v2", of=OPTIONS),
        "data": named("embedded_lt", of=OPTIONS),
        "imbalances": named("exp", of=IMBALANCE | VALUES),
        "baseline": st.sampled_from(["isd", "moco_v2"]) | st.text(max_size=8),
    },
    optional={
        "config": OPTIONS,
        "seeds": st.lists(NUMBERS, max_size=3) | VALUES,
        "metrics": st.lists(st.sampled_from(["student.knn20"]) | SCALARS, max_size=2) | VALUES,
        "description": SCALARS,
        "pictures": VALUES,
        "resources": VALUES,
    },
)
GOOD = {
    "methods": {"isd": {}},
    "data": {"embedded_lt": {}},
    "imbalances": {"exp": {"scheme": "exponential"}},
    "baseline": "isd",
}


@pytest.fixture(autouse=True)
def without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are looked at elsewhere."""
    monkeypatch.setattr(study_check, "look_at", lambda study, configs, faults: {})


@FEW
@given(STUDIES)
@example(GOOD | {"data": {"x": {"data": 5}}})
@example(GOOD | {"methods": {"isd": {"method": {"views": {}}}}})
@example(GOOD | {"imbalances": {"../x": {"scheme": "exponential", "splits": ["a/b", "\x1b", -1]}}})
@example(GOOD | {"seeds": list(range(1000)), "methods": {f"m{i}": {} for i in range(1000)}})
@example(GOOD | {"methods": {f"s3://K:{SECRET}@b": {}}, "baseline": f"s3://K:{SECRET}@b"})
@example(GOOD | {"methods": {"isd": {f"s3://K:{SECRET}@b": {}}}})
@example(GOOD | {"config": {"model.backbone": "resnet19"}})
def test_any_study(content):
    text = yaml.safe_dump(content)
    answer(lambda: study_check.check(parse_mapping(text, "study x.yaml")), lines=22)  # one a fault


def test_a_good_study_is_taken():
    assert study_check.check(GOOD).study == Study(**GOOD)


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_comes_with_is_taken(name):
    given = {"method.teacher": "x.pth"} if "method.teacher" in METHODS[name].defaults else {}
    assert answer(lambda: resolve({"method.name": name, **given})) is not None
