"""Subsets: the published counts are met exactly, and the same seed gives nested subsets."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isd_ray.data import imbalance, index
from isd_ray.data.imbalance import subset
from isd_ray.errors import UserError

CIFAR10 = [5000] * 10
CIFAR100 = [500] * 100


def make(counts, names=None, shuffle=True, keys=None) -> pa.Table:
    """An index of labels only, `counts[c]` rows of class c, in mixed order."""
    label = np.repeat(np.arange(len(counts)), counts)
    if shuffle:
        label = np.random.default_rng(0).permutation(label)
    n = len(label)
    zeros = np.zeros(n, np.int64)
    columns = {
        "shard": ["a.tar"] * n,
        "key": keys or [f"k{i}" for i in range(n)],
        "offset": zeros + np.arange(n),
        "size": zeros,
        "label": label,
        "width": zeros,
        "height": zeros,
    }
    table = pa.table(columns).cast(index.SCHEMA)
    return index.with_metadata(table, "/x", names or [f"c{i}" for i in range(len(counts))])


def counts(table):
    return index.class_counts(table).tolist()


def keys(table):
    return set(table["key"].to_pylist())


@pytest.mark.parametrize(
    ("ratio", "ten", "hundred"),
    [(10, 20431, 19573), (20, 17023, 15907), (50, 13996, 12608), (100, 12406, 10847), (200, 11203, 9502)],
)
def test_exponential_totals_are_those_of_ldam(ratio, ten, hundred):
    assert len(subset(make(CIFAR10), "exponential", ratio=ratio)) == ten
    assert len(subset(make(CIFAR100), "exponential", ratio=ratio)) == hundred


def test_exponential_counts_of_cifar10_ratio_100():
    published = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert counts(subset(make(CIFAR10), "exponential")) == published


def test_step_totals():
    assert len(subset(make(CIFAR10), "step")) == 25250
    assert len(subset(make(CIFAR100), "step")) == 25250
    assert counts(subset(make([100] * 5), "step", ratio=10)) == [100, 100, 10, 10, 10]


@pytest.mark.parametrize(
    ("full", "holdout", "total", "control", "shared"),
    [(CIFAR10, 500, 11165, 11160, 5699), (CIFAR100, 50, 9754, 9700, 5204)],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_splits_of_sdclr(full, holdout, total, control, shared, seed):
    table = make(full)
    how = {"seed": seed, "holdout": holdout, "class_order": "random"}
    tail = subset(table, "exponential", **how)
    balanced = subset(table, "balanced", of="exponential", **how)
    few = subset(table, "balanced", per_class=min(counts(tail)), **how)
    assert (len(tail), len(balanced)) == (total, control)
    assert len(set(counts(balanced))) == 1
    assert len(keys(tail) & keys(balanced)) == shared
    assert keys(few) <= keys(tail) & keys(balanced)
    assert not keys(tail) & keys(imbalance.split_holdout(table, holdout, seed)[1])


def test_cifar10_counts_after_holdout():
    tail = subset(make(CIFAR10), "exponential", holdout=500)
    assert counts(tail) == [4500, 2697, 1617, 969, 581, 348, 208, 125, 75, 45]


def groups(sizes):
    return tuple(int(g.sum()) for g in (sizes > 100, (sizes >= 20) & (sizes <= 100), sizes < 20))


@pytest.mark.parametrize(
    ("classes", "n_max", "options", "total", "expected"),
    [
        (1000, 1280, {"scale": 557}, 115616, (385, 468, 147)),
        (365, 4980, {"alpha": 1.49, "scale": 96}, 62789, (130, 164, 71)),
        (100, 1280, {"scale": 554}, 11432, (38, 47, 15)),
    ],
)
def test_pareto_quantiles_fit_the_published_sets(classes, n_max, options, total, expected):
    sizes = imbalance.pareto_counts(classes, n_max, **options)
    assert sizes.sum() == total
    assert groups(sizes) == expected
    assert (np.diff(sizes) <= 0).all()


def test_pareto_draws_follow_the_quantiles():
    drawn = [imbalance.pareto_counts(1000, 1280, scale=557, mode="draw", seed=s) for s in range(20)]
    assert len({d.sum() for d in drawn}) == 20
    assert abs(np.mean([d.sum() for d in drawn]) / 115616 - 1) < 0.03
    assert all((np.diff(d) <= 0).all() and d.min() >= 5 and d.max() <= 1280 for d in drawn)


def test_pareto_without_scale_starts_at_the_largest_class():
    sizes = counts(subset(make([300] * 20), "pareto"))
    assert sizes[0] == 300
    assert min(sizes) >= 5


def imagenet(chosen_only=False, short=None):
    """1000 classes named by WordNet id, among them all of D1..D10; sizes 130 stand for 1300."""
    lists = imbalance.published_classes()
    ids = sorted({f"n{w}" for d in lists.values() for part in d.values() for w in part.split()})
    return [*ids, *(f"n9{i:07d}" for i in range(1000 - len(ids)))]


def test_published_lists_have_8_and_30_of_323_classes():
    lists = imbalance.published_classes()
    assert list(lists) == [f"D{i}" for i in range(1, 11)]
    sizes = {(len(d["large"].split()), len(d["small"].split())) for d in lists.values()}
    assert sizes == {(8, 30)}
    assert len({w for d in lists.values() for part in d.values() for w in part.split()}) == 323


@pytest.mark.parametrize(
    ("split", "odd", "size", "total"), [("D1", None, 0, 13400), ("D7", "n02085782", 772, 12872)]
)
def test_isd_8_30_published(split, odd, size, total):
    names = imagenet()
    wanted = {f"n{w}" for part in imbalance.published_classes()[split].values() for w in part.split()}
    sizes = [size if n == odd else 1350 if n in wanted else 1 for n in names]
    table = make(sizes, names, shuffle=False)
    chosen = subset(table, "isd_8_30", split=split)
    assert len(chosen) == total
    assert sum(c > 0 for c in counts(chosen)) == 38
    assert sorted(counts(chosen))[-8] > 100
    large = {f"n{w}" for w in imbalance.published_classes()[split]["large"].split()}
    redrawn = subset(table, "isd_8_30", split=split, class_order="random", seed=3)
    found = {n for n, c in zip(names, counts(redrawn), strict=True) if c > 100}
    assert found != large
    assert found <= wanted
    assert len(found) == 8


def test_isd_8_30_by_seed_and_its_control():
    table = make([1400] * 50)
    first, again, other = (subset(table, "isd_8_30", seed=s) for s in (0, 0, 1))
    assert sorted(counts(first)) == [0] * 12 + [100] * 30 + [1300] * 8
    assert first.equals(again)
    assert counts(first) != counts(other)
    control = subset(table, "balanced", of="isd_8_30", seed=0)
    assert sorted(counts(control)) == [0] * 12 + [13400 // 38] * 38


def test_isd_8_30_needs_wordnet_names():
    with pytest.raises(
        UserError, match=r"D1 names 38 classes, of which the index lacks 38, e.g. 'n01498041'"
    ):
        subset(make([5] * 40), "isd_8_30", split="D1")
    with pytest.raises(UserError, match="Did you mean 'D1"):
        subset(make([5] * 40), "isd_8_30", split="D11")


def test_large_small_and_a_class_with_fewer_images():
    table = make([50, 300, 300, 300])
    assert counts(subset(table, "large_small", n_large=2, size_large=200, size_small=20)) == [50, 200, 20, 20]


def test_counts_scheme():
    assert counts(subset(make([50, 50, 50]), "counts", counts=[7, 0, 60])) == [7, 0, 50]
    with pytest.raises(UserError, match="2 counts for 3 classes"):
        subset(make([5, 5, 5]), "counts", counts=[1, 2])


@settings(max_examples=30, deadline=None)
@given(st.permutations(["ant", "bee", "cow", "dog"]), st.permutations(["ant", "bee", "cow", "dog"]))
def test_counts_by_name_do_not_depend_on_the_order_of_either(stored, asked):
    sizes = {"ant": 3, "bee": 0, "cow": 60, "dog": 11}
    chosen = subset(make([50] * 4, list(stored)), "counts", counts={name: sizes[name] for name in asked})
    found = dict(zip(stored, counts(chosen), strict=True))
    assert found == {"ant": 3, "bee": 0, "cow": 50, "dog": 11}


def test_classes_that_counts_do_not_name_have_no_image_and_those_that_lack_are_refused():
    table = make([50] * 3, ["ant", "bee", "cow"])
    assert counts(subset(table, "counts", counts={"cow": 4, "ant": 9})) == [9, 0, 4]
    assert sorted(
        counts(subset(table, "counts", counts={"cow": 4, "ant": 9}, class_order="random", seed=2))
    ) == [0, 4, 9]
    assert counts(subset(table, "balanced", of="counts", counts={"cow": 4, "ant": 9})) == [6, 0, 6]
    with pytest.raises(UserError, match=r"lacks 1, e.g. 'bees'. Did you mean 'bee'"):
        subset(table, "counts", counts={"ant": 1, "bees": 2})


def test_a_control_of_nothing_is_nothing():
    assert counts(subset(make([5, 5]), "balanced", of="counts", counts=[0, 0])) == [0, 0]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=8),
    st.sampled_from(["exponential", "step", "pareto", "large_small"]),
    st.sampled_from([1, 5, 100]),
    st.integers(0, 5),
    st.sampled_from(["label", "random"]),
)
def test_subsets_are_pure_sorted_and_within_the_quota(sizes, scheme, ratio, seed, order):
    table = make(sizes)
    how = {"seed": seed, "class_order": order}
    extra = {"n_large": 1, "size_large": 9, "size_small": 2} if scheme == "large_small" else {}
    extra |= {"ratio": ratio} if scheme in ("exponential", "step") else {}
    chosen = subset(table, scheme, **how, **extra)
    assert chosen.equals(subset(table, scheme, **how, **extra))
    assert (np.diff(chosen["offset"].to_numpy()) > 0).all()
    quota = imbalance.quota(table, scheme, **how, **extra)
    assert counts(chosen) == np.minimum(quota, sizes).tolist()
    assert index.classes(chosen) == index.classes(table)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 3))
def test_smaller_quotas_are_contained_in_larger_ones(a, b, seed):
    table = make([30, 30, 30])
    low, high = (subset(table, "balanced", per_class=n, seed=seed) for n in sorted((a, b)))
    assert keys(low) <= keys(high)


def test_class_order_random_permutes_the_same_sizes():
    table = make([100] * 10)
    straight, mixed = (
        counts(subset(table, "exponential", class_order=o, seed=1)) for o in ("label", "random")
    )
    assert straight != mixed
    assert sorted(straight) == sorted(mixed)


def test_natural_is_everything_and_needs_no_labels():
    table = make([3, 2])
    bare = table.set_column(4, "label", pa.nulls(5, pa.int32()))
    assert subset(bare, None).equals(bare)
    assert subset(table, "natural").equals(table)
    with pytest.raises(UserError, match="needs labels, but 5 of 5"):
        subset(bare, "exponential")
