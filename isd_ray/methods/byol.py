"""Without negatives: a student predicts the embedding that a slowly moving teacher gives another view.

Grill et al.: Bootstrap Your Own Latent, NeurIPS 2020 (arXiv 2006.07733):

    q = n(h(g(f(view_1)))),  k = n(g(f_teacher(view_2)))
    loss = |q - k|^2 = 2 - 2 q.k,  plus the same with the views swapped

BYOL-asym is the baseline of the ISD paper (Tejankar et al. 2021): one direction only, the heads of ISD-plus,
plain SGD and a constant momentum, so that it differs from ISD-plus in the loss alone.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isd_ray.methods.base import Output, StudentTeacher, full_precision, spreads, two_views, width
from isd_ray.methods.isd import ISDPlus
from isd_ray.models.heads import mlp


class BYOL(StudentTeacher):
    """BYOL: projector d -> 2d -> 256, predictor 256 -> 2d -> 256, both directions, rising momentum (`byol`).

    The hidden layers of the paper are 4096 wide, which is 2d for its ResNet-50. It trains on ImageNet with
    LARS (batches of 4096, lr .3 a 256 images, wd 1e-6, 10 epochs of warm-up, momentum .99 at first for up to
    300 epochs, .996 for 1000). The defaults keep momentum and views and take the SGD of BYOL-asym.
    """

    uses_queue: ClassVar[bool] = False
    symmetric: ClassVar[bool] = True
    defaults: ClassVar[dict[str, Any]] = {
        "method.momentum": 0.99,
        "method.momentum_schedule": "cosine",
        "method.views": ["byol_1", "byol_2"],
        "train.batch_norm": "sync",
        "train.lr": 0.05,
        "train.schedule": "cosine",
        "train.weight_decay": 1e-4,
    }

    def __init__(self, backbone: nn.Module, *, views: Sequence[str] | None = None) -> None:
        super().__init__(backbone, *self.heads(width(backbone)))
        self.views = two_views(type(self).__name__, self.option("views", views))

    @staticmethod
    def heads(dim: int) -> tuple[nn.Module, nn.Module]:
        """Projector (student and teacher) and predictor (student only) for features of width `dim`."""
        return mlp([dim, 2 * dim, 256]), mlp([256, 2 * dim, 256])

    def forward(
        self, views: list[Tensor], index: Tensor, label: Tensor | None = None, diagnose: bool = False
    ) -> Output:
        pairs = [views, views[::-1]] if self.symmetric else [views]
        both = [(self.query(one), self.key(other)) for one, other in pairs]
        with full_precision(index):
            loss = torch.stack([(q - k).square().sum(dim=1).mean() for q, k in both]).sum()
            return Output(loss, spreads(*both[0]) if diagnose else {})


class BYOLAsym(BYOL):
    """BYOL in one direction: projector d -> 2d -> d/4, predictor d/4 -> 2d -> d/4 (`byol_asym`)."""

    symmetric: ClassVar[bool] = False
    defaults: ClassVar[dict[str, Any]] = {
        **BYOL.defaults,
        "train.batch_norm": "shuffle",
        "method.momentum_schedule": "constant",
        "method.views": ["strong", "strong"],
    }
    heads = staticmethod(ISDPlus.heads)
