"""Relations instead of instances: the student copies how alike the teacher finds a view and past images.

Zheng et al.: ReSSL: Relational Self-Supervised Learning with Weak Augmentation, NeurIPS 2021 (arXiv
2107.09282). ISD's closest relative: no predictor, and a weak view for the teacher, whose sharper
distribution is the target.

    q = n(g(f(strong view))),  k = n(g(f_teacher(weak view)))
    loss = -sum_j softmax(A k / temperature_teacher)_j log softmax(A q / temperature)_j
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from isd_ray.methods.base import Output, StudentTeacher, full_precision, spreads, two_views, width
from isd_ray.models.heads import mlp
from isd_ray.queue.losses import queue_diagnostics, similarity_ce


class ReSSL(StudentTeacher):
    """ReSSL: projector d -> 2d -> 512 without batch norm, no predictor (`ressl`).

    The hidden layer of the paper is 4096 wide, which is 2d for its ResNet-50. The published recipe is made
    for ImageNet: momentum .999, queue 131 072, own anchors not excluded, 5 epochs of warm-up in 200. The
    defaults keep temperatures, views and SGD; queue and momentum are those of the paper's small data sets.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "method.temperature": 0.1,
        "method.temperature_teacher": 0.04,
        "method.momentum": 0.99,
        "method.momentum_schedule": "constant",
        "method.views": ["strong", "weak"],
        "queue.size": 4096,
        "queue.exclude_own": True,
        "train.batch_norm": "shuffle",
        "train.lr": 0.05,
        "train.schedule": "cosine",
        "train.weight_decay": 1e-4,
        "train.decay_norm_and_bias": False,
    }

    def __init__(
        self,
        backbone: nn.Module,
        queue: Any,
        *,
        temperature: float | None = None,
        temperature_teacher: float | None = None,
        views: Sequence[str] | None = None,
        exclude_own: bool = True,
    ) -> None:
        dim = width(backbone)
        super().__init__(backbone, mlp([dim, 2 * dim, 512], norm="none"), nn.Identity())
        self.queue = queue
        self.temperature: float = self.option("temperature", temperature)
        self.temperature_teacher: float = self.option("temperature_teacher", temperature_teacher)
        self.views = two_views("ReSSL", self.option("views", views))
        self.exclude_own = exclude_own

    @classmethod
    def embedding_dim(cls, backbone_dim: int) -> int:
        return 512

    def forward(
        self, views: list[Tensor], index: Tensor, label: Tensor | None = None, diagnose: bool = False
    ) -> Output:
        view_student, view_teacher = views
        q, k = self.query(view_student), self.key(view_teacher)  # b x D each
        own = index if self.exclude_own else None
        with full_precision(q):
            loss = similarity_ce(
                self.queue, q, k, self.temperature, self.temperature_teacher, exclude=own
            ).mean()
            diagnostics = self.diagnose(q, k, index, label) if diagnose else {}
        self.queue.enqueue(k, index, label)  # after the similarities: k is no anchor of its own step
        return Output(loss, diagnostics)

    def diagnose(self, q: Tensor, k: Tensor, index: Tensor, label: Tensor | None) -> dict[str, Tensor]:
        """How the teacher spreads its mass over the queue; spread of both networks."""
        own = index if self.exclude_own else None
        numbers = queue_diagnostics(self.queue, k, self.temperature_teacher, index, label, exclude=own)
        return numbers | spreads(q, k)
