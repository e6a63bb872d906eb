"""Between contrast and relations: the target is part "this very image", part what the teacher finds alike.

Denize et al.: Similarity Contrastive Estimation for Self-Supervised Soft Contrastive Learning, WACV 2023
(arXiv 2111.14585). With p = softmax over [q.k ; A q] / temperature and s = softmax(A k / temperature_teacher)
over the anchors alone:

    loss = -weight * log p_positive - (1 - weight) * sum_j s_j log p_j,  mean of both directions

weight 1 is MoCo, weight 0 resembles ReSSL.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isd_ray.methods.base import Output, StudentTeacher, full_precision, spreads, two_views, width
from isd_ray.models.heads import mlp
from isd_ray.queue.losses import queue_diagnostics, sce


class SCE(StudentTeacher):
    """SCE: projector d -> 2d -> 2d -> 256 (last norm not affine), predictor 256 -> 2d -> 256 (`sce`).

    weight: share of the positive in the target, the paper's lambda. The teacher's s leaves the
    positive out, as in the paper; the authors' code without keys leaves it a logit of 0 there
    (1.3e-4 in the loss at 50 anchors, 1.8e-6 at 400).

    The hidden layers of the paper are 4096 wide, which is 2d for its ResNet-50. It trains on ImageNet with
    LARS (batches of 4096, lr .3 a 256 images, wd 1e-6, 10 epochs of warm-up), queue 65 536, own anchors not
    excluded, and BYOL's views with crops from .2. The defaults keep temperatures, weight and rising momentum
    and take SGD, a small queue and MoCo v2's views, which have those crops.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "method.temperature": 0.1,
        "method.temperature_teacher": 0.07,
        "method.weight": 0.5,
        "method.momentum": 0.99,
        "method.momentum_schedule": "cosine",
        "method.views": ["strong", "strong"],
        "queue.size": 4096,
        "queue.exclude_own": True,
        "train.batch_norm": "sync",
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
        temperature_teacher: float | None = None,
        weight: float | None = None,
        views: Sequence[str] | None = None,
        exclude_own: bool = True,
    ) -> None:
        dim = width(backbone)
        projector = mlp([dim, 2 * dim, 2 * dim, 256], last_norm="bn_no_affine")
        super().__init__(backbone, projector, mlp([256, 2 * dim, 256]))
        self.queue = queue
        self.temperature: float = self.option("temperature", temperature)
        self.temperature_teacher: float = self.option("temperature_teacher", temperature_teacher)
        self.weight: float = self.option("weight", weight)
        self.views = two_views("SCE", self.option("views", views))
        self.exclude_own = exclude_own

    @classmethod
    def embedding_dim(cls, backbone_dim: int) -> int:
        return 256

    def forward(
        self, views: list[Tensor], index: Tensor, label: Tensor | None = None, diagnose: bool = False
    ) -> Output:
        both = [(self.query(one), self.key(other)) for one, other in (views, views[::-1])]
        own = index if self.exclude_own else None
        with full_precision(index):
            loss = torch.stack([self.loss(q, k, own).mean() for q, k in both]).mean()
            diagnostics = self.diagnose(*both[0], index, label) if diagnose else {}
        for _, k in both:  # after the similarities: k is no anchor of its own step
            self.queue.enqueue(k, index, label)
        return Output(loss, diagnostics)

    def loss(self, q: Tensor, k: Tensor, own: Tensor | None) -> Tensor:
        """One direction, [b]."""
        return sce(self.queue, q, k, self.temperature, self.temperature_teacher, self.weight, exclude=own)

    def diagnose(self, q: Tensor, k: Tensor, index: Tensor, label: Tensor | None) -> dict[str, Tensor]:
        """How the teacher spreads its mass over the queue; spread of both networks."""
        own = index if self.exclude_own else None
        numbers = queue_diagnostics(self.queue, k, self.temperature_teacher, index, label, exclude=own)
        return numbers | spreads(q, k)
