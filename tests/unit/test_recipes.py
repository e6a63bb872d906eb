"""Recipes and data sets fit the methods: each combination of them could be started."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from isd_ray.config import Config, flatten, merge, parse, read_yaml, resolve
from isd_ray.methods import METHODS, Method, build_method, find_method
from isd_ray.models.frozen import Frozen
from isd_ray.queue.bank import Bank
from isd_ray.queue.distributed import DistributedQueue
from isd_ray.train.learnable import check_learnable
from isd_ray.train.state import method_options

ROOT = Path(__file__).parents[2]
RECIPES = sorted(p for p in (ROOT / "jobs/recipes").glob("*.yaml") if not p.name.startswith("study_"))
DATASETS = sorted(path.stem for path in (ROOT / "datasets").glob("*.yaml"))


def check(config: Config) -> None:
    """Build networks and method as a run would; a frozen teacher is given where one is needed."""
    if "method.teacher" in METHODS[config.method.name].defaults:
        config = resolve(config.model_dump(), {"method.teacher": "teacher.pth"})
    check_learnable(config)


class Backbone(nn.Module):
    arch, stem_kind = "none", "none"

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


def build(config, dim: int = 8) -> Method:
    """Build the method as a run would, on a backbone without weights and a memory of a few rows."""
    kind, memory = find_method(config.method.name), None
    teacher = Frozen(Backbone()) if "method.teacher" in kind.defaults else None
    widths = [dim] if teacher is None else [dim, 8]
    if kind.uses_queue:
        memory = DistributedQueue(4, kind.embedding_dim(*widths))
    if kind.uses_bank:
        memory = Bank(4, kind.embedding_dim(*widths), kind.bank_ids)
    with torch.device("meta"):  # 65 536 prototypes take their time
        return build_method(config.method.name, Backbone(dim), memory, **method_options(config, teacher))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_resolves_and_its_method_can_be_built(recipe):
    config = parse(["--config", str(recipe)])
    given = flatten(merge(read_yaml(recipe)))
    resolved = flatten(config.model_dump())
    assert {name: resolved[name] for name in given} == given
    check(config)


@pytest.mark.parametrize("data", ["imagenet", "cifar10"])
def test_every_method_has_a_recipe(data):
    names = {recipe.stem for recipe in RECIPES}
    for method in METHODS:
        assert f"{method}_{data}" in names
        assert read_yaml(ROOT / f"jobs/recipes/{method}_{data}.yaml")["method"]["name"] == method


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_method_can_be_built_with_the_defaults_of_every_data_set(dataset):
    for method in METHODS:
        check(resolve({"data.dataset": dataset, "method.name": method}))


# Recipes that cite a result of another model than they train, and the words that say in what it differs.
OTHERS = {
    "barlow_twins_imagenet": ["8192 (here 2048)", "zero in the last norm"],
    "byol_cifar10": ["4096 wide, these 1024"],
    "deepcluster_v2_cifar10": ["it blurs half of its views"],
    "dino_imagenet": ["800 epochs (here 100)", "which are not here"],
    "fnc_imagenet": ["which are not here"],
    "moco_v2_cifar10": [
        "one linear layer (here two",
        "split in 8",
        "(here empty)",
        ".2023",
        "temperature of .1",
    ],
    "npid_cifar10": ["do not flip", ".2023"],
    "ressl_cifar10": ["this one 1024 and 512", "it blurs half"],
    "sce_imagenet": ["no less than .2 of the image, these .08"],
    "simclr_cifar10": ["three layers by default, this one two"],
    "simsiam_cifar10": ["two layers (here three)", "zero in the last norm"],
    "simsiam_imagenet": ["zero in the last norm"],
    "swav_cifar10": ["it blurs half of its views"],
    "vicreg_cifar10": ["no less than .2 of the image"],
    "vicreg_imagenet": ["8192 (here 2048)", "zero in the last norm"],
}


def comment(name: str) -> str:
    lines = (ROOT / f"jobs/recipes/{name}.yaml").read_text().splitlines()
    return " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))


@pytest.mark.parametrize("name", OTHERS)
def test_a_recipe_says_in_what_it_differs_from_the_result_that_it_cites(name):
    text = comment(name)
    assert re.search(r"\d\d(\.\d)? (linear|by weighted)|\d\d\.\d", text), "it cites a result"
    assert [words for words in OTHERS[name] if words not in text] == []


@pytest.mark.parametrize("name", [r.stem for r in RECIPES if r.stem.endswith("_cifar10")])
def test_recipes_of_solo_learn_name_its_stem(name):
    assert ("solo-learn" in comment(name)) == ("Its stem pads by 2 pixels, this one by 1" in comment(name))


@pytest.mark.parametrize(
    ("name", "widths"),
    [("byol_cifar10", [1024, 256]), ("ressl_cifar10", [1024, 512]), ("moco_v2_cifar10", [512, 128]),
     ("simclr_cifar10", [512, 128]), ("simsiam_cifar10", [512, 512, 2048]), ("nnclr_cifar10", [2048, 2048, 256]),
     ("barlow_twins_cifar10", [2048, 2048, 2048]), ("swav_cifar10", [2048, 128]), ("moco_v1_cifar10", [128])],
)  # fmt: skip
def test_projectors_are_as_wide_as_the_recipes_say(name, widths):
    config = parse(["--config", str(ROOT / f"jobs/recipes/{name}.yaml")])
    method = build(config, 512)
    layers = [m for m in method.student.get_submodule("projector").modules() if isinstance(m, nn.Linear)]
    assert [layer.out_features for layer in layers] == widths
