"""Every image is a class of its own, and a bank of all images' embeddings is the classifier.

Wu, Xiong, Yu, Lin: Unsupervised Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018 (arXiv
1805.01978). With z = n(g(f(view))), m_j the bank's row of image j, N images, and P_j = exp(z.m_j / t) / Z:

    all images:  loss = -log exp(z.m_i / t) / sum_j exp(z.m_j / t)
    K negatives: loss = -log P_i / (P_i + K/N) - sum over K drawn j of log (K/N) / (P_j + K/N)

then m_i <- n(bank_momentum m_i + (1 - bank_momentum) z).
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isd_ray.errors import UserError
from isd_ray.methods.base import Method, Output, encoder, full_precision, spread, unit, width
from isd_ray.methods.simclr import local
from isd_ray.models.heads import mlp


class InstanceLoss(nn.Module):
    """The loss above for embeddings z [b, D] of images whose rows of the bank are `own` [b, D]; the mean over b.

    The constant Z is estimated from the first batch, as N times the mean of exp(z.m / t) over its positives and
    negatives, and kept.
    """

    def __init__(self, temperature: float, gather: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.temperature, self.gather = temperature, gather
        self.log_z: Tensor
        self.estimated: Tensor
        self.register_buffer("log_z", torch.zeros(()))
        self.register_buffer("estimated", torch.tensor(False))

    def forward(self, z: Tensor, own: Tensor, bank: Any, negatives: Tensor | None) -> Tensor:
        """negatives [K, D]: rows of drawn images; None: all images."""
        positive = (z * own).sum(dim=1, keepdim=True) / self.temperature
        if negatives is None:
            return (bank.lse(z, self.temperature)[:, None] - positive).mean()
        noise = z @ negatives.T / self.temperature
        self.estimate(torch.cat([positive, noise], dim=1), bank.size)
        share = torch.tensor(len(negatives) / bank.size, dtype=z.dtype, device=z.device).log()
        log_z = self.log_z.to(z.dtype)
        positive, noise = positive - log_z - share, noise - log_z - share  # log of P / (K/N)
        return (F.softplus(-positive).squeeze(1) + F.softplus(noise).sum(dim=1)).mean()

    @torch.no_grad()
    def estimate(self, scores: Tensor, images: int) -> None:
        if not self.estimated:
            mean = self.gather(scores.logsumexp(dim=1)).logsumexp(dim=0)
            rows = self.gather(torch.ones_like(scores[:, 0])).sum()
            self.log_z.copy_(mean + (images / (rows * scores.shape[1])).log())
            self.estimated.fill_(True)


class NPID(Method):
    """NPID: a linear head d -> 128, one view, a bank, no teacher (`npid`).

    negatives: how many images are drawn; 0 contrasts with all of them. They are drawn once a step for the whole batch,
    where the authors' code draws for each image. gather: as in SimCLR, without a gradient.

    Published for ImageNet: 4096 negatives, temperature .07, lr .03, wd 1e-4, batches of 256, 200 epochs, lr times .1
    from epoch 120 every 40; for CIFAR: all images, temperature .1, wd 5e-4, batches of 128, a view without flip. The
    defaults are those of CIFAR, with flip.
    """

    uses_queue: ClassVar[bool] = False
    uses_bank: ClassVar[bool] = True
    defaults: ClassVar[dict[str, Any]] = {
        "method.temperature": 0.1,
        "method.negatives": 0,
        "method.bank_momentum": 0.5,
        "method.views": ["moco_v1"],
        "train.lr": 0.03,
        "train.schedule": "cosine",
        "train.weight_decay": 5e-4,
    }

    def __init__(
        self,
        backbone: nn.Module,
        bank: Any,
        *,
        temperature: float | None = None,
        negatives: int | None = None,
        bank_momentum: float | None = None,
        views: Sequence[str] | None = None,
        gather: Callable[[Tensor], Tensor] = local,
    ) -> None:
        super().__init__()
        self.student = encoder(backbone, mlp([width(backbone), self.embedding_dim(width(backbone))]))
        self.bank = bank
        self.criterion = InstanceLoss(self.option("temperature", temperature), gather)
        self.negatives: int = self.option("negatives", negatives)
        self.bank_momentum: float = self.option("bank_momentum", bank_momentum)
        self.views = tuple(self.option("views", views))
        if len(self.views) != 1:
            raise UserError(f"NPID takes one view, not {len(self.views)}: {list(self.views)}.")

    @classmethod
    def embedding_dim(cls, backbone_dim: int) -> int:
        return 128

    def forward(
        self, views: list[Tensor], index: Tensor, label: Tensor | None = None, diagnose: bool = False
    ) -> Output:
        z = unit(self.student(views[0]))
        with full_precision(z):
            noise = self.bank.shared(self.bank.draw(self.negatives)) if self.negatives else None
            loss = self.criterion(z, self.bank.read(index), self.bank, noise)
        self.bank.mix(index, z, self.bank_momentum)  # after the loss
        return Output(loss, {"spread_student": spread(z.detach())} if diagnose else {})

    def encoders(self) -> dict[str, nn.Module]:
        return {"student": self.student.get_submodule("backbone")}
