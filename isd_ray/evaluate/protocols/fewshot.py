"""A linear layer on a few labelled images of every class."""

from collections.abc import Sequence

from isd_ray.evaluate.protocol import Answer, Labelled, Name, Protocol
from isd_ray.evaluate.protocols.linear import train

DRAWS = 5


def run(data: Labelled, name: Name) -> Answer:
    """SDCLR's few-shot form; the mean over five draws of the images, as BCL's five lists."""
    from isd_ray.evaluate.draws import balanced
    from isd_ray.evaluate.linear import SDCLR_FEWSHOT_RECIPE

    answers = []
    for seed in range(data.seed * DRAWS, (data.seed + 1) * DRAWS):
        rows = balanced(data.bank_labels, name.number, data.classes, seed)
        answers.append(train(data, SDCLR_FEWSHOT_RECIPE, rows, seed))
    drawn = {"labels": f"{name.number} a class", "draws": DRAWS, "seed": data.seed}
    return Answer(answers[0].settings | drawn, [answer.predictions[0] for answer in answers])


def why_impossible(name: Name, bank: Sequence[int], test: Sequence[int]) -> str | None:
    """Every class that the bank has must have so many images."""
    images, rarest = min(((n, c) for c, n in enumerate(bank) if n), default=(0, 0))
    few = name.number > images
    return f"class {rarest} has {images} images in the bank, fewer than {name.number}" if few else None


FEWSHOT = Protocol(
    form="fewshotN",
    pattern=r"fewshot(?P<number>[1-9][0-9]{0,8})",
    examples=("fewshot10",),
    help="linear layer on N labelled images a class",
    title="{number}-shot",
    run=run,
    why_impossible=why_impossible,
    whole_bank=True,
)
