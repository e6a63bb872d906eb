"""Published choices of images: the lists D1..D10 of the authors of ISD, in the form of their files
(headings, classes, files of ImageNet), and the class sizes of ImageNet-100-LT."""

from pathlib import Path

import numpy as np

from isd_ray.data.imbalance import published_classes

# Images of each list, and of the one large class that has fewer than 1300 in ImageNet.
TOTALS = {
    "D1": 13400, "D2": 13036, "D3": 13217, "D4": 13400, "D5": 13400, "D6": 13171, "D7": 12872, "D8": 13400,
    "D9": 13250, "D10": 13390,
}  # fmt: skip
SHORT = {
    "n02095889": 936, "n01688243": 1117, "n01744401": 1071, "n02085782": 772, "n02066245": 1150, "n02090379": 1290,
}  # fmt: skip


def sizes(name: str) -> dict[str, int]:
    """Listed images of each class of D1..D10, by WordNet id, in its order."""
    parts = {part: [f"n{w}" for w in ids.split()] for part, ids in published_classes()[name].items()}
    large = {c: min(1300, SHORT.get(c, 1300)) for c in parts["large"]}
    return dict(sorted((large | dict.fromkeys(parts["small"], 100)).items()))


def stems(name: str) -> dict[str, list[str]]:
    """Listed files of each class without their ending, `n01498041/n01498041_17`.

    Numbers are as those of ImageNet, in the order of their texts for a large class, in none for a
    small one.
    """
    rng = np.random.default_rng(0)
    found = {}
    for c, n in sizes(name).items():
        numbers = rng.choice(20_000, n, replace=False)
        files = [f"{c}/{c}_{i}" for i in numbers]
        found[c] = sorted(files) if n > 100 else files
    return found


def text(name: str, count: int | None = None) -> str:
    """The whole file; count: at most so many images of a class."""
    listed = stems(name)
    lines = ["class names : ", *listed, "Train Images: "]
    lines += [f"/train/{stem}.JPEG" for files in listed.values() for stem in files[:count]]
    return "\n".join(lines) + "\n"


def write(folder: Path, name: str, count: int | None = None) -> str:
    """Write the list NAME.txt and return its path."""
    path = folder / f"{name}.txt"
    path.write_text(text(name, count))
    return str(path)


# Of ImageNet-100-LT, as published by SDCLR: the classes of labels 0 to 99, and the images of each.
_IDS = """
n02869837 n01749939 n02488291 n02107142 n13037406 n02091831 n04517823 n04589890 n03062245 n01773797
n01735189 n07831146 n07753275 n03085013 n04485082 n02105505 n01983481 n02788148 n03530642 n04435653
n02086910 n02859443 n13040303 n03594734 n02085620 n02099849 n01558993 n04493381 n02109047 n04111531
n02877765 n04429376 n02009229 n01978455 n02106550 n01820546 n01692333 n07714571 n02974003 n02114855
n03785016 n03764736 n03775546 n02087046 n07836838 n04099969 n04592741 n03891251 n02701002 n03379051
n02259212 n07715103 n03947888 n04026417 n02326432 n03637318 n01980166 n02113799 n02086240 n03903868
n02483362 n04127249 n02089973 n03017168 n02093428 n02804414 n02396427 n04418357 n02172182 n01729322
n02113978 n03787032 n02089867 n02119022 n03777754 n04238763 n02231487 n03032252 n02138441 n02104029
n03837869 n03494278 n04136333 n03794056 n03492542 n02018207 n04067472 n03930630 n03584829 n02123045
n04229816 n02100583 n03642806 n04336792 n03259280 n02116738 n02108089 n03424325 n01855672 n02090622
"""
_IMAGES = """
30 75 100 61 23 126 511 120 354 39 229 268 143 34 55 14 130 108 20 69 12 85 54 32 9
124 137 18 26 89 63 172 152 110 184 392 215 80 330 21 16 43 78 456 201 236 113 36 37 282
59 248 305 73 32 45 27 19 15 22 6 50 8 149 86 41 133 165 178 52 31 93 44 48 169
71 65 157 25 82 11 66 42 15 57 290 116 679 28 189 47 104 96 35 7 1280 102 83 10 138
"""


def imagenet100_lt() -> dict[str, int]:
    """Images of each class of ImageNet-100-LT by WordNet id, in the order of published labels."""
    return dict(zip(_IDS.split(), map(int, _IMAGES.split()), strict=True))
