"""What only training would find is said before: by name, with the remedy, and without weights."""

import time

import pytest
import torch
from torch import nn

from isd_ray.config import resolve
from isd_ray.errors import UserError
from isd_ray.methods import METHODS
from isd_ray.train import learnable
from isd_ray.train.learnable import check_learnable, check_steps


def dotted(options: dict[str, object]) -> dict[str, object]:
    return {name.replace("__", "."): value for name, value in options.items()}


def fault(**options: object) -> str:
    with pytest.raises(UserError) as error:
        check_learnable(resolve({"model.stem": "auto"}, dotted(options)))
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model__backbone": "resnet19"}, "unknown backbone 'resnet19'. Did you mean 'resnet18'?"),
        ({"model__backbone": "timm:resnet10tt"}, "Did you mean 'timm:resnet10t'?"),
        ({"model__backbone": "resnet20", "model__stem": "imagenet"}, "has no stem 'imagenet'"),
        ({"model__backbone": "timm:vit_tiny_patch16_224", "data__image_size": 8}, "of 8 pixels"),
        ({"method__views": ["strong", "stong"]}, "'stong'. Did you mean 'strong'?"),
        ({"method__views": ["strong"]}, "takes two views"),
        ({"method__name": "dino", "method__views": ["strong"]}, "takes two views or more"),
        ({"method__name": "npid", "method__views": ["weak"] * 2}, "NPID takes one view"),
        ({"method__name": "simclr", "train__batch_norm": "shuffle"}, "no moving teacher"),
        ({"method__name": "seed"}, "give --method.teacher"),
    ],
)
def test_a_fault_is_named(options, words):
    assert words in fault(**options)


def test_all_faults_come_at_once():
    text = fault(model__backbone="resnet19", method__views=["strong"])
    assert "resnet19" in text
    assert "takes two views" in text


class OneSize(nn.Module):
    """A backbone that takes images of one size, as some transformers do."""

    dim = 8

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.shape[2] == self.side, f"Input height ({images.shape[2]}) doesn't match"
        return images.mean(dim=(2, 3))


def test_views_of_several_sizes_must_fit_the_backbone(monkeypatch):
    views = {"method__name": "swav", "method__views": ["swav_large", "swav_large", "swav_small"]}
    check_learnable(resolve(dotted(views)))
    learnable._look.cache_clear()
    build = lambda name, stem, image_size: OneSize(image_size)  # noqa: E731
    monkeypatch.setattr(learnable, "build_backbone", build)
    text = fault(data__image_size=224, **views)
    assert "--model.backbone resnet8" in text
    assert "makes some of 96" in text
    check_learnable(resolve(dotted(views | {"method__views": ["swav_large", "swav_large"]})))
    learnable._look.cache_clear()


def test_a_schedule_that_fills_the_memory_is_refused():
    config = resolve({"train.epochs": 10**6, "train.batch_size": 256})
    check_steps(config, 256 * 100 + 255)
    with pytest.raises(UserError, match=r"--train.epochs 1000000: 101,000,000 steps in all"):
        check_steps(config, 256 * 101)


def test_a_tracker_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(learnable, "find_spec", lambda name: None)
    assert "pip install mlflow" in fault(train__loggers=["mlflow"])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_learnable_as_it_comes(name):
    given = {"method.teacher": "x.pth"} if "method.teacher" in METHODS[name].defaults else {}
    check_learnable(resolve({"method.name": name, **given}))


@pytest.mark.parametrize(
    "name", ["resnet50", "timm:convnext_atto", "timm:levit_128s", "timm:vit_tiny_patch16_224"]
)
def test_networks_of_any_kind_are_learnable(name):
    check_learnable(resolve({"model.backbone": name, "model.stem": "auto", "data.image_size": 224}))


def test_a_look_draws_no_numbers_and_a_second_one_is_free():
    config = resolve({"model.backbone": "resnet50", "model.stem": "auto", "data.image_size": 224})
    check_learnable(config)
    state, started = torch.get_rng_state(), time.process_time()
    for _ in range(10):
        check_learnable(config)
    assert time.process_time() - started < 5
    assert torch.equal(torch.get_rng_state(), state)
