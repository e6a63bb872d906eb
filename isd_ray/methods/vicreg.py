"""Three plain demands on embeddings: views agree, every dimension varies, no two dimensions say the same.

Bardes, Ponce, LeCun: VICReg: Variance-Invariance-Covariance Regularization, ICLR 2022 (arXiv 2105.04906). With z, z'
[B, D] of both views over the global batch:

    loss = 25 mean (z - z')^2 + 25 (v(z) + v(z')) / 2 + (c(z) + c(z'))
    v(z) = mean_j relu(1 - sqrt(var_j + 1e-4)),   c(z) = sum_{i != j} cov_ij^2 / D
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isd_ray.methods.base import Method, Output, encoder, full_precision, spread, two_views, unit, width
from isd_ray.methods.simclr import local
from isd_ray.models.heads import mlp

EPS = 1e-4


class VICReg(Method):
    """VICReg: expander d -> 2048 -> 2048 -> 2048 without normalised output, no teacher, no queue (`vicreg`).

    weight_invariance, weight_variance, weight_covariance: factors of the three terms. gather: as in SimCLR; variance
    and covariance (unbiased) are those of the global batch.

    The paper's expander is 8192 wide and trained with LARS (lr .2 a 256 images, wd 1e-6, batches of 2048); the CIFAR
    recipe of solo-learn has lr .3, wd 1e-4. The defaults take 2048 and plain SGD. The last batch
    norm of each block of the backbone starts at 1, in the authors' code at 0.
    """

    uses_queue: ClassVar[bool] = False
    defaults: ClassVar[dict[str, Any]] = {
        "method.weight_invariance": 25.0,
        "method.weight_variance": 25.0,
        "method.weight_covariance": 1.0,
        "method.views": ["byol_1", "byol_2"],
        "train.batch_norm": "sync",
        "train.lr": 0.01,
        "train.schedule": "cosine",
        "train.weight_decay": 1e-4,
    }
    hidden: ClassVar[int] = 2048

    def __init__(
        self,
        backbone: nn.Module,
        *,
        weight_invariance: float | None = None,
        weight_variance: float | None = None,
        weight_covariance: float | None = None,
        views: Sequence[str] | None = None,
        gather: Callable[[Tensor], Tensor] = local,
    ) -> None:
        super().__init__()
        sizes = [width(backbone), self.hidden, self.hidden, self.hidden]
        self.student = encoder(backbone, mlp(sizes, last_bias=False))
        self.weight_invariance: float = self.option("weight_invariance", weight_invariance)
        self.weight_variance: float = self.option("weight_variance", weight_variance)
        self.weight_covariance: float = self.option("weight_covariance", weight_covariance)
        self.views = two_views("VICReg", self.option("views", views))
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
        both = [z.float() if z.dtype in (torch.float16, torch.bfloat16) else z for z in (first, second)]
        invariance = (both[0] - both[1]).square().mean()
        variance = torch.stack([(1 - (z.var(dim=0) + EPS).sqrt()).relu().mean() for z in both]).mean()
        covariance = torch.stack([off_diagonal(z) for z in both]).sum()
        loss = self.weight_invariance * invariance + self.weight_variance * variance
        return loss + self.weight_covariance * covariance

    def encoders(self) -> dict[str, nn.Module]:
        return {"student": self.student.get_submodule("backbone")}


def off_diagonal(z: Tensor) -> Tensor:
    """Sum of the squared covariances of different columns of z [B, D], divided by D."""
    z = z - z.mean(dim=0)
    covariance = z.T @ z / (len(z) - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[1]
