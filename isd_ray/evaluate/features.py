"""Frozen features of many images: a backbone's, or the raw pixels' as the floor that any method has to beat.

The evaluation never trains the backbone, so its features are computed once and every protocol works from
them.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Images = Tensor | Iterable[Tensor]  # uint8 [N, C, H, W], or batches of it
View = Callable[[Tensor], Tensor]  # uint8 [b, C, H, W] -> float [b, C, S, S]


@torch.no_grad()
def extract(
    backbone: nn.Module,
    images: Images,
    view: View,
    *,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Return the features of `images`: float32 [N, d] on the CPU, in the order of the images.

    `images` is uint8 [N, C, H, W] or an iterable of such batches; `view` (the centre view of the evaluation)
    makes floats of a batch that already lies on `device`. The backbone stays where it is (put it on `device`
    first) and runs in eval mode: batch norm uses its running statistics. Every submodule's mode is restored
    afterwards.
    """
    with _evaluating(backbone):
        features = []
        for batch in _batches(images, batch_size):
            x = view(batch.to(device, non_blocking=True))
            x = x.contiguous(memory_format=torch.channels_last)  # 1.5x on a CPU, and what tensor cores want
            features.append(backbone(x).flatten(1).float().cpu())
    return torch.cat(features)


@torch.no_grad()
def pixels(images: Images, size: int | None = None, *, batch_size: int = 1024) -> Tensor:
    """Return raw pixels in [0, 1] as features: float32 [N, C * H * W].

    `size` scales the images to `size` x `size` first (bilinear, antialiased): needed where the images are
    large.
    """
    features = []
    for batch in _batches(images, batch_size):
        x = batch.float() / 255
        if size is not None and x.shape[-2:] != (size, size):
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        features.append(x.flatten(1).cpu())
    return torch.cat(features)


def _batches(images: Images, batch_size: int) -> Iterator[Tensor]:
    for block in (images,) if isinstance(images, Tensor) else images:
        yield from block.split(batch_size)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule is in its own mode again, also where some were frozen."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
