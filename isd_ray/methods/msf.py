"""BYOL pulls a query to its own key; mean shift pulls it to the nearest neighbours of that key as well.

Koohpayegani, Tejankar, Pirsiavash: Mean Shift for Self-Supervised Learning, ICCV 2021 (arXiv 2105.07269).
The teacher's k enters the queue first, so that it is its own nearest anchor; then over its n nearest

    q = n(h(g(f(view_student)))),  k = n(g(f_teacher(view_teacher)))
    loss = mean over the n anchors a_j nearest to k of |q - a_j|^2

One neighbour is BYOL-asym. With a weak view for the teacher it is the paper's MSF w/s.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from isd_ray.methods.base import Output, StudentTeacher, full_precision, spreads, two_views, width
from isd_ray.methods.isd import ISDPlus
from isd_ray.queue.losses import mean_shift, queue_diagnostics


class MSF(StudentTeacher):
    """Mean shift with the heads of ISD-plus: projector d -> 2d -> d/4, predictor d/4 -> 2d -> d/4 (`msf`).

    neighbours: n, the key itself included. Anchors of the image itself cannot be excluded: its key is one.
    views: strong, strong (regular) or strong, weak (w/s); student first.

    The published recipe is made for ImageNet: queue 128 000 and ten neighbours; the authors' code has five by
    default, which suit small data. The rest is as published.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "method.neighbours": 5,
        "method.momentum": 0.99,
        "method.momentum_schedule": "constant",
        "method.views": ["strong", "strong"],
        "queue.size": 4096,
        "train.batch_norm": "shuffle",
        "train.lr": 0.05,
        "train.schedule": "cosine",
        "train.weight_decay": 1e-4,
    }

    def __init__(
        self,
        backbone: nn.Module,
        queue: Any,
        *,
        neighbours: int | None = None,
        views: Sequence[str] | None = None,
    ) -> None:
        super().__init__(backbone, *ISDPlus.heads(width(backbone)))
        self.queue = queue
        self.neighbours: int = self.option("neighbours", neighbours)
        self.views = two_views("MSF", self.option("views", views))

    @classmethod
    def embedding_dim(cls, backbone_dim: int) -> int:
        return ISDPlus.embedding_dim(backbone_dim)

    def forward(
        self, views: list[Tensor], index: Tensor, label: Tensor | None = None, diagnose: bool = False
    ) -> Output:
        view_student, view_teacher = views
        q, k = self.query(view_student), self.key(view_teacher)  # b x D each
        self.queue.enqueue(k, index, label)  # before the search: k is its own nearest anchor
        with full_precision(q):
            loss = mean_shift(self.queue, q, k, self.neighbours).mean()
            return Output(loss, self.diagnose(q, k, index, label) if diagnose else {})

    def diagnose(self, q: Tensor, k: Tensor, index: Tensor, label: Tensor | None) -> dict[str, Tensor]:
        """Purity of the neighbours from other images; spread of both networks."""
        # The loss has no temperature; purity, the one number that is kept, does not depend on it.
        numbers = queue_diagnostics(
            self.queue, k, 1.0, label=label, exclude=index, nearest=max(self.neighbours - 1, 1)
        )
        return {name: numbers[name] for name in ("purity",) if name in numbers} | spreads(q, k)
