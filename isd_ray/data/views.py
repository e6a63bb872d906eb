"""What a view is: named recipes of the papers, and the random numbers that every process agrees on.

This module needs numpy only, because the processes that read images crop there when images differ in size,
and must draw the very same boxes as the training device would.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from isd_ray.errors import UserError, nearest, printable

TRIES = 10  # of torchvision's RandomResizedCrop before it falls back to a centre crop
RATIO = (3 / 4, 4 / 3)

# Columns of the uniform numbers of one view. Used or not, all are there: recipes do not shift each other.
AREA, ASPECT, TOP, LEFT, FLIP = slice(0, 10), slice(10, 20), 20, 21, 22
JITTER, FACTORS, ORDER, GREY, BLUR, SIGMA, SOLARIZE = 23, slice(24, 28), slice(28, 32), 32, 33, 34, 35
NUMBERS = 36


@dataclass(frozen=True)
class View:
    """One recipe: random resized crop, then each part with its probability (`*_p`), flip, normalisation.

    scale: crop area as a share of the image; jitter: largest change of (brightness, contrast, saturation,
    hue), in random order; sigma: range of the Gaussian blur in pixels of the view; blur_from: smallest view
    side, in pixels, that is blurred at all (recipes for small images leave blur out; 0 blurs every size);
    side: side of the view as a share of the training size.
    """

    scale: tuple[float, float] = (0.2, 1.0)
    interpolation: str = "bilinear"
    side: float = 1.0
    flip_p: float = 0.5
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 0.0
    grey_p: float = 0.0
    grey_first: bool = False
    blur_p: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    blur_from: int = 49
    solarize_p: float = 0.0

    def pixels(self, size: int) -> int:
        """Return the side of this view in pixels, for a training size."""
        return max(1, round(self.side * size))


_STRONG = View(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey_p=0.2, blur_p=0.5)
_SIMCLR = View(scale=(0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.8, grey_p=0.2, blur_p=0.5)
_BYOL = View(
    scale=(0.08, 1.0), interpolation="bicubic", jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, grey_p=0.2
)
_DINO = replace(_BYOL, scale=(0.4, 1.0))

_PIRL = View(jitter=(0.4, 0.4, 0.4, 0.2), jitter_p=0.8, grey_p=0.2)

_TEXTURE = View(
    scale=(0.4, 1.0), jitter=(0.8, 0.8, 0.0, 0.0), jitter_p=0.9, blur_p=0.5, sigma=(0.1, 1.0), blur_from=0
)

VIEWS: dict[str, View] = {
    "weak": View(),  # teacher of ISD-plus, MSF w/s, ReSSL
    "strong": _STRONG,  # MoCo v2, ISD, MSF, SimSiam
    "moco_v2": _STRONG,
    "moco_v1": View(jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, grey_p=0.2, grey_first=True),
    "compress": View(scale=(0.08, 1.0)),
    "simclr": _SIMCLR,
    "simclr_cifar": View(scale=(0.08, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey_p=0.2),
    "byol_1": replace(_BYOL, blur_p=1.0),
    "byol_2": replace(_BYOL, blur_p=0.1, solarize_p=0.2),
    "dino_1": replace(_DINO, blur_p=1.0),
    "dino_2": replace(_DINO, blur_p=0.1, solarize_p=0.2),
    "dino_small": replace(_BYOL, scale=(0.05, 0.4), blur_p=0.5, side=96 / 224),
    "sdclr_cifar": View(
        scale=(0.1, 1.0), interpolation="bicubic", jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey_p=0.2
    ),
    "sdclr_in100": replace(_STRONG, scale=(0.08, 1.0), interpolation="bicubic"),
    "texture": _TEXTURE,  # grey images whose class is a local pattern: light and blur vary, colour says nothing
    "pirl_image": replace(_PIRL, scale=(0.08, 1.0)),
    "pirl_puzzle": replace(_PIRL, scale=(0.6, 1.0)),
    "swav_large": replace(_SIMCLR, scale=(0.14, 1.0)),
    "swav_small": replace(_SIMCLR, scale=(0.05, 0.14), side=96 / 224),
}


def get_views(views: Sequence[str | View]) -> list[View]:
    """Return the recipes of names (a View stands for itself). Raises UserError for an unknown name."""
    for view in views:
        if isinstance(view, str) and view not in VIEWS:
            raise UserError(
                f"No view is named '{printable(view)}'.{nearest(view, VIEWS)} Known: {', '.join(VIEWS)}."
            )
    return [VIEWS[view] if isinstance(view, str) else view for view in views]


def draws(seed: int, epoch: int, position: np.ndarray, n: int) -> np.ndarray:
    """Return uniform numbers in [0, 1), float64 [b, n], as a pure function of its arguments.

    `position` int64 [b] is the place of a sample in the epoch. A counter-based generator: the four arguments
    are hashed one after the other with SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), so any number can be
    had without the ones before it, on any worker.
    """
    with np.errstate(over="ignore"):
        stream = _mix(_mix(np.array([seed], dtype=np.uint64)) ^ np.uint64(epoch))
        stream = _mix(stream ^ _mix(np.asarray(position).astype(np.uint64)))
        numbers = _mix(stream[:, None] + _GAMMA * np.arange(n, dtype=np.uint64))
    return (numbers >> np.uint64(11)) * 2.0**-53


_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """One step of SplitMix64: a bijection of 64-bit numbers that scatters every bit."""
    x = x + _GAMMA
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def view_draws(seed: int, epoch: int, position: np.ndarray, n_views: int) -> np.ndarray:
    """Return the numbers of every view, float64 [n_views, b, NUMBERS]: each view has a stream of its own."""
    numbers = draws(seed, epoch, position, n_views * NUMBERS)
    return numbers.reshape(len(numbers), n_views, NUMBERS).transpose(1, 0, 2)


def crop_tries(view: View, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ten tries at a crop: its share of the image's area and its aspect ratio, float64 [b, 10] each."""
    share = view.scale[0] + u[:, AREA] * (view.scale[1] - view.scale[0])
    low, high = np.log(RATIO)
    return share, np.exp(low + u[:, ASPECT] * (high - low))


def crop_boxes(view: View, u: np.ndarray, width: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Return the random resized crops (top, left, height, width), int64 [b, 4], for draws u [b, NUMBERS].

    The same law as torchvision.transforms.RandomResizedCrop: the first of ten tries that fits, else the
    largest centre crop of an allowed aspect ratio.
    """
    share, ratio = crop_tries(view, u)
    area = (width * height)[:, None] * share
    w = np.round(np.sqrt(area * ratio)).astype(np.int64)
    h = np.round(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    first = fits.argmax(axis=1)[:, None]
    found = fits.any(axis=1)
    w = np.where(found, np.take_along_axis(w, first, 1)[:, 0], np.minimum(width, np.round(height * RATIO[1])))
    h = np.where(found, np.take_along_axis(h, first, 1)[:, 0], np.minimum(height, np.round(width / RATIO[0])))
    top = np.where(found, np.floor(u[:, TOP] * (height - h + 1)), (height - h) // 2)
    left = np.where(found, np.floor(u[:, LEFT] * (width - w + 1)), (width - w) // 2)
    return np.stack([top, left, h, w], axis=1).astype(np.int64)


def crop_box(
    share: np.ndarray, ratio: np.ndarray, top: float, left: float, width: int, height: int
) -> tuple[int, int, int, int]:
    """Return what `crop_boxes` returns for one image, from its row of `crop_tries` and its draws TOP and LEFT.

    NumPy takes 0.1 ms for a batch of one; an image whose size is known only once it is decoded needs this.
    """
    for s, r in zip(share.tolist(), ratio.tolist(), strict=True):
        area = width * height * s
        w, h = round(math.sqrt(area * r)), round(math.sqrt(area / r))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(top * (height - h + 1)), math.floor(left * (width - w + 1)), h, w
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def flipped(view: View, u: np.ndarray) -> np.ndarray:
    """Say which samples are mirrored, bool [b]."""
    return u[:, FLIP] < view.flip_p


def center_geometry(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """Return (resized width, resized height, left, top) of the evaluation view of `size` pixels.

    The shorter side becomes 256/224 of `size` before the centre crop (as ISD evaluates on ImageNet), and
    `size` itself for views of at most 64 pixels, whose images have no border to spare.
    """
    short = size if size <= 64 else round(size * 256 / 224)
    if width <= height:
        new_width, new_height = short, max(size, int(short * height / width))
    else:
        new_width, new_height = max(size, int(short * width / height)), short
    return new_width, new_height, round((new_width - size) / 2), round((new_height - size) / 2)
