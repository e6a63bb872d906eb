"""Layers win in their order, everything can be fed back, and every mistake is named with its nearest right name."""

import pytest
import yaml

from isd_ray.config import flatten, merge, option_names, parse, read_yaml, resolve, to_yaml
from isd_ray.data.catalog import load_definition, names
from isd_ray.errors import UserError
from isd_ray.methods import METHODS


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
    ],
)
def test_mistakes_are_named(arguments, words):
    with pytest.raises(UserError) as error:
        parse(arguments)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


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
