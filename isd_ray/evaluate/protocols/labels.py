"""A linear layer on a share of every class, as the papers' 1 % and 10 % of ImageNet."""

from collections.abc import Sequence

from isd_ray.evaluate.protocol import Answer, Labelled, Name, Protocol
from isd_ray.evaluate.protocols.linear import train


def run(data: Labelled, name: Name) -> Answer:
    """The layer of ISD's eval_linear.py on one draw of the images."""
    from isd_ray.evaluate.draws import share

    rows = share(data.bank_labels, name.number, data.classes, data.seed)
    answer = train(data, data.linear_recipe, rows)
    return Answer(answer.settings | {"labels": f"{name.number} % of every class"}, answer.predictions)


def share_of(images: int, percent: int) -> int:
    """Return `percent` % of a number of images, halves rounded up."""
    return (images * percent + 50) // 100


def why_impossible(name: Name, bank: Sequence[int], test: Sequence[int]) -> str | None:
    """Every class that the bank has must keep an image."""
    images, rarest = min(((n, c) for c, n in enumerate(bank) if n), default=(0, 0))
    none = share_of(images, name.number) < 1
    return (
        f"class {rarest} has {images} images in the bank, of which {name.number} % is none" if none else None
    )


LABELS = Protocol(
    form="labelsP",
    pattern=r"labels(?P<number>[1-9][0-9]?|100)",
    examples=("labels1", "labels10"),
    help="linear layer on P % of every class",
    title="{number} %\nlabels",
    run=run,
    why_impossible=why_impossible,
    whole_bank=True,
)
