"""YAML files: of options, studies, search spaces and data sets, altered as trees and damaged as texts."""

from pathlib import Path

import pytest
import yaml
from damage import yaml_files
from doors import knock
from fuzzing import fuzz
from hypothesis import strategies as st
from sandbox import Sandbox
from world import World

from isd_ray.config import read_yaml, resolve

DATASETS = Path(__file__).parents[2] / "datasets"


def write(sandbox: Sandbox, name: str, content: bytes) -> Path:
    """Put a file into the inputs of a fresh sandbox."""
    sandbox.fresh()
    place = sandbox.inputs / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return place


@pytest.mark.parametrize("recipe", ["embedded", "moco_v2_cifar10", "dino_imagenet"])
def test_options_are_resolved(recipe, sandbox) -> None:
    place = Path(__file__).parents[2] / "jobs" / "recipes" / f"{recipe}.yaml"
    tree = yaml.safe_load(place.read_text()) if place.exists() else {"train": {"epochs": 1}, "data.ratio": 10}

    @fuzz(120, content=yaml_files(tree))
    def case(content: bytes) -> None:
        place = write(sandbox, "config.yaml", content)
        knock("options in YAML", lambda _: bool(resolve(read_yaml(place))) - 1, [], sandbox, about=content)

    case()


def test_options_of_a_run(world: World, sandbox, jobs, untrained) -> None:
    @fuzz(100, content=yaml_files(world.options(**{"evaluate.every": 0})))
    def case(content: bytes) -> None:
        place = write(sandbox, "config.yaml", content)
        given = [
            f"--config={place}",
            f"--data.shards={world.shards}",
            f"--output={sandbox.out}",
            "--name=run",
        ]
        knock("YAML of a run", jobs["pretrain"], given, sandbox, writes=[sandbox.out / "run"], about=content)

    case()


def test_a_study(world: World, sandbox, jobs, untrained, light) -> None:
    @fuzz(100, content=yaml_files(world.study()), report_only=st.booleans())
    def case(content: bytes, report_only: bool) -> None:
        place = write(sandbox, "study.yaml", content)
        given = [f"--study={place}", f"--output={sandbox.out}", *["--report-only"] * report_only]
        knock("YAML of a study", jobs["compare"], given, sandbox, writes=[sandbox.out / "study"], codes=(0, 1, 2),
              about=content)  # fmt: skip

    case()


def test_a_space(world: World, sandbox, jobs, light) -> None:
    @fuzz(100, content=yaml_files(world.space()))
    def case(content: bytes) -> None:
        place = write(sandbox, "space.yaml", content)
        given = [f"--space={place}", f"--output={sandbox.out}", f"--data.shards={world.shards}"]
        knock(
            "YAML of a space",
            jobs["sweep"],
            given,
            sandbox,
            writes=[sandbox.out / "sweep-space"],
            about=content,
        )

    case()


@pytest.mark.parametrize("name", ["folder", "isd_8_30"])
def test_a_data_set(name, world: World, sandbox, jobs, untrained, monkeypatch) -> None:
    tree = yaml.safe_load((DATASETS / f"{name}.yaml").read_text())
    tree |= {
        "image_size": 8,
        "sources": {"train": ["folder:."]},
        "imbalance": {"scheme": "exponential", "ratio": 2},
    }
    options = {
        "data.dataset": "own",
        "data.shards": None,
        "data.root": str(world.images),
        "data.image_size": None,
    }
    base = world.arguments(**options, **{"evaluate.every": 0, "data.validation": None})

    @fuzz(80, content=yaml_files(tree))
    def case(content: bytes) -> None:
        write(sandbox, "datasets/own.yaml", content)
        monkeypatch.setenv("ISD_RAY_DEFINITIONS", str(sandbox.inputs))
        given = [*base, f"--output={sandbox.out}", "--name=run"]
        knock(
            "YAML of a data set",
            jobs["pretrain"],
            given,
            sandbox,
            writes=[sandbox.out / "run"],
            about=content,
        )

    case()
