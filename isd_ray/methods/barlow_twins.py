"""No negatives, no teacher: the dimensions of two views' embeddings agree with themselves and with no other.

Zbontar, Jing, Misra, LeCun, Deny: Barlow Twins, ICML 2021 (arXiv 2103.03230). With z of both views at mean 0 and
deviation 1 over the B images of the global batch and C = z_1^T z_2 / B:

    loss = scale (sum_i (1 - C_ii)^2 + weight sum_{i != j} C_ij^2)
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isd_ray.methods.base import Method, Output, encoder, full_precision, spread, two_views, unit, width
from isd_ray.methods.simclr import local
from isd_ray.models.heads import mlp

EPS = 1e-5  # of batch norm


class BarlowTwins(Method):
    """Barlow Twins: projector d -> 2048 -> 2048 -> 2048, no teacher, no queue (`barlow_twins`).

    weight: of the terms off the diagonal. gather: as in SimCLR; the statistics are those of the global batch.

    The paper's projector is 8192 wide; it trains with LARS (lr .2 a 256 images, wd 1e-6, batches of 2048, 10 epochs of
    warm-up) at scale .024, the CIFAR recipe of solo-learn at .1 (lr .3, wd 1e-4). The defaults take 2048 and plain SGD,
    whose lr must be small: the loss begins at about 2000 times the scale. The last batch norm of
    each block of the backbone starts at 1, in the authors' code at 0.
    """

    uses_queue: ClassVar[bool] = False
    defaults: ClassVar[dict[str, Any]] = {
        "method.weight": 0.0051,
        "method.scale": 0.1,
        "method.views": ["byol_1", "byol_2"],
        "train.batch_norm": "sync",
        "train.lr": 0.0003,
        "train.schedule": "cosine",
        "train.weight_decay": 1e-4,
    }
    hidden: ClassVar[int] = 2048

    def __init__(
        self,
        backbone: nn.Module,
        *,
        weight: float | None = None,
        scale: float | None = None,
        views: Sequence[str] | None = None,
        gather: Callable[[Tensor], Tensor] = local,
    ) -> None:
        super().__init__()
        sizes = [width(backbone), self.hidden, self.hidden, self.hidden]
        self.student = encoder(backbone, mlp(sizes, bias=False, last_bias=False))
        self.weight: float = self.option("weight", weight)
        self.scale: float = self.option("scale", scale)
        self.views = two_views("Barlow Twins", self.option("views", views))
        self.gather = gather

    def forward(
        self, views: list[Tensor], index: Tensor, label: Tensor | None = None, diagnose: bool = False
    ) -> Output:
        first, second = (self.student(view) for view in views)  # b x D
        with full_precision(first):
            loss = self.loss(self.gather(first), self.gather(second))
            return Output(loss, {"spread_student": spread(unit(first.detach()))} if diagnose else {})

    def loss(self, first: Tensor, second: Tensor) -> Tensor:
        """Of embeddings [B, D] of both views."""
        correlation = standardised(first).T @ standardised(second) / len(first)
        diagonal = correlation.diagonal()
        on = (1 - diagonal).square().sum()
        return self.scale * (on + self.weight * (correlation.square().sum() - diagonal.square().sum()))

    def encoders(self) -> dict[str, nn.Module]:
        return {"student": self.student.get_submodule("backbone")}


def standardised(z: Tensor) -> Tensor:
    """Columns of z [B, D] at mean 0 and deviation 1, in at least float32, as a batch norm without parameters does."""
    z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    z = z - z.mean(dim=0)
    return z * (z.square().mean(dim=0) + EPS).rsqrt()
