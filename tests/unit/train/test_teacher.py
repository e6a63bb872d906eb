"""A frozen teacher comes out of a run's folder whole, or one line says what is wrong with it."""

import pytest
import torch
import yaml

from isd_ray.config import MethodConfig, resolve
from isd_ray.errors import UserError
from isd_ray.models.backbones import build_backbone
from isd_ray.train.folder import RunFolder, save_checkpoint
from isd_ray.train.teacher import find_in_run, load_teacher

OWN = {"model.backbone": "resnet8", "model.stem": "stride2"}


@pytest.fixture
def run(tmp_path):
    """A finished run, as far as a teacher is concerned."""
    folder = RunFolder(str(tmp_path / "run"))
    config = resolve({"data.dataset": "embedded_lt", **OWN})
    folder.write("config.yaml", yaml.safe_dump(config.model_dump()).encode())
    folder.write_json("result.json", {})
    keep(folder, build_backbone("resnet8", "stride2").state_dict())
    return folder


def keep(folder, weights, prefix="student.backbone.") -> None:
    if isinstance(weights, dict):
        weights = {prefix + name: value for name, value in weights.items()}
    save_checkpoint(folder, {"step": 1, "method": weights, "optimizer": {}, "queue": None, "bank": None}, 1)


def load(folder):
    options = {"data.dataset": "embedded_lt", "method.name": "seed", "method.teacher": folder.uri}
    return load_teacher(resolve(options))


def test_a_run_is_taken_whole(run):
    teacher = load(run)
    assert (teacher.network.arch, teacher.network.stem_kind) == ("resnet8", "stride2")
    assert find_in_run(MethodConfig(teacher=run.uri)).image_size == 32


@pytest.mark.parametrize(
    ("section", "value"),
    [("model", 5), ("model", {"backbone": ["resnet8"]}), ("data", {"mean": "x"}), ("data", None)],
)
def test_damaged_options_are_said_in_one_line(run, section, value):
    options = yaml.safe_load(run.read("config.yaml")) | {section: value}
    run.write("config.yaml", yaml.safe_dump(options).encode())
    with pytest.raises(UserError, match=section) as error:
        load(run)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (["no", "mapping"], "trained no such network"),
        ({}, "trained no such network"),
        ({"conv1.weight": torch.ones(1)}, "does not match"),
        ({"conv1.weight": "text"}, "conv1.weight: a str in the file"),
        (build_backbone("resnet14").state_dict(), "only in the file"),
    ],
)
def test_weights_that_do_not_fit_are_named(run, weights, words):
    keep(run, weights)
    with pytest.raises(UserError, match=words) as error:
        load(run)
    assert str(error.value).isprintable()
