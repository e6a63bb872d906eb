"""Layers win in their order, everything can be fed back, and every mistake is named with its nearest right name."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from isd_ray.config import Config, flatten, merge, option_names, parse, read_yaml, resolve, to_yaml
from isd_ray.data.catalog import load_definition, names
from isd_ray.errors import UserError
from isd_ray.layers import unfold
from isd_ray.methods import METHODS
from isd_ray.study.spec import Study
from isd_ray.sweep.space import Space
from isd_ray.values import kinds_of, path_of


def test_command_line_wins_over_file_and_defaults(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train.lr: 0.3\ntrain:\n  epochs: 7\nmethod:\n  name: isd_plus\n")
    config = parse(["--config", str(recipe), "--train.epochs", "9"])
    assert (config.train.lr, config.train.epochs, config.method.name) == (0.3, 9, "isd_plus")


def test_method_defaults_apply_below_the_user(tmp_path):
    plus = resolve({"method.name": "isd_plus", "data.dataset": "imagenet"})
    assert (plus.method.temperature, plus.method.temperature_teacher) == (0.1, 0.01)
    chosen = resolve({"method.name": "isd_plus", "data.dataset": "imagenet", "method.temperature": 0.5})
    assert (chosen.method.temperature, chosen.method.temperature_teacher) == (0.5, 0.01)
    lower = resolve({"method.name": "isd_plus", "data.dataset": "cifar10_lt"})
    assert lower.method.temperature_teacher == 0.05  # the data set's own value for this method


def test_a_method_has_its_own_options_and_no_others():
    for name, method in METHODS.items():
        for dataset in ("imagenet", "embedded_lt", "cifar10_lt"):
            flat = flatten(resolve({"method.name": name, "data.dataset": dataset}).model_dump())
            given = {o for o, value in flat.items() if o.startswith("method.") and value is not None}
            assert given - {"method.name"} == {
                o for o, value in method.defaults.items() if o.startswith("method.") and value is not None
            }
            assert (flat["queue.exclude_own"] is not None) == ("queue.exclude_own" in method.defaults)


def test_options_of_other_methods_are_refused_with_their_owners():
    with pytest.raises(
        UserError, match=r"--method.neighbours: method 'isd' has no such option; .*: msf, fnc$"
    ):
        parse(["--method.name", "isd", "--method.neighbours", "3"])
    with pytest.raises(
        UserError, match=r"method.momentum: method 'simclr' .*: isd, .*moco_v2.*method.weight"
    ):
        resolve({"method": {"name": "simclr", "momentum": 0.9, "weight": 1.0}})
    with pytest.raises(UserError, match=r"--queue.exclude_own: method 'msf' has no such option"):
        parse(["--method.name", "msf", "--queue.exclude_own", "true"])
    assert parse(["--queue.exclude_own", "false"]).queue.exclude_own is False
    assert resolve({"method.name": "msf", "method.neighbours": 3}).method.neighbours == 3
    assert resolve({"method.name": "isd", "method.momentum": None}).method.momentum == 0.97  # the data set's


@pytest.mark.parametrize("name", METHODS)
def test_resolved_config_of_every_method_feeds_back(name, tmp_path):
    config = resolve({"method.name": name})
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert parse(["--config", str(path)]) == config


@pytest.mark.parametrize("dataset", names())
def test_data_sets_name_options_that_their_methods_have(dataset):
    for name, options in load_definition(dataset).methods.items():
        assert {o for o in options if o.startswith("method.")} <= METHODS[name].defaults.keys(), name


def test_arguments_of_a_scheme_come_as_a_mapping():
    for given in ("n_max=500", '{"n_max": 500}'):
        config = parse(["--data.dataset", "cifar10_lt", "--data.scheme_options", given])
        assert config.data.scheme_options == {"n_max": 500}


def test_resolved_config_feeds_back(tmp_path):
    config = resolve({"train.epochs": 3, "method.views": ["weak", "strong"]})
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert parse(["--config", str(path)]) == config


def test_environment_does_not_leak_in(monkeypatch):
    monkeypatch.setenv("NAME", "stray")
    monkeypatch.setenv("OUTPUT", "/stray")
    assert (resolve({}).name, resolve({}).output) == (None, "runs")


def test_merge_unfolds_dotted_names():
    assert merge({"a.b": 1, "a": {"c": 2}}, {"a.b": 3}) == {"a": {"b": 3, "c": 2}}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train.epocs", "3"], ["--train.epocs", "'train.epochs'"]),
        (["--train.epocs", "3", "--queue.sise", "4"], ["'train.epochs'", "'queue.size'"]),
        (["--train.epochs", "0"], ["--train.epochs", "greater than or equal to 1"]),
        (["--train.epochs", "x", "--queue.layout", "ring"], ["--train.epochs", "--queue.layout"]),
        (["--method.name", "isdplus"], ["isdplus", "isd_plus"]),
        (["--data.dataset", "cifar10_lr"], ["cifar10_lr", "cifar10_lt"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["stray"], ["stray"]),
        (["--config", ""], ["recipe", "empty"]),
        (["--train.epochs", "3", "4"], ["unrecognized arguments: 4"]),
    ],
)
def test_mistakes_are_named(arguments, words):
    with pytest.raises(UserError) as error:
        parse(arguments)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


IMPOSSIBLE = {
    "data.mean": ["0.5", "[0.5,0.5]", "[nan,0.5,0.5]", "[NaN,0.5,0.5]", "[124,116,104]", "[0.5"],
    "data.std": ["[0.2,0.2]", "[0.2,0.2,0]", "[0.2,0.2,-1]"],
    "train.milestones": ["[0.9,0.7]", "[0.5,0.5]", "[0.5,1.5]", "[nan]"],
    "train.lr": ["nan", "inf", "1e400"],
    "train.warmup_epochs": ["1e300"],
    "method.temperature": ["nan", "inf"],
    "data.max_bad": ["nan"],
    "train.epochs": ["1000000000", str(10**20), "9" * 5000],
    "train.seed": ["-1", str(2**64)],
    "data.subset_seed": [str(2**40)],
    "train.batch_size": [str(10**12)],
    "train.workers": [str(10**9)],
    "train.threads": [str(10**6)],
    "queue.size": [str(10**18)],
    "output": ["", "s3://", "file://", "nosuch://x"],
    "data.root": ["", "a\nb", "y" * 100_000],
    "data.shards": [" ", "x" * 10_000, "s3:///x"],
    "data.dataset": ["", "a\0b"],
    "method.teacher": ["nosuch://x"],
    "evaluate.transfer_root": ["s3://"],
    "model.backbone": [""],
    "address": ["", "ray://user:hush@host:10001"],
    "method.views": [""],
    "name": ["", ".", "..", "../x", "a\0", "x" * 300],
    "data.scheme_options": [
        "split=[1", "{", "x=.nan", '{"x": 1e999}', '{"x":' * 900 + "1" + "}" * 900,
        "x=" + "[" * 3000, '{"x": ' + "9" * 5000 + "}", "files=s3://KEY:hush@bucket/list.txt",
    ],
}  # fmt: skip
CASES = [(option, value) for option, values in IMPOSSIBLE.items() for value in values]


@pytest.mark.parametrize(("option", "value"), CASES)
def test_a_value_that_cannot_be_is_refused_by_the_option_s_name(option, value):
    with pytest.raises(UserError) as error:
        parse([f"--{option}", value])
    text = str(error.value)
    assert option in text
    assert text.isprintable()
    assert len(text) < 900
    assert "hush" not in text


def test_bounds_leave_room_for_what_people_do():
    options = {
        "train.epochs": 10**6,
        "train.seed": 2**32 - 1,
        "train.batch_size": 2**20,
        "queue.size": 10**8,
        "data.mean": [0.0, 1.0, 0.5],
        "data.std": [0.002, 1.0, 0.5],
        "train.milestones": [0.1, 0.5, 0.99],
        "method.views": ["strong", "weak"],
        "name": "a=1,b-2.c+d_e",
        "output": "gs://anonymous@bucket/x",
    }
    flat = flatten(resolve(options).model_dump())
    assert {name: flat[name] for name in options} == options


FILES: dict[type[BaseModel], dict[str, Any]] = {  # and what each of them must have
    Config: {},
    Space: {"space": {}},
    Study: {"methods": {}, "data": {}, "imbalances": {}, "baseline": "isd"},
}


def numbers_of(model: type[BaseModel], within: str = "") -> Iterator[tuple[str, set[Any]]]:
    """Yield every number of a file by dotted name, with its types."""
    for name, field in model.model_fields.items():
        kinds = kinds_of(field.annotation)
        if "dict" in str(field.annotation):
            continue
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from numbers_of(kind, f"{within}{name}.")
        if kinds & {int, float}:
            yield within + name, kinds


@pytest.mark.parametrize("model", FILES)
def test_every_number_of_every_file_is_finite_and_bounded(model):
    """A machine takes literally whatever stands there."""
    model(**FILES[model])
    names = dict(numbers_of(model))
    assert len(names) > 5
    for name, kinds in names.items():
        huge = [] if float in kinds else [10**13, 10**30]
        for value in (math.nan, math.inf, -math.inf, *huge):
            given = [value] if any("list" in str(kind) for kind in kinds) else value
            with pytest.raises(ValidationError) as error:
                model(**FILES[model] | unfold({name: given}))
            assert all(path_of(e).startswith(name) for e in error.value.errors()), (name, value)


@pytest.mark.parametrize(
    ("option", "value"), [("train.epochs", True), ("train.seed", False), ("data.mean", [True] * 3)]
)
def test_yes_and_no_are_no_numbers(option, value):
    """YAML reads `epochs: yes` as true, which Python takes for 1."""
    with pytest.raises(UserError, match=f"--{option}"):
        resolve({option: value})


@pytest.mark.parametrize(
    "option", ["output", "data.root", "data.shards", "method.teacher", "evaluate.transfer_root"]
)
@pytest.mark.parametrize("place", ["s3://KEY:hu/sh@bucket/x", "s3://bucket/x?secret_key=hu/sh"])
def test_a_key_in_a_uri_is_refused_and_not_repeated(option, place, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(f"method: {{name: seed}}\n{option}: {place}\n")
    for arguments in (["--config", str(path)], ["--method.name", "seed", f"--{option}", place]):
        with pytest.raises(UserError, match="AWS_SECRET_ACCESS_KEY") as error:
            parse([*arguments, "--train.epochs", "0"])  # other faults are said beside it
        assert f"--{option}" in str(error.value)
        assert "--train.epochs" in str(error.value)
        assert not any(part in str(error.value) for part in ("hu/", "/sh", "KEY:"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {lr: 1}\ntrain: {epochs: 3}", "'train' stands in line 1 too"),
        ("train.lr: 0.1\ntrain: {lr: 0.2}", "option 'train.lr' stands there twice"),
        ("train: 3\ntrain.lr: 0.2", "option 'train' stands there twice"),
        ("train:\n", "'train' is a group of options"),
        ("train: 3", "'train' is a group of options"),
        ('"\\e[31mtrain": 3', r"unknown option '\x1b[31mtrain'"),
    ],
)
def test_no_option_of_a_file_is_lost_without_a_word(tmp_path, text, words):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        parse(["--config", str(path), "--train.epochs", "3"])
    assert words in str(error.value)


def test_very_many_mistakes_are_still_one_line():
    with pytest.raises(UserError, match="and 492 more") as error:
        resolve({f"nosuch{i}": i for i in range(500)})
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("text", ["train: [1", "- 1\n- 2"])
def test_broken_yaml_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_yaml(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in option_names())


def test_saved_yaml_is_plain():
    assert yaml.safe_load(to_yaml(resolve({})))["train"]["workers"] >= 0
