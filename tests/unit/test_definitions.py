"""Definitions are found in a checkout, in an installed package and in a folder of the user's own."""

import shutil
from pathlib import Path

import pytest

from isd_ray import definitions
from isd_ray.errors import UserError


def test_those_of_the_checkout_are_found():
    assert "embedded_lt" in definitions.names("datasets")
    assert definitions.find("recipes", "cifar10_lt").parent.name == "recipes"
    assert definitions.find("tune_spaces", "isd_default").is_file()


def test_a_folder_of_ones_own_comes_first(tmp_path, monkeypatch):
    (tmp_path / "datasets").mkdir()
    for name in ("mine", "cifar10"):
        (tmp_path / "datasets" / f"{name}.yaml").write_text("description: x\n")
    monkeypatch.setenv(definitions.VARIABLE, f"/nowhere:{tmp_path}")
    assert {"mine", "embedded_lt"} <= set(definitions.names("datasets"))
    assert definitions.find("datasets", "cifar10").parent == tmp_path / "datasets"
    assert definitions.find("datasets", "cifar100").parent != tmp_path / "datasets"


def test_an_installed_package_has_its_own_copies(tmp_path, monkeypatch):
    monkeypatch.setattr(definitions, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(definitions, "__file__", str(tmp_path / "isd_ray" / "definitions" / "__init__.py"))
    shutil.copytree(Path(__file__).parents[2] / "datasets", tmp_path / "isd_ray" / "definitions" / "datasets")
    assert definitions.find("datasets", "embedded_lt").is_relative_to(tmp_path)


def test_unknown_names_are_told_the_nearest_and_paths_are_kept(tmp_path):
    with pytest.raises(UserError, match=r"unknown data set 'cifar10_tl'. Did you mean 'cifar10_lt'\?"):
        definitions.find("datasets", "cifar10_tl")
    for name in ("../pyproject", "..", "", "a\0b"):
        with pytest.raises(UserError, match="unknown data set"):
            definitions.find("datasets", name)
    assert definitions.file_or_name("recipes", "cifar10_lt") == str(definitions.find("recipes", "cifar10_lt"))
    assert definitions.file_or_name("recipes", str(tmp_path / "x.yaml")) == str(tmp_path / "x.yaml")
    assert definitions.file_or_name("recipes", "s3://bucket/x.yaml") == "s3://bucket/x.yaml"
