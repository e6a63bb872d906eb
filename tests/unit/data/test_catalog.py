"""Data sets by name: definitions are valid, shards are made once, splits and labels are right."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from isd_ray.data import catalog, index
from isd_ray.data.catalog import load_definition, open_dataset, parse_definition
from isd_ray.data.imbalance import SCHEMES
from isd_ray.data.shards import make_shards
from isd_ray.errors import UserError

NAMES = [
    "cifar10",
    "cifar100",
    "cifar100_lt",
    "cifar10_lt",
    "digits",
    "embedded_lt",
    "folder",
    "imagenet",
    "imagenet100_lt",
    "imagenet_lt",
    "inaturalist2018",
    "isd_8_30",
    "shards",
]


def write_images(folder, counts):
    rng = np.random.default_rng(0)
    for name, n in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8)).save(folder / name / f"{i}.png")


@pytest.fixture
def images(tmp_path):
    write_images(tmp_path / "data" / "train", {"ant": 20, "bee": 12, "cow": 8})
    write_images(tmp_path / "data" / "test", {"bee": 2, "cow": 3})
    return str(tmp_path / "data")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ISD_RAY_CACHE", str(tmp_path / "cache"))


def test_all_definitions_are_valid():
    assert catalog.names() == NAMES
    for name in NAMES:
        definition = load_definition(name)
        assert definition.name == name
        assert definition.description
        assert definition.imbalance.get("scheme", "natural") in SCHEMES
        assert min(definition.std) > 0


def test_unknown_names_and_keys_are_refused():
    with pytest.raises(UserError, match=r"Did you mean 'cifar10_lt'.* Known: cifar10, "):
        load_definition("cifar10-lt")
    with pytest.raises(
        UserError, match=r"datasets/x.yaml: unknown entry 'imbalanc'. Did you mean 'imbalance'"
    ):
        parse_definition("description: x\nimbalanc: {}", "x")
    with pytest.raises(UserError, match=r"datasets/x.yaml: bank: "):
        parse_definition("description: x\nbank: half", "x")
    with pytest.raises(UserError, match="expected 'name: value' lines, found list"):
        parse_definition("- x", "x")
    with pytest.raises(UserError, match="line 2: 'bank' stands in line 1 too"):
        parse_definition("bank: train\nbank: balanced", "x")
    with pytest.raises(
        UserError, match=r"description: Field required; mean\.0: Input should be a finite number"
    ):
        parse_definition("mean: [.nan, 0.5, 0.5]", "x")
    with pytest.raises(UserError, match="name: that of the file counts"):
        parse_definition("name: y\ndescription: x", "x")


def test_digits_are_long_tailed_and_tested_on_the_rest():
    splits = open_dataset("digits")
    counts = index.class_counts(splits.train)
    assert counts[0] > 5 * counts[9] > 0
    assert len(splits.bank) == 1437
    assert len(splits.test) == 360
    assert open_dataset("digits").train.equals(splits.train)
    assert not open_dataset("digits", seed=1).train.equals(splits.train)
    assert len(open_dataset("digits", scheme="natural").train) == 1437


def test_a_folder_is_sharded_once_and_labels_agree(images, tmp_path, monkeypatch):
    splits = open_dataset("folder", root=images)
    assert index.classes(splits.test) == index.classes(splits.train) == ["ant", "bee", "cow"]
    assert index.class_counts(splits.test).tolist() == [0, 2, 3]
    assert index.class_counts(splits.train).tolist() == [20, 12, 8]
    assert splits.bank.equals(splits.train)
    assert index.root(splits.train).startswith(str(tmp_path / "cache" / "folder-"))
    monkeypatch.setattr(catalog, "make_shards", lambda *_, **__: pytest.fail("made again"))
    assert open_dataset("folder", root=images).train.equals(splits.train)


def test_schemes_and_options_of_the_caller_replace_those_of_the_definition(images):
    tail = open_dataset("folder", root=images, scheme="exponential", ratio=10, class_order="label")
    assert index.class_counts(tail.train).tolist() == [20, 6, 2]
    listed = open_dataset("folder", root=images, scheme="list", options={"files": ["ant/3.png", "cow/1.png"]})
    assert listed.train["key"].to_pylist() == ["ant/3", "cow/1"]


@pytest.mark.parametrize("published", [True, False])
def test_inaturalist_as_published_or_with_one_folder_a_class(tmp_path, monkeypatch, published):
    small = load_definition("inaturalist2018").model_copy(update={"classes": 3})
    monkeypatch.setattr(catalog, "load_definition", lambda name: small)
    above = {"7": "Plants", "12": "Plants", "3": "Birds"}
    for split, n in (("train", 4), ("val", 1)):
        for name, group in above.items():
            write_images(tmp_path / split / (group if published else "."), {name: n})
    splits = open_dataset("inaturalist2018", root=str(tmp_path), workers=0)
    assert index.classes(splits.train) == ["12", "3", "7"]
    assert index.class_counts(splits.train).tolist() == [4, 4, 4]
    assert index.class_counts(splits.test).tolist() == [1, 1, 1]


def test_flat_root_and_no_test_set(tmp_path):
    write_images(tmp_path / "flat", {".": 5})
    splits = open_dataset("folder", root=str(tmp_path / "flat"))
    assert index.labels(splits.train).tolist() == [-1] * 5
    assert splits.test is None


def test_shards_by_uri(images, tmp_path):
    made = open_dataset("folder", root=images)
    root = index.root(made.train).rsplit("/", 1)[0]
    for uri in (root, f"file://{root}"):
        splits = open_dataset("shards", shards=uri)
        assert splits.train.equals(made.train)
        assert index.class_counts(splits.test).tolist() == [0, 2, 3]
    alone = open_dataset("shards", root=f"{root}/train")
    assert alone.train.equals(made.train)
    assert alone.test is None
    with pytest.raises(UserError, match="'cifar10' has 10 classes, but 3 were found"):
        open_dataset("cifar10", shards=root)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("folder", {}, "'folder' needs its images"),
        ("folder", {"root": "/nothing"}, "'folder', train: no folder at"),
        ("shards", {}, "read from shards"),
        ("shards", {"shards": "/nothing"}, "no index at '/nothing/"),
        ("cifar10", {"root": "/nothing"}, "no folder at '/nothing'.*; or torchvision:CIFAR10 cannot be read"),
    ],
)
def test_what_is_wrong_is_said(name, options, message):
    with pytest.raises(UserError, match=message) as error:
        open_dataset(name, **options)
    assert "\n" not in str(error.value)


def test_a_broken_test_set_is_no_missing_one(images, tmp_path):
    for i in range(3):
        (tmp_path / "data" / "test" / "bee" / f"bad{i}.png").write_bytes(b"x")
    with pytest.raises(UserError, match="more than the limit"):
        open_dataset("folder", root=images)


def test_classes_that_training_lacks_are_refused(images, tmp_path):
    write_images(tmp_path / "data" / "test", {"dog": 1})
    with pytest.raises(UserError, match=r"1 classes that training lacks, e.g. 'dog'"):
        open_dataset("folder", root=images)


def test_the_embedded_set_is_long_tailed_with_a_bank_of_its_own():
    splits = open_dataset("embedded_lt")
    counts = index.class_counts(splits.train)
    assert (counts[0], counts[-1], counts.sum()) == (600, 30, 2040)
    assert index.class_counts(splits.bank).tolist() == [150] * 10
    assert index.class_counts(splits.test).tolist() == [100] * 10


def test_isd_8_30_evaluates_on_its_38_classes(images, monkeypatch):
    small = load_definition("isd_8_30").model_copy(update={"classes": None})
    monkeypatch.setattr(catalog, "load_definition", lambda name: small)
    splits = open_dataset(
        "isd_8_30",
        root=images,
        scheme="large_small",
        options={"n_large": 1, "n_small": 1, "size_large": 5, "size_small": 2},
    )
    chosen = np.flatnonzero(index.class_counts(splits.train))
    assert len(chosen) == 2
    assert np.flatnonzero(index.class_counts(splits.bank)).tolist() == chosen.tolist()
    assert index.class_counts(splits.bank)[chosen].tolist() == np.array([20, 12, 8])[chosen].tolist()


def test_cifar10_lt_from_real_parquet_files(real_data, tmp_path):
    if not (real_data / "cifar10_test.parquet").exists():
        pytest.skip("no CIFAR-10 test file")
    rows = pq.read_table(real_data / "cifar10_test.parquet").take(np.arange(0, 10_000, 10))
    pq.write_table(
        rows, tmp_path / "cifar10_train_part.parquet"
    )  # 100 images a class stand for the training set
    splits = open_dataset("cifar10_lt", root=str(tmp_path), workers=0)
    assert index.class_counts(splits.train).tolist() == [100, 59, 35, 21, 12, 7, 4, 2, 1, 1]
    assert len(splits.bank) == 1000
    assert splits.test is None
    assert index.classes(splits.train)[:2] == ["airplane", "automobile"]


def test_shards_without_an_index_are_indexed_once(images, tmp_path, capsys):
    make_shards(f"{images}/train", str(tmp_path / "out"), workers=0)
    (tmp_path / "out" / "train" / "index.parquet").unlink()
    first = open_dataset("shards", shards=str(tmp_path / "out"), workers=0).train
    assert "no index at" in capsys.readouterr().out
    again = open_dataset("shards", shards=str(tmp_path / "out"), workers=0).train
    assert "no index at" not in capsys.readouterr().out
    assert again.equals(first)
