"""Batch norm over several workers: each its own, one for all, or keys shuffled between them.

`local`: a worker normalises with its own images. `sync`: with those of the global
batch. `shuffle`: locally, but the teacher sees images of all workers in each of its batches, so that the statistics of
a batch do not tell which key belongs to which query (MoCo, He et al. 2020, section 3.3; the published ISD too).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from isd_ray.errors import UserError
from isd_ray.methods import Method
from isd_ray.models.teacher import Teacher
from isd_ray.queue.exchange import all_reduce, gather_numbers, gather_rows


def spread_batch_norm(method: Method, kind: str, device: torch.device) -> Method:
    """Return the method with batch norm over workers as `kind` says; without other workers all kinds are `local`.

    Raises UserError where keys shall be shuffled and the method has no teacher that makes any.
    """
    teachers = [module for module in method.modules() if isinstance(module, Teacher)]
    if kind == "shuffle" and not teachers:
        raise UserError("--train.batch_norm shuffle: the method has no moving teacher; choose sync or local")
    if kind == "local" or not dist.is_initialized() or dist.get_world_size() == 1:
        return method
    if kind == "shuffle":
        for teacher in teachers:
            teacher.shuffle = shuffle
        return method
    convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm if device.type == "cuda" else to_global
    return convert(method)


class GlobalBatchNorm(_BatchNorm):
    """Batch norm [b, C, ...] over the images of all workers, for devices where torch has none (it needs CUDA).

    Mean and squared deviation are summed over the workers, one after the other, so that nothing cancels; the gradient
    goes through both. In eval mode it is an ordinary batch norm.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of dimensions from two on."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        axes, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        count = all_reduce(wide.new_tensor(x.numel() / x.shape[1]))
        mean = all_reduce(wide.sum(dim=axes)) / count
        centred = wide - mean.view(shape)
        variance = all_reduce(centred.square().sum(dim=axes)) / count
        self.track(mean.detach(), variance.detach() * count / (count - 1))
        out = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)

    @torch.no_grad()
    def track(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics, as torch does: the variance is the unbiased one."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(variance.to(self.running_var), share)


def to_global(module: nn.Module) -> nn.Module:
    """Replace each batch norm by a GlobalBatchNorm with the same weights and statistics."""
    if isinstance(module, _BatchNorm):
        made = GlobalBatchNorm(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
        )
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(made, name, getattr(module, name))
        return made.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, to_global(child))
    return module


@torch.no_grad()
def shuffle(network: nn.Module, images: Tensor) -> Tensor:
    """Embeddings [b, D] of this rank's images, each computed on a rank drawn for this step.

    The first rank draws; its generator is seeded by the step, so a continued run draws the same. Ranks may have
    different numbers of images. All ranks call it.
    """
    counts = [n for (n,) in gather_numbers([len(images)], images.device, None)]
    order = torch.randperm(sum(counts)).to(images.device)
    dist.broadcast(order, 0)
    rank = dist.get_rank()
    every = gather_rows([images], counts, None)[0]
    keys = gather_rows([network(every[order.split(counts)[rank]])], counts, None)[0]
    return torch.empty_like(keys).index_copy_(0, order, keys).split(counts)[rank]
