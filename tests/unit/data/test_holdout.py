"""Validation images are training images that neither pretraining nor the bank sees; the test set plays no part."""

import numpy as np
import pyarrow as pa
import pytest

from isd_ray.config import resolve
from isd_ray.data import index
from isd_ray.data.catalog import Splits, load_definition
from isd_ray.errors import UserError
from isd_ray.train.evaluation import hold_out


def table_of(counts: list[int], root: str) -> pa.Table:
    """An index of `counts[c]` rows of class c, sorted by class, keys k0, k1, ..."""
    label = np.repeat(np.arange(len(counts)), counts)
    zeros = np.zeros(len(label), np.int64)
    columns = {"shard": ["a.tar"] * len(label), "key": [f"k{i}" for i in range(len(label))], "label": label}
    columns |= {"offset": np.arange(len(label)), "size": zeros, "width": zeros, "height": zeros}
    table = pa.table(columns).select(index.SCHEMA.names).cast(index.SCHEMA)
    return index.with_metadata(table, root, [f"c{i}" for i in range(len(counts))])


def keys(table) -> set[str]:
    return set(table["key"].to_pylist())


def held_out(train, bank, per_class: int, bank_name: str = "balanced", seed: int = 0) -> Splits:
    options = {"data.validation": per_class, "evaluate.bank": bank_name, "data.subset_seed": seed}
    splits = Splits(train, bank, None, load_definition("cifar10_lt"))
    return hold_out(resolve({"data.dataset": "cifar10_lt"} | options), splits)


def test_from_a_balanced_bank_that_holds_the_pretraining_set():
    bank = table_of([40, 40, 40], root="/a")
    train = bank.take(np.r_[0:40, 40:50, 80:82])
    splits = held_out(train, bank, per_class=5)
    held = keys(splits.test)
    assert index.class_counts(splits.test).tolist() == [5, 5, 5]
    assert keys(splits.bank) == keys(bank) - held
    assert keys(splits.train) == keys(train) - held


def test_a_bank_of_other_images_leaves_pretraining_whole():
    train, bank = (
        table_of([40, 10], root="/a"),
        table_of([20, 20], root="/b"),
    )  # the same keys in other folders
    splits = held_out(train, bank, per_class=5)
    assert splits.train.equals(train)
    assert len(splits.bank) == 30


def test_a_bank_that_is_the_pretraining_set_keeps_half_of_every_class():
    train = table_of([40, 7, 1], root="/a")
    splits = held_out(train, train, per_class=5, bank_name="train")
    assert index.class_counts(splits.test).tolist() == [5, 3, 0]
    assert splits.bank.equals(splits.train)
    assert not keys(splits.bank) & keys(splits.test)


def test_the_choice_is_a_function_of_the_seed_alone():
    bank = table_of([40, 40], root="/a")
    one, same, other = (held_out(bank, bank, 5, seed=seed) for seed in (1, 1, 2))
    assert keys(one.test) == keys(same.test) != keys(other.test)


def test_nothing_to_hold_out():
    train = table_of([1, 1], root="/a")
    with pytest.raises(UserError, match="no class has two labelled images"):
        held_out(train, train, 5, bank_name="train")
