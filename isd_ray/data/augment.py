"""Random views of whole batches on the training device, reproducible from (seed, epoch, position) alone.

Per-sample randomness in a batch usually means a Python loop over images. Here a crop, its resize and its
mirror are two batched matrix products, and each colour operation runs once on the samples that drew it.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isd_ray.data import colour
from isd_ray.data import views as v
from isd_ray.data.views import VIEWS, View, draws, get_views

if TYPE_CHECKING:
    from isd_ray.data.stream import Batch

__all__ = ["VIEWS", "View", "center_view", "draws", "get_views", "make_views"]

Device = str | torch.device


def make_views(
    batch: "Batch",
    views: Sequence[str | View],
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: Device = "cpu",
) -> list[Tensor]:
    """Return one float32 Tensor [b, 3, S, S] a view, normalised: (x - mean) / std on values in [0, 1].

    S is `size` (less for the small crops of multi-crop). Images that travel whole (batch.image [b, 1, 3, H,
    W]) are cropped here; otherwise crop and mirror (and, where batch.finished, all but normalisation) were
    made where they were read, one a view, and V must equal len(views). Order: crop, jitter, grey, blur,
    solarise, mirror (mirroring commutes with all but the crop). Blur is left out of views under
    `View.blur_from` pixels, as recipes for small images do.
    """
    recipes = get_views(views)
    u = v.view_draws(batch.seed, batch.epoch, batch.position.numpy(), len(recipes))
    images = batch.image.to(device, non_blocking=True)
    whole = images[:, 0].float().div_(255) if images.shape[1] == 1 and not batch.cropped else None
    if whole is None and images.shape[1] != len(recipes):
        raise ValueError(f"the batch carries {images.shape[1]} crops for {len(recipes)} views")
    made = []
    for i, view in enumerate(recipes):
        side = view.pixels(size)
        x = (
            images[:, i, :, :side, :side].float().div_(255)
            if whole is None
            else crop(whole, view, u[i], side)
        )
        for part in _parts(x):
            if not batch.finished:
                photometric(x[part], view, u[i][part])
            normalise(x[part], mean, std)
        made.append(x)
    return made


def colour_views(images: np.ndarray, views: Sequence[View], u: np.ndarray) -> None:
    """Give cropped views, uint8 [b, V, 3, S, S], their colours in place, for draws u [V, b, NUMBERS].

    What `make_views` does between crop and normalisation, rounded to whole grey levels; on one thread, since many
    tasks run beside each other.
    """
    torch.set_num_threads(1)
    for i, view in enumerate(views):
        side = view.pixels(images.shape[-1])
        out = torch.from_numpy(images[:, i, :, :side, :side])
        for part in _parts(out):
            x = photometric(out[part].float().div_(255), view, u[i][part])
            out[part] = x.mul_(255).round_().to(torch.uint8)


def _parts(x: Tensor) -> list[slice]:
    """Cut a batch [b, C, H, W] into a few images at a time on a CPU: they stay in its cache from step to step."""
    few = max(1, colour.CACHE_BYTES // (4 * x[0].numel())) if x.device.type == "cpu" else len(x)
    return [slice(start, start + few) for start in range(0, len(x), few)]


def normalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (x - mean) / std a channel, in place."""
    shift, scale = (torch.tensor(list(values), device=x.device).view(1, -1, 1, 1) for values in (mean, std))
    return x.sub_(shift).div_(scale)


def crop(images: Tensor, view: View, u: np.ndarray, side: int) -> Tensor:
    """Return random resized crops, mirrored where drawn: [b, C, H, W] in [0, 1] -> [b, C, side, side]."""
    b, _, height, width = images.shape
    boxes = v.crop_boxes(view, u, np.full(b, width), np.full(b, height))
    top, left, h, w = torch.from_numpy(boxes).to(images.device, torch.float32).unbind(1)
    mirrored = torch.from_numpy(v.flipped(view, u)).to(images.device)
    rows = resize_matrices(top, h, height, side, view.interpolation)
    columns = resize_matrices(left, w, width, side, view.interpolation, mirrored)
    x = colour.separable(images, rows, columns)
    return x.clamp_(0, 1) if view.interpolation == "bicubic" else x


def resize_matrices(
    start: Tensor, length: Tensor, full: int, side: int, interpolation: str, mirrored: Tensor | None = None
) -> Tensor:
    """Return crop and antialiased resize along one axis as matrices [b, side, full].

    Sample i keeps pixels start[i] .. start[i] + length[i] and resizes them to `side`, with the triangle
    filter or the cubic one (a = -0.5) widened by the scale when it shrinks: Pillow's and torchvision's
    antialias=True.
    """
    scale = (length / side)[:, None, None]
    place = torch.arange(side, device=start.device)[:, None] + 0.5
    centre = scale * (
        place if mirrored is None else torch.where(mirrored[:, None, None], side - place, place)
    )
    pixel = torch.arange(full, device=start.device) - start[:, None, None]
    distance = (pixel + 0.5 - centre).div_(scale.clamp(min=1)).abs_()
    weight = _cubic(distance) if interpolation == "bicubic" else distance.neg_().add_(1).clamp_(min=0)
    weight.mul_((pixel >= 0) & (pixel < length[:, None, None]))
    return weight.div_(weight.sum(2, keepdim=True))


def _cubic(distance: Tensor) -> Tensor:
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))


def photometric(x: Tensor, view: View, u: np.ndarray) -> Tensor:
    """Apply jitter, grey, blur and solarise in place to the samples that drew them."""
    if view.grey_first:
        _grey(x, view, u)
    _jitter(x, view, u)
    if not view.grey_first:
        _grey(x, view, u)
    if x.shape[-1] >= view.blur_from:
        blurred = u[:, v.BLUR] < view.blur_p
        low, high = view.sigma
        sigma = _values(low + u[blurred, v.SIGMA] * (high - low), x)
        _replace(x, _chosen(blurred, x), lambda part: colour.blur(part, sigma, high))
    _replace(x, _chosen(u[:, v.SOLARIZE] < view.solarize_p, x), colour.solarize)
    return x


def _grey(x: Tensor, view: View, u: np.ndarray) -> None:
    _replace(x, _chosen(u[:, v.GREY] < view.grey_p, x), colour.grey)


def _jitter(x: Tensor, view: View, u: np.ndarray) -> None:
    """Apply the colour operations in an order of each sample's own: four passes, each operation on its samples."""
    if view.jitter_p == 0:
        return
    chosen = u[:, v.JITTER] < view.jitter_p
    order = np.argsort(u[:, v.ORDER], axis=1)  # [b, 4]: the operation of each pass
    strength = np.array(view.jitter)
    low = np.append(np.maximum(1 - strength[:3], 0), -strength[3])
    high = np.append(1 + strength[:3], strength[3])
    factors = _values(low + u[:, v.FACTORS] * (high - low), x)
    operations = (colour.brightness, colour.contrast, colour.saturation, colour.hue)
    for turn in range(4):
        for k, operation in enumerate(operations):
            mask = chosen & (order[:, turn] == k)
            if strength[k] > 0 and mask.any():
                index = _chosen(mask, x)
                _replace(x, index, _with(operation, factors[index, k]))


def _with(operation: Callable[[Tensor, Tensor], Tensor], values: Tensor) -> Callable[[Tensor], Tensor]:
    """Bind the strength of each sample."""
    return lambda images: operation(images, values)


def _chosen(mask: np.ndarray, x: Tensor) -> Tensor:
    return torch.from_numpy(np.flatnonzero(mask)).to(x.device)


def _values(values: np.ndarray, x: Tensor) -> Tensor:
    return torch.from_numpy(values).to(x.device, x.dtype)


def _replace(x: Tensor, index: Tensor, operation: Callable[[Tensor], Tensor]) -> None:
    if len(index) == len(x):
        x.copy_(operation(x))
    elif len(index):
        x[index] = operation(x[index])


def center_view(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return the evaluation view, float32 [b, C, size, size], of uint8 images [b, C, H, W].

    Images of this size stay as they are; others are resized (antialiased) and cut at the centre: see
    `views.center_geometry`.
    """
    x = images.float().div_(255)
    height, width = x.shape[-2:]
    if (height, width) != (size, size):
        new_width, new_height, left, top = v.center_geometry(width, height, size)
        x = F.interpolate(x, (new_height, new_width), mode="bilinear", antialias=True)
        x = x[..., top : top + size, left : left + size].contiguous()
    return normalise(x, mean, std)
