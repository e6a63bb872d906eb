"""The embedded data set: ten procedural grey patterns under heavy nuisance variation, made in about two seconds.

It is what an out-of-the-box run trains on, so it needs no download and no dependency beyond numpy, and gives the
same bytes on every machine: only PCG64 draws, float32 additions, products, quotients, floors and square roots are
used (all exactly rounded by IEEE 754); there is no sine, exponential, matrix product or mean.

Each image is 32 x 32 and shows one repeated figure, lighter than its ground:

* ``stripes``    parallel bars
* ``checks``     a chessboard
* ``dots``       filled discs on a square lattice
* ``rings``      hollow circles on the same lattice
* ``crosses``    plus signs on the same lattice
* ``zigzag``     bars bent into a chevron
* ``bricks``     blocks in staggered rows, with mortar lines
* ``triangles``  filled triangles in rows
* ``weave``      bars that change direction from cell to cell (basket weave)
* ``scales``     staggered rows of half circles (fish scales)

The nuisance, drawn anew for every image and from the same distributions for every class: rotation (+-15 degrees),
size of the figure (7 to 14 pixels), aspect, phase (position), thickness of the lines, contrast, brightness, a linear
light gradient, a smooth random background and pixel noise. Raw pixels therefore carry little of the class, and
so do the mean colour, contrast or orientation that an untrained network responds to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Pattern = Callable[[Floats, Floats, Floats, Floats], Floats]

SIZE: Final = 32
SPLITS: Final = {"train": 600, "bank": 150, "test": 100}
"""Images of each class in a split."""

_ROTATION: Final = 0.131652  # tan(15 degrees / 2), the largest rotation in the terms of _rotation
_PERIOD: Final = (7.0, 14.0)
_ASPECT: Final = (0.85, 1.18)
_CONTRAST: Final = (0.3, 0.9)
_BRIGHTNESS: Final = (0.3, 0.7)
_GRADIENT: Final = 0.4
_BACKGROUND: Final = 0.3
_BACKGROUND_GRID: Final = 4
_NOISE: Final = 0.12


def make(split: str, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return a balanced split as (images [N, 32, 32, 3] uint8, labels [N] int64), sorted by class.

    Splits and seeds are independent draws, so ``train``, ``bank`` and ``test`` share no image. A long-tailed subset
    is a selection from ``train``.

    >>> images, labels = make("test")
    >>> images.shape, len(CLASSES)
    ((1000, 32, 32, 3), 10)
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    count, stream = SPLITS[split], list(SPLITS).index(split)
    parts = [_draw_class(name, count, _generator(seed, stream, i)) for i, name in enumerate(CLASSES)]
    grey = np.concatenate(parts)
    images = np.repeat(grey[..., None], 3, axis=-1)
    return images, np.repeat(np.arange(len(CLASSES), dtype=np.int64), count)


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(list(key)))


def _draw_class(name: str, count: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw ``count`` images of one class: [count, 32, 32] uint8."""
    period = _uniform(rng, count, *_PERIOD)
    u, v = _coordinates(rng, count, period)
    figure = _PATTERNS[name](u, v, period, _uniform(rng, count, 0.0, 1.0)) - np.float32(0.5)
    image = _uniform(rng, count, *_BRIGHTNESS) + _uniform(rng, count, *_CONTRAST) * figure
    image = image + _light(rng, count) + _background(rng, count) + _noise(rng, count)
    result: NDArray[np.uint8] = np.clip(image * np.float32(255), 0, 255).astype(np.uint8)
    return result


# ---- nuisance ------------------------------------------------------------------------------------------------


def _uniform(rng: np.random.Generator, count: int, low: float, high: float) -> Floats:
    """One number an image, broadcastable over its pixels: [count, 1, 1]."""
    return np.float32(low) + np.float32(high - low) * rng.random((count, 1, 1), dtype=np.float32)


def _grid() -> tuple[Floats, Floats]:
    """Pixel centres (x [1, 1, S], y [1, S, 1]) with the origin in the middle of the image."""
    line = np.arange(SIZE, dtype=np.float32) - np.float32((SIZE - 1) / 2)
    return line[None, None, :], line[None, :, None]


def _rotation(t: Floats) -> tuple[Floats, Floats]:
    """Cosine and sine of the angle 2 atan(t), without calling either (their last bit depends on the machine)."""
    one, square = np.float32(1), t * t
    return (one - square) / (one + square), (t + t) / (one + square)


def _coordinates(rng: np.random.Generator, count: int, period: Floats) -> tuple[Floats, Floats]:
    """Pattern coordinates (u, v), each [count, S, S]: rotated, shifted, scaled to a figure of size 1."""
    x, y = _grid()
    cos, sin = _rotation(_uniform(rng, count, -_ROTATION, _ROTATION))
    aspect = _uniform(rng, count, *_ASPECT)
    u: Floats = np.divide(x * cos + y * sin, period) * aspect + _uniform(rng, count, 0.0, 8.0)
    v: Floats = np.divide(np.divide(y * cos - x * sin, period), aspect) + _uniform(rng, count, 0.0, 8.0)
    return u, v


def _light(rng: np.random.Generator, count: int) -> Floats:
    """A linear brightness gradient in a random direction: [count, S, S]."""
    x, y = _grid()
    slope_x = _uniform(rng, count, -_GRADIENT, _GRADIENT) / np.float32(SIZE)
    slope_y = _uniform(rng, count, -_GRADIENT, _GRADIENT) / np.float32(SIZE)
    return slope_x * x + slope_y * y


def _background(rng: np.random.Generator, count: int) -> Floats:
    """Smooth clouds, a coarse random grid interpolated linearly: [count, S, S]."""
    coarse = rng.random((count, _BACKGROUND_GRID, _BACKGROUND_GRID), dtype=np.float32) - np.float32(0.5)
    at = (np.arange(SIZE, dtype=np.float32) + np.float32(0.5)) * np.float32((_BACKGROUND_GRID - 1) / SIZE)
    low = np.floor(at).astype(np.int64)
    share = at - low.astype(np.float32)
    rows = coarse[:, low] * (1 - share)[None, :, None] + coarse[:, low + 1] * share[None, :, None]
    clouds: Floats = rows[:, :, low] * (1 - share) + rows[:, :, low + 1] * share
    return clouds * np.float32(_BACKGROUND)


def _noise(rng: np.random.Generator, count: int) -> Floats:
    """Uniform pixel noise whose strength differs from image to image: [count, S, S]."""
    pixels: Floats = rng.random((count, SIZE, SIZE), dtype=np.float32) - np.float32(0.5)
    return pixels * _uniform(rng, count, 0.0, _NOISE)


# ---- patterns: (u, v, period in pixels, thickness in [0, 1]) -> figure in [0, 1], [count, S, S] --------------------


def _soft(inside: Floats, period: Floats) -> Floats:
    """A step at 0 with an edge one pixel wide; ``inside`` is a distance in units of the period."""
    step: Floats = np.clip(inside * period + np.float32(0.5), 0, 1)
    return step


def _centred(t: Floats) -> Floats:
    """The position within a cell of length 1, from -0.5 to 0.5."""
    return t - np.floor(t) - np.float32(0.5)


def _odd(t: Floats) -> Floats:
    """1 in every second cell, else 0."""
    cell: Floats = np.floor(t)
    odd: Floats = cell - 2 * np.floor(cell / 2)
    return odd


def _radius(u: Floats, v: Floats) -> Floats:
    """Distance to the middle of the cell."""
    a, b = _centred(u), _centred(v)
    distance: Floats = np.sqrt(a * a + b * b)
    return distance


def _between(thickness: Floats, low: float, high: float) -> Floats:
    return np.float32(low) + np.float32(high - low) * thickness


def _stripes(u: Floats, v: Floats, period: Floats, thickness: Floats) -> Floats:
    return _soft(_between(thickness, 0.18, 0.32) - np.abs(_centred(u)), period) + 0 * v


def _checks(u: Floats, v: Floats, period: Floats, thickness: Floats) -> Floats:
    return _soft(2 * _centred(u) * _centred(v), period) + 0 * thickness


def _dots(u: Floats, v: Floats, period: Floats, thickness: Floats) -> Floats:
    return _soft(_between(thickness, 0.30, 0.42) - _radius(u, v), period)


def _rings(u: Floats, v: Floats, period: Floats, thickness: Floats) -> Floats:
    return _soft(_between(thickness, 0.08, 0.13) - np.abs(_radius(u, v) - np.float32(0.33)), period)


def _crosses(u: Floats, v: Floats, period: Floats, thickness: Floats) -> Floats:
    a, b = np.abs(_centred(u)), np.abs(_centred(v))
    arms = _soft(_between(thickness, 0.09, 0.17) - np.minimum(a, b), period)
    return np.minimum(arms, _soft(np.float32(0.43) - np.maximum(a, b), period))


def _zigzag(u: Floats, v: Floats, period: Floats, thickness: Floats) -> Floats:
    bent = _centred(u + 2 * np.abs(_centred(v)))
    return _soft(_between(thickness, 0.18, 0.32) - np.abs(bent), period)


def _bricks(u: Floats, v: Floats, period: Floats, thickness: Floats) -> Floats:
    along = np.abs(_centred(u * np.float32(0.6) + np.float32(0.5) * _odd(v))) / np.float32(0.6)
    to_mortar = np.minimum(np.float32(0.5) - np.abs(_centred(v)), np.float32(0.5 / 0.6) - along)
    return _soft(to_mortar - _between(thickness, 0.08, 0.16), period)


def _triangles(u: Floats, v: Floats, period: Floats, thickness: Floats) -> Floats:
    a, b = np.abs(_centred(u)), _centred(v)
    inside = np.minimum(b + np.float32(0.42), (np.float32(0.5) - b) / 2 - a)
    return _soft(inside - _between(thickness, 0.0, 0.04), period)


def _weave(u: Floats, v: Floats, period: Floats, thickness: Floats) -> Floats:
    turned = (_odd(u) + _odd(v)) == 1
    bar = np.where(turned, np.abs(_centred(2 * u)), np.abs(_centred(2 * v)))
    return _soft((_between(thickness, 0.15, 0.30) - bar) * np.float32(0.5), period)


def _scales(u: Floats, v: Floats, period: Floats, thickness: Floats) -> Floats:
    across, down = np.float32(0.7) * u, np.float32(1.4) * v
    a = _centred(across + np.float32(0.5) * _odd(down))
    b = (down - np.floor(down)) / 2
    arc = np.abs(np.sqrt(a * a + b * b) - np.float32(0.5))
    return _soft((_between(thickness, 0.06, 0.11) - arc) / np.float32(0.7), period)


_PATTERNS: Final[dict[str, Pattern]] = {
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "rings": _rings,
    "crosses": _crosses,
    "zigzag": _zigzag,
    "bricks": _bricks,
    "triangles": _triangles,
    "weave": _weave,
    "scales": _scales,
}

CLASSES: Final = tuple(_PATTERNS)
"""Names of the classes, in the order of the labels; the first has most images in a long-tailed subset."""
