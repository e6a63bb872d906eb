"""A linear layer on the labelled bank, in three published forms whose numbers do not compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from isd_ray.evaluate.protocol import Answer, Labelled, Name, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from isd_ray.evaluate.linear import LinearRecipe


def train(
    data: Labelled, recipe: LinearRecipe, rows: Tensor | None = None, seed: int | None = None
) -> Answer:
    """Train the layer on the bank, or on these `rows` int64 [M] of it alone; seed: default the evaluation's."""
    from isd_ray.evaluate.linear import linear

    bank, labels = data.whole_bank, data.bank_labels
    if rows is not None:
        bank, labels = bank[rows], labels[rows]
    seed = data.seed if seed is None else seed
    found, settings = linear(
        [bank], labels, data.test, classes=data.classes, recipe=recipe, seed=seed, device=data.device
    )
    return Answer(settings, [found])


def isd(data: Labelled, name: Name) -> Answer:
    """The layer of ISD's eval_linear.py."""
    return train(data, data.linear_recipe)


def sdclr(data: Labelled, name: Name) -> Answer:
    """The layer of SDCLR: learning rate 30 on raw features."""
    from isd_ray.evaluate.linear import SDCLR_RECIPE

    return train(data, SDCLR_RECIPE)


def bcl(data: Labelled, name: Name) -> Answer:
    """The layer of BCL: Adam, 500 epochs."""
    from isd_ray.evaluate.linear import BCL_RECIPE

    return train(data, BCL_RECIPE)


def why_impossible(name: Name, bank: Sequence[int], test: Sequence[int]) -> str | None:
    """A variance takes two images."""
    images = sum(bank)
    return f"the bank has {images} images; a classifier needs at least 2" if images < 2 else None


LINEAR = Protocol(
    form="linear",
    pattern="linear",
    examples=("linear",),
    help="linear layer on the whole bank",
    title="linear",
    run=isd,
    why_impossible=why_impossible,
    main=True,
    whole_bank=True,
)
LINEAR_SDCLR = Protocol(
    form="linear_sdclr",
    pattern="linear_sdclr",
    examples=("linear_sdclr",),
    help="the same, in SDCLR's form",
    title="linear\nSDCLR",
    run=sdclr,
    why_impossible=why_impossible,
    whole_bank=True,
)
LINEAR_BCL = Protocol(
    form="linear_bcl",
    pattern="linear_bcl",
    examples=("linear_bcl",),
    help="the same, in BCL's form",
    title="linear\nBCL",
    run=bcl,
    why_impossible=why_impossible,
    whole_bank=True,
)
