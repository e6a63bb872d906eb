"""Recipes and data sets fit the methods: each combination of them could be started."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from isd_ray.config import flatten, merge, parse, read_yaml, resolve
from isd_ray.methods import METHODS, build_method, find_method
from isd_ray.models.frozen import Frozen
from isd_ray.queue.bank import Bank
from isd_ray.queue.distributed import DistributedQueue
from isd_ray.train.state import method_options

ROOT = Path(__file__).parents[2]
RECIPES = sorted(p for p in (ROOT / "jobs/recipes").glob("*.yaml") if not p.name.startswith("study_"))
DATASETS = sorted(path.stem for path in (ROOT / "datasets").glob("*.yaml"))


class Backbone(nn.Module):
    dim, arch, stem = 8, "none", "none"

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


def build(config) -> None:
    """Build the method as a run would, on a backbone without weights and a memory of a few rows."""
    kind, memory = find_method(config.method.name), None
    teacher = Frozen(Backbone()) if "method.teacher" in kind.defaults else None
    widths = [8] if teacher is None else [8, 8]
    if kind.uses_queue:
        memory = DistributedQueue(4, kind.embedding_dim(*widths))
    if kind.uses_bank:
        memory = Bank(4, kind.embedding_dim(*widths), kind.bank_ids)
    with torch.device("meta"):  # 65 536 prototypes take their time
        build_method(config.method.name, Backbone(), memory, **method_options(config, teacher))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_resolves_and_its_method_can_be_built(recipe):
    config = parse(["--config", str(recipe)])
    given = flatten(merge(read_yaml(recipe)))
    resolved = flatten(config.model_dump())
    assert {name: resolved[name] for name in given} == given
    build(config)


@pytest.mark.parametrize("data", ["imagenet", "cifar10"])
def test_every_method_has_a_recipe(data):
    names = {recipe.stem for recipe in RECIPES}
    for method in METHODS:
        assert f"{method}_{data}" in names
        assert read_yaml(ROOT / f"jobs/recipes/{method}_{data}.yaml")["method"]["name"] == method


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_method_can_be_built_with_the_defaults_of_every_data_set(dataset):
    for method in METHODS:
        build(resolve({"data.dataset": dataset, "method.name": method}))
