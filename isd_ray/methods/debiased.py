"""Some negatives are of the query's own class: subtract what a known class prior says they add.

Chuang, Robinson, Lin, Torralba, Jegelka: Debiased Contrastive Learning, NeurIPS 2020 (arXiv 2007.00224). With the
positive e+ = exp(z_i.z_i+ / t), the n = 2B - 2 negatives e_j and the class prior p:

    negatives = max((sum_j e_j - n p e+) / (1 - p), n exp(-1 / t)),   loss = -log e+ / (e+ + negatives)
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isd_ray.errors import UserError
from isd_ray.methods.simclr import SimCLR, local


class Debiased(SimCLR):
    """SimCLR with debiased negatives (`debiased`).

    class_prior: the chance that two images are of one class, 0 <= p < 1; 0 is SimCLR. It is one number for all
    images, as published, although on a long tail it is larger for images of frequent classes.

    Published: temperature .5, prior .1 on CIFAR-10 and STL-10, Adam (lr 1e-3, wd 1e-6), batches of 256, projector
    2048 -> 512 -> 128. The defaults keep temperature and prior and take head and optimiser of `simclr`, so that the two
    differ in the loss alone; both views then pass the network as one batch, in the authors' code
    each by itself.
    """

    defaults: ClassVar[dict[str, Any]] = {**SimCLR.defaults, "method.class_prior": 0.1}

    def __init__(
        self,
        backbone: nn.Module,
        *,
        temperature: float | None = None,
        class_prior: float | None = None,
        views: Sequence[str] | None = None,
        gather: Callable[[Tensor], Tensor] = local,
    ) -> None:
        super().__init__(backbone, temperature=temperature, views=views, gather=gather)
        self.class_prior: float = self.option("class_prior", class_prior)
        if not 0 <= self.class_prior < 1:
            raise UserError(f"method.class_prior: must lie in 0 <= p < 1, got {self.class_prior}")

    def loss(self, z: Tensor, image: Tensor) -> Tensor:
        """Debiased NT-Xent of z [2b, D], whose row i shows image[i]; row i and i +- b are the positive pairs."""
        every, owner = self.gather(z), self.gather(image)  # 2B x D, 2B
        t = self.temperature
        positive = ((z * z.roll(len(z) // 2, dims=0)).sum(dim=1) / t).exp()
        other = image[:, None] != owner
        n = other.sum(dim=1)
        total = (z @ every.T / t).exp().masked_fill(~other, 0).sum(dim=1)
        negatives = (total - n * self.class_prior * positive) / (1 - self.class_prior)
        negatives = torch.maximum(negatives, n * math.exp(-1 / t))
        return (1 + negatives / positive).log().mean()
