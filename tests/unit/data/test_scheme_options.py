"""Whatever is asked of a scheme, it is refused in one line or exactly so many images are chosen."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from published_lists import imagenet100_lt
from test_imbalance import counts, make

from isd_ray.config import resolve
from isd_ray.data import catalog, imbalance, index
from isd_ray.data.catalog import load_definition, open_dataset, parse_definition
from isd_ray.data.imbalance import SCHEMES, subset
from isd_ray.data.scheme_options import QUOTAS, Listed, Natural
from isd_ray.errors import UserError
from isd_ray.train.trainer import open_splits

SIZES = [40, 3, 25, 0, 17]
NAMES = ["ant", "bee", "cow", "dog", "eel"]
TABLE = make(SIZES, NAMES)
WIDE = make([3] * 40)  # isd_8_30 needs 38 classes
KEYS = TABLE["key"].to_pylist()

numbers = st.integers() | st.floats() | st.booleans() | st.integers(-50, 50) | st.just(10**30)
anything = st.recursive(
    st.none() | numbers | st.text(max_size=5) | st.binary(max_size=3) | st.sampled_from(NAMES),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
small = st.integers(0, 45)
SENSIBLE = {
    "ratio": st.floats(1, 1e6) | st.just(1e308),
    "seed": st.integers(0, 2**80),
    "class_order": st.sampled_from(["label", "random"]),
    "n_max": st.integers(1, 60),
    "holdout": st.integers(0, 30),
    "alpha": st.floats(0.1, 1000),
    "scale": st.floats(1e-9, 1e12),
    "floor": small,
    "mode": st.sampled_from(["quantile", "draw"]),
    "counts": st.lists(small, min_size=5, max_size=5) | st.dictionaries(st.sampled_from(NAMES), small, min_size=1),
    "n_large": st.integers(0, 5),
    "n_small": st.integers(0, 5),
    "size_large": small,
    "size_small": small,
    "split": st.sampled_from(["", "D1"]),
    "per_class": st.integers(1, 45),
    "of": st.sampled_from(sorted(QUOTAS)),
    "files": st.lists(st.sampled_from(KEYS), min_size=1),
    "missing": st.sampled_from(["error", "skip"]),
}  # fmt: skip
STRANGE = ["table", "cache_dir", "workers", "quiet", "download", "root", "scheme", "n_larg", ""]


@st.composite
def asked(draw):
    """A scheme and options for it: mostly those it has, mostly with sensible values."""
    scheme = draw(st.sampled_from((*SCHEMES, *SCHEMES, None, "none", "exponentail", "\x1b", 5)))
    need = {
        "counts": ["counts"],
        "list": ["files"],
        "balanced": draw(st.sampled_from([["per_class"], ["of"]])),
    }
    odd = draw(st.integers(0, 3)) == 0
    chosen = [] if odd else need.get(scheme, [])
    values = {name: draw(SENSIBLE[name]) for name in chosen}
    own = QUOTAS.get(values.get("of", scheme), Listed if scheme == "list" else Natural)
    if "of" in values and values["of"] == "counts":
        values["counts"] = draw(SENSIBLE["counts"])
    names = [*own.model_fields, *([*SENSIBLE, *STRANGE] if odd else [])]
    for name in draw(st.lists(st.sampled_from(names), unique=True, max_size=5)):
        sensible = name in SENSIBLE and not (odd and draw(st.booleans()))
        values[name] = draw(SENSIBLE[name] if sensible else anything)
    return scheme, values


def quota_of(scheme, options) -> list[int] | None:
    """Images asked of each class where that shows without the schemes' own code, else None."""
    if scheme == "balanced" and options.get("of") is None:
        return [options["per_class"]] * 5
    if scheme == "counts" and options.get("class_order", "label") == "label":
        given = options["counts"]
        return [given.get(name, 0) for name in NAMES] if isinstance(given, dict) else list(given)
    return None


@settings(max_examples=400, deadline=None)
@given(asked())
@example(("exponential", {"n_max": -5}))
@example(("counts", {"counts": [-1, 2, 3, 4, 5]}))
@example(("large_small", {"size_large": -3}))
@example(("balanced", {"per_class": -2}))
@example(("pareto", {"alpha": 1e-9}))
@example(("pareto", {"mode": "draw", "n_max": 1, "alpha": 0.5, "seed": 1}))
@example(("step", {"holdout": -1}))
@example(("balanced", {"of": "balanced"}))
@example(("natural", {"n_max": 5}))
@example(("exponential", {"table": 1}))
def test_it_is_refused_in_one_line_or_so_many_images_are_chosen(case):
    scheme, options = case
    table = WIDE if "isd_8_30" in (scheme, options.get("of")) else TABLE
    try:
        chosen = subset(table, scheme, **options)
    except UserError as error:
        said = str(error)
    else:
        check_images(table, chosen, scheme, options)
        return
    assert said.isprintable()
    assert len(said) < 3000


def check_images(table, chosen, scheme, options) -> None:
    """Compare the images with what was asked for."""
    sizes = index.class_counts(table)
    found = counts(chosen)
    rows = chosen["offset"].to_numpy()
    assert (np.diff(rows) > 0).all(), "in order of the index, none twice"
    if scheme in (None, "natural", "none"):
        assert chosen.equals(table)
    elif scheme == "list":
        assert set(chosen["key"].to_pylist()) == set(options["files"]) & set(KEYS)
    else:
        asked_of = imbalance.quota(table, scheme, **options)
        assert asked_of.dtype == np.int64
        assert (asked_of >= 0).all()
        left = np.maximum(sizes - options.get("holdout", 0), 0)
        assert (np.array(found) <= left).all()
        if not options.get("holdout"):  # which changes what n_max and a control start from
            assert found == np.minimum(asked_of, sizes).tolist()
        if (exact := quota_of(scheme, options)) is not None:
            assert found == np.minimum(exact, left).tolist()


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("exponentail", {}, "unknown imbalance scheme 'exponentail'. Did you mean 'exponential'"),
        (["step"], {}, r"unknown imbalance scheme \['step'\]"),
        ("pareto", {"alfa": 3}, "unknown imbalance option 'alfa' of scheme 'pareto'. Did you mean 'alpha'"),
        ("pareto", {"mode": "x"}, "option mode 'x' of scheme 'pareto': it should be 'quantile' or 'draw'"),
        (
            "pareto",
            {"alpha": float("nan")},
            "option alpha nan of scheme 'pareto': it should be a finite number",
        ),
        (
            "step",
            {"ratio": 0.5},
            "option ratio 0.5 of scheme 'step': it should be greater than or equal to 1",
        ),
        ("step", {"n_max": -5}, "option n_max -5 of scheme 'step': it should be greater than or equal to 1"),
        ("step", {"n_max": "500"}, "option n_max '500' of scheme 'step': it should be a valid integer"),
        ("step", {"n_max": True}, "option n_max True of scheme 'step': it should be a valid integer"),
        ("step", {"n_max": 1.5, "ratio": -1}, "n_max 1.5 .*; imbalance option ratio -1"),
        ("balanced", {}, "per_class or of"),
        ("balanced", {"per_class": 2, "of": "step"}, "per_class or of"),
        ("balanced", {"of": "natural"}, "unknown imbalance scheme 'natural'"),
        ("balanced", {"of": "step", "n_max": 0}, "option n_max 0 of scheme 'step'"),
        ("balanced", {"per_class": 2, "alpha": 1}, "unknown imbalance option 'alpha' of scheme 'balanced'"),
        ("natural", {"alpha": 1}, "unknown imbalance option 'alpha' of scheme 'natural'"),
        ("natural", {"ratio": 10}, "unknown imbalance option 'ratio' of scheme 'natural'"),
        ("exponential", {"alpha": 1}, "unknown imbalance option 'alpha'"),
        ("exponential", {"class_order": "size"}, "it should be 'label' or 'random'"),
        ("large_small", {"n_large": 9}, "9 large and 0 small classes are asked of 5"),
        ("large_small", {"n_larg": 9}, "Did you mean 'n_large'"),
        ("isd_8_30", {"n_max": 9}, "unknown imbalance option 'n_max' of scheme 'isd_8_30'"),
        ("counts", {}, "needs counts: images of each class, by rank or by class name"),
        (
            "counts",
            {"counts": [1, 2, 3, 4, -1]},
            r"option counts \[1, 2, 3, 4, -1\] of .*: -1 is no number of images",
        ),
        ("counts", {"counts": {1: 2}}, "write the names of classes in quotes"),
        ("counts", {"counts": {}}, "give the images of each class"),
        ("list", {}, "needs files: the path of a text file"),
        ("list", {"files": []}, "list of files is empty"),
        ("list", {"files": [1]}, "give the path of a text file, or a list of file names"),
        ("list", {"files": " "}, "give the path of a text file"),
        ("step", {"\x1b[2J\nerror: fine": 1}, r"unknown imbalance option '\\x1b\[2J\\nerror: fine'"),
    ],
)
def test_wrong_options_are_said(scheme, options, message):
    with pytest.raises(UserError, match=message) as error:
        subset(TABLE, scheme, **options)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "name", ["cache_dir", "workers", "quiet", "table", "root", "shards", "download", "name"]
)
def test_arguments_of_the_opening_are_no_options_of_a_scheme(name, monkeypatch):
    monkeypatch.setattr(catalog, "_from_source", lambda *_, **__: pytest.fail("something was read"))
    with pytest.raises(UserError, match=f"unknown imbalance option '{name}' of scheme 'exponential'"):
        open_dataset("embedded_lt", options={name: "x"})
    with pytest.raises(UserError, match=f"unknown imbalance option '{name}'"):
        open_splits(resolve({"data.scheme_options": {name: "x"}}))


@pytest.mark.parametrize(
    ("name", "own"),
    [("scheme", "--data.scheme"), ("ratio", "--data.ratio"), ("seed", "--data.subset_seed"),
     ("class_order", "--data.class_order")],
)  # fmt: skip
def test_options_that_stand_apart_are_named(name, own):
    with pytest.raises(UserError, match=f"{name} is an option of its own: {own}$"):
        open_splits(resolve({"data.scheme_options": {name: 5}}))


def test_a_control_is_that_of_the_set_as_it_is_defined(monkeypatch):
    """The definition's ratio holds for the long-tailed set and for the balanced one of its size."""
    monkeypatch.setattr(catalog, "_from_source", lambda *_, **__: {"train": make([600] * 10)})
    tail = open_dataset("embedded_lt").train
    control = open_dataset("embedded_lt", scheme="balanced", options={"of": "exponential"}).train
    assert index.class_counts(control).tolist() == [len(tail) // 10] * 10
    steeper = open_dataset("embedded_lt", scheme="balanced", ratio=100, options={"of": "exponential"}).train
    assert len(steeper) < len(control)


def test_a_definition_with_options_that_its_scheme_lacks_is_refused():
    text = "description: x\nimbalance: {scheme: pareto, alfa: 6}"
    with pytest.raises(UserError, match="unknown imbalance option 'alfa' of scheme 'pareto'"):
        parse_definition(text, "x")
    with pytest.raises(UserError, match="option n_max -1 of scheme 'step'"):
        parse_definition(text.replace("pareto, alfa: 6", "step, n_max: -1"), "x")


@pytest.mark.parametrize("others", [0, 900])
def test_imagenet100_lt_has_the_published_size_of_each_class(others):
    """Whether the folder holds the 100 classes or all of ImageNet, in the order of their names."""
    published = imagenet100_lt()
    names = sorted([*published, *(f"n0{5_000_000 + i}" for i in range(others))])
    table = make([1300 if name in published else 2 for name in names], names)
    asked_of = dict(load_definition("imagenet100_lt").imbalance)
    chosen = subset(table, asked_of.pop("scheme"), **asked_of)
    found = {name: n for name, n in zip(names, counts(chosen), strict=True) if n}
    assert found == published
    assert list(found.values())[:10] == [137, 215, 52, 229, 75, 39, 392, 10, 110, 27]
    sizes = np.array(list(found.values()))
    many, medium, few = sizes > 100, (sizes >= 20) & (sizes <= 100), sizes < 20
    assert (sizes.sum(), many.sum(), medium.sum(), few.sum()) == (12205, 39, 48, 13)


def test_imagenet100_lt_refuses_a_folder_that_lacks_a_class():
    names = sorted(list(imagenet100_lt())[1:])
    asked_of = dict(load_definition("imagenet100_lt").imbalance)
    with pytest.raises(UserError, match=r"names 100 classes, of which the index lacks 1, e.g. 'n02869837'"):
        subset(make([5] * 99, names), asked_of.pop("scheme"), **asked_of)
