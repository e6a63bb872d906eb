"""Contrast with more negatives than a batch holds: past keys of a slowly moving encoder, in a queue.

Chen, Fan, Girshick, He: Improved Baselines with Momentum Contrastive Learning, 2020 (arXiv 2003.04297), over
He et al.: Momentum Contrast, CVPR 2020 (arXiv 1911.05722). A query q and the key k of another view of its
image are to be more alike than q and the anchors a_j, past keys of other images:

    q = n(g(f(view_1))),  k = n(g(f_teacher(view_2)))
    loss = -log exp(q.k / temperature) / (exp(q.k / temperature) + sum_j exp(q.a_j / temperature))
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isd_ray.methods.base import Output, StudentTeacher, full_precision, spreads, two_views, width
from isd_ray.models.heads import mlp
from isd_ray.queue.losses import info_nce, queue_diagnostics


class MoCoV2(StudentTeacher):
    """MoCo v2: projector d -> d -> 128 without batch norm, no predictor (`moco_v2`).

    symmetric: also swap the views and add that loss, as the authors do for CIFAR; it costs twice as much.
    exclude_own: leave out past keys of the image itself, which are no negatives.

    The published recipe is made for ImageNet: momentum .999, queue 65 536, lr .03 for batches of 256, own
    keys not excluded. The defaults keep its temperature and take momentum, queue, lr and weight decay of the
    authors' CIFAR recipe (which has temperature .1 and batches of 512).
    """

    defaults: ClassVar[dict[str, Any]] = {
        "method.temperature": 0.2,
        "method.momentum": 0.99,
        "method.momentum_schedule": "constant",
        "method.symmetric": False,
        "method.views": ["strong", "strong"],
        "queue.size": 4096,
        "queue.exclude_own": True,
        "train.batch_norm": "shuffle",
        "train.lr": 0.06,
        "train.schedule": "cosine",
        "train.weight_decay": 5e-4,
    }

    def __init__(
        self,
        backbone: nn.Module,
        queue: Any,
        *,
        temperature: float | None = None,
        symmetric: bool | None = None,
        views: Sequence[str] | None = None,
        exclude_own: bool = True,
    ) -> None:
        dim = width(backbone)
        super().__init__(backbone, self.projector(dim), nn.Identity())
        self.queue = queue
        self.temperature: float = self.option("temperature", temperature)
        self.symmetric: bool = self.option("symmetric", symmetric)
        self.views = two_views("MoCo", self.option("views", views))
        self.exclude_own = exclude_own

    @staticmethod
    def projector(dim: int) -> nn.Module:
        """Of student and teacher, for features of width `dim`."""
        return mlp([dim, dim, 128], norm="none")

    @classmethod
    def embedding_dim(cls, backbone_dim: int) -> int:
        return 128

    def forward(
        self, views: list[Tensor], index: Tensor, label: Tensor | None = None, diagnose: bool = False
    ) -> Output:
        pairs = [views, views[::-1]] if self.symmetric else [views]
        both = [(self.query(one), self.key(other)) for one, other in pairs]
        own = index if self.exclude_own else None
        with full_precision(index):
            loss = torch.stack([self.loss(q, k, own).mean() for q, k in both]).sum()
            diagnostics = self.diagnose(*both[0], index, label) if diagnose else {}
        for _, k in both:  # after the similarities: k is no negative of its own step
            self.queue.enqueue(k, index, label)
        return Output(loss, diagnostics)

    def loss(self, q: Tensor, k: Tensor, own: Tensor | None) -> Tensor:
        """InfoNCE of each row, [b]."""
        return info_nce(self.queue, q, k, self.temperature, exclude=own)

    def diagnose(self, q: Tensor, k: Tensor, index: Tensor, label: Tensor | None) -> dict[str, Tensor]:
        """How the key sees the queue at this temperature; spread of both networks."""
        own = index if self.exclude_own else None
        numbers = queue_diagnostics(self.queue, k, self.temperature, index, label, exclude=own)
        return numbers | spreads(q, k)


class MoCoV1(MoCoV2):
    """MoCo: projector d -> 128, one linear layer (`moco_v1`).

    Published for ImageNet: temperature .07, queue 65 536, momentum .999, lr .03 for batches of 256, drops to a tenth at
    60 and 80 % of 200 epochs. The defaults keep temperature, views and these drops.
    """

    defaults: ClassVar[dict[str, Any]] = {
        **MoCoV2.defaults,
        "method.temperature": 0.07,
        "method.views": ["moco_v1", "moco_v1"],
        "train.schedule": "step",
        "train.milestones": [0.6, 0.8],
        "train.gamma": 0.1,
    }

    @staticmethod
    def projector(dim: int) -> nn.Module:
        return mlp([dim, 128])
