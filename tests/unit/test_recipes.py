"""Recipes and data sets fit the methods: each combination of them could be started."""

from pathlib import Path

import pytest

from isd_ray.config import Config, flatten, merge, parse, read_yaml, resolve
from isd_ray.methods import METHODS
from isd_ray.train.learnable import check_learnable

ROOT = Path(__file__).parents[2]
RECIPES = sorted(p for p in (ROOT / "jobs/recipes").glob("*.yaml") if not p.name.startswith("study_"))
DATASETS = sorted(path.stem for path in (ROOT / "datasets").glob("*.yaml"))


def check(config: Config) -> None:
    """Build networks and method as a run would; a frozen teacher is given where one is needed."""
    if "method.teacher" in METHODS[config.method.name].defaults:
        config = resolve(config.model_dump(), {"method.teacher": "teacher.pth"})
    check_learnable(config)


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
