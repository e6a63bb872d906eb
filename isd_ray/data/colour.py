"""Colour operations on whole batches, with a strength for every sample: what torchvision offers one by one.

All take float images [m, 3, H, W] in [0, 1] and parameters [m], and equal
torchvision.transforms.v2.functional for the same parameters. `blend` weights and the hue formula are the
usual ones (ITU-R 601 luma; HSV).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

CACHE_BYTES = 2**20  # float images that a core works on at a time: they stay in its cache
LUMA = (0.2989, 0.587, 0.114)


def luma(images: Tensor) -> Tensor:
    """Return the grey value of every pixel, [m, 1, H, W]."""
    red, green, blue = images.unbind(1)
    return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).unsqueeze_(1)


def grey(images: Tensor) -> Tensor:
    """Return grey images with three equal channels."""
    return luma(images).expand_as(images)


def _per_sample(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale all values by `factor`."""
    return (images * _per_sample(factor)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean grey value of the image."""
    mean = luma(images).flatten(1).mean(1)
    return (images * _per_sample(factor)).add_(_per_sample(mean * (1 - factor))).clamp_(0, 1)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey image."""
    return (images * _per_sample(factor)).add_(luma(images).mul_(_per_sample(1 - factor))).clamp_(0, 1)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the colour circle by `shift` of a full turn, in [-0.5, 0.5].

    Arithmetic alone: on a CPU a comparison or a `where` takes as long as eight sums.
    """
    red, green, blue = images.unbind(1)
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - torch.minimum(torch.minimum(red, green), blue)
    not_red = _is_positive(high - red)
    is_blue = _is_positive(high - green).mul_(not_red)
    from_red = green - blue  # the sector, times chroma, where red is highest; then what the others add to it
    from_green = (blue - red).add_(chroma, alpha=2).sub_(from_red)
    from_blue = (red - green).sub_(blue - red).add_(chroma, alpha=2)
    sector = from_red.addcmul_(not_red, from_green).addcmul_(is_blue, from_blue)
    sector.div_(chroma.clamp(min=1e-8))  # grey pixels: 0 / 1e-8
    sector.add_(6 * shift.view(-1, 1, 1))
    sector.sub_((sector / 6).floor_(), alpha=6)  # in [0, 6]: red 0, green 2, blue 4
    turned = torch.empty_like(images)
    for channel, centre in enumerate((3, 2, 4)):
        distance = (sector - centre).abs_()
        distance = distance.neg_().add_(2) if channel == 0 else distance.sub_(1)
        torch.addcmul(high, chroma, distance.clamp_(0, 1), value=-1, out=turned[:, channel])
    return turned


def _is_positive(x: Tensor) -> Tensor:
    """Return 1.0 where x > 0 and 0.0 where it is 0, for x >= 0; changes x."""
    return x.mul_(1e30).clamp_(max=1)


def solarize(images: Tensor) -> Tensor:
    """Invert the values from 128/255 up."""
    bright = (images - 128 / 255).mul_(1e30).add_(1).clamp_(0, 1)  # 1.0 or 0.0
    return images.addcmul(bright, 1 - 2 * images)


def blur_kernels(sigma: Tensor, radius: int) -> Tensor:
    """Return Gaussian weights that sum to one, [m, 2 radius + 1]."""
    offset = torch.arange(-radius, radius + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    return kernel / kernel.sum(1, keepdim=True)


def blur_matrices(sigma: Tensor, size: int, radius: int) -> Tensor:
    """Return Gaussian blur along one axis as matrices [m, size, size], reflected at the border."""
    offset = torch.arange(-radius, radius + 1, device=sigma.device)
    kernel = blur_kernels(sigma, radius)
    place = (torch.arange(size, device=sigma.device)[:, None] + offset).abs()
    place = torch.where(place >= size, 2 * (size - 1) - place, place)  # [size, 2 radius + 1]
    matrices = torch.zeros(len(sigma), size, size, device=sigma.device)
    return matrices.scatter_add_(2, place.expand(len(sigma), -1, -1), kernel[:, None].expand(-1, size, -1))


def blur(images: Tensor, sigma: Tensor, max_sigma: float) -> Tensor:
    """Blur with a Gaussian of `sigma` pixels, cut at three times `max_sigma`, reflected at the border.

    On a CPU weights past 3.5 sigma, 0.05 % of all, are left out too.
    """
    height, width = images.shape[-2:]
    radius = min(math.ceil(3 * max_sigma), height - 1, width - 1)
    if images.device.type != "cpu":
        return separable(images, blur_matrices(sigma, height, radius), blur_matrices(sigma, width, radius))
    few = max(1, CACHE_BYTES // (4 * images[0].numel()))
    parts = zip(images.split(few), sigma.split(few), strict=True)
    return torch.cat([_blur_by_taps(part, s, min(radius, math.ceil(3.5 * s.max()))) for part, s in parts])


def _blur_by_taps(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur as a sum of shifted images: less arithmetic than the matrices, and quicker while all fits in the cache."""
    kernel = blur_kernels(sigma, radius)
    for axis, border in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        padded, size = F.pad(images, border, mode="reflect"), images.shape[axis]
        images = padded.narrow(axis, 0, size) * _per_sample(kernel[:, 0])
        for tap in range(1, 2 * radius + 1):
            images.addcmul_(padded.narrow(axis, tap, size), _per_sample(kernel[:, tap]))
    return images


def separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Map both axes linearly: rows [m, S, H], images [m, C, H, W], columns [m, T, W] -> [m, C, S, T]."""
    m, channels, height, width = images.shape
    across = torch.bmm(images.reshape(m, channels * height, width), columns.transpose(1, 2))
    across = across.view(m, channels, height, -1)
    return torch.matmul(rows.unsqueeze(1), across)
