"""Contrast inside the batch: two views of an image attract each other and repel all others.

Chen, Kornblith, Norouzi, Hinton: A Simple Framework for Contrastive Learning of Visual Representations, ICML
2020 (arXiv 2002.05709). With z = n(g(f(view))) of both views of all B images of the global batch (NT-Xent):

    loss = mean over the 2B rows of -log exp(z_i.z_i+ / t) / sum_{j != i} exp(z_i.z_j / t)
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isd_ray.methods.base import Method, Output, encoder, full_precision, spread, two_views, unit, width
from isd_ray.models.heads import mlp


def local(rows: Tensor) -> Tensor:
    """Rows of the whole batch where one worker has all of them: as they are."""
    return rows


class SimCLR(Method):
    """SimCLR: projector d -> d -> 128 with batch norm after each layer; no teacher, no queue (`simclr`).

    gather: the rows of all workers from those of this one, with the gradient of every worker's loss with
    respect to this one's rows; the negatives are those of the whole global batch. With train.accumulate each
    part of a batch has only its own negatives.

    The released code sums the losses of both views where this is their mean, and its later version
    has three layers in the projector by default. The published recipes have LARS with a warm-up of
    10 epochs: ImageNet temperature .1, batches of 4096, lr .3 a 256 images, wd 1e-6; CIFAR-10
    temperature .5, batches of 512, lr 1 a 256 images, wd 1e-4, 1000 epochs. The defaults keep the
    temperature and views of CIFAR and replace LARS and its warm-up by plain SGD.
    """

    uses_queue: ClassVar[bool] = False
    defaults: ClassVar[dict[str, Any]] = {
        "method.temperature": 0.5,
        "method.views": ["simclr_cifar", "simclr_cifar"],
        "train.batch_norm": "sync",
        "train.lr": 0.25,
        "train.schedule": "cosine",
        "train.weight_decay": 1e-4,
    }

    def __init__(
        self,
        backbone: nn.Module,
        *,
        temperature: float | None = None,
        views: Sequence[str] | None = None,
        gather: Callable[[Tensor], Tensor] = local,
    ) -> None:
        super().__init__()
        dim = width(backbone)
        projector = mlp([dim, dim, 128], bias=False, last_bias=False, last_norm="bn")
        projector[-1].bias.requires_grad_(False)  # scaled, not shifted
        self.student = encoder(backbone, projector)
        self.temperature: float = self.option("temperature", temperature)
        self.views = two_views("SimCLR", self.option("views", views))
        self.gather = gather

    def forward(
        self, views: list[Tensor], index: Tensor, label: Tensor | None = None, diagnose: bool = False
    ) -> Output:
        z = unit(
            self.student(torch.cat(views))
        )  # 2b x D: both views share their batch statistics, as published
        image = index.repeat(2)
        with full_precision(z):
            loss = self.loss(z, image)
        return Output(loss, {"spread_student": spread(z.detach())} if diagnose else {})

    def loss(self, z: Tensor, image: Tensor) -> Tensor:
        """NT-Xent of z [2b, D], whose row i shows image[i]; row i and i +- b are the positive pairs."""
        every, owner = self.gather(z), self.gather(image)  # 2B x D, 2B
        positive = (z * z.roll(len(z) // 2, dims=0)).sum(dim=1, keepdim=True)
        same = image[:, None] == owner  # the row itself and its positive
        logits = torch.cat([positive, (z @ every.T).masked_fill(same, -torch.inf)], dim=1)
        return F.cross_entropy(logits / self.temperature, torch.zeros_like(image))

    def encoders(self) -> dict[str, nn.Module]:
        return {"student": self.student.get_submodule("backbone")}
