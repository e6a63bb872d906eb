"""A small student of a large, trained teacher: it learns how similar the teacher finds an image to past ones.

Koohpayegani, Tejankar, Pirsiavash: CompRess: Self-Supervised Learning by Compressing Representations, NeurIPS 2020
(arXiv 2010.14713). ISD's ancestor, with a teacher that is frozen. Both networks see the same view; with teacher
features k and student features q, both of unit length, and anchors of past images in the teacher's space (A) and the
student's (S):

    loss = KL(softmax(A k / temperature_teacher) || softmax(A q / temperature))      1q: q is mapped to the width of k
    loss = KL(softmax(A k / temperature_teacher) || softmax(S q / temperature))      2q
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isd_ray.errors import UserError
from isd_ray.methods.base import Method, Output, encoder, full_precision, spreads, unit, width
from isd_ray.models.frozen import Frozen
from isd_ray.models.teacher import Teacher
from isd_ray.queue.losses import queue_diagnostics, similarity_kl


class Compress1Q(Method):
    """CompRess with the teacher's anchors alone, and a linear layer d -> width of the teacher (`compress_1q`).

    teacher: a trained backbone. views: one recipe, and both networks see the same view; or two (student, teacher).
    exclude_own: leave out the anchors that come from the image itself.

    Published for ImageNet: queue 128 000 of random rows, own anchors not excluded, 130 epochs. The defaults keep the
    temperatures, views, optimiser and schedule (drops at epochs 90 and 120) and take a queue for small data that starts
    empty.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "method.teacher": None,
        "method.teacher_backbone": None,
        "method.teacher_encoder": "student",
        "method.temperature": 0.04,
        "method.temperature_teacher": 0.04,
        "method.views": ["compress"],
        "queue.size": 4096,
        "queue.exclude_own": True,
        "train.lr": 0.01,
        "train.schedule": "step",
        "train.milestones": [0.692, 0.923],
        "train.gamma": 0.2,
        "train.weight_decay": 1e-4,
    }

    def __init__(
        self,
        backbone: nn.Module,
        queue: Any,
        *,
        teacher: Frozen,
        temperature: float | None = None,
        temperature_teacher: float | None = None,
        views: Sequence[str] | None = None,
        exclude_own: bool = True,
    ) -> None:
        super().__init__()
        self.teacher = teacher
        self.queue = queue
        self.build(backbone)
        self.temperature: float = self.option("temperature", temperature)
        self.temperature_teacher: float = self.option("temperature_teacher", temperature_teacher)
        self.views = tuple(self.option("views", views))
        if len(self.views) not in (1, 2):
            raise UserError(
                f"a frozen teacher takes one view or two, not {len(self.views)}: {list(self.views)}."
            )
        self.exclude_own = exclude_own

    @classmethod
    def embedding_dim(cls, backbone_dim: int, teacher_dim: int = 0) -> int:
        return teacher_dim

    def build(self, backbone: nn.Module) -> None:
        """Build the student, whose embeddings are as wide as the teacher's features."""
        self.student = encoder(backbone, nn.Linear(width(backbone), self.teacher.dim))

    def forward(
        self, views: list[Tensor], index: Tensor, label: Tensor | None = None, diagnose: bool = False
    ) -> Output:
        q, k = unit(self.student(views[0])), unit(self.teacher(views[-1]))  # b x D, k without gradient
        own = index if self.exclude_own else None
        with full_precision(q):
            x, y = self.queries(q, k)
            loss, numbers = self.loss(x, y, own).mean(), {}
            if diagnose:
                t = self.temperature_teacher
                numbers = queue_diagnostics(self.queue, y, t, index, label, exclude=own) | spreads(q, k)
        self.queue.enqueue(self.anchors(k, views[-1]), index, label)  # after the similarities
        return Output(loss, numbers)

    def queries(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k as rows that are compared with those of the queue."""
        return q, k

    def anchors(self, k: Tensor, view: Tensor) -> Tensor:
        """Rows that enter the queue, for the teacher's embeddings k of a view."""
        return k

    def loss(self, q: Tensor, k: Tensor, own: Tensor | None) -> Tensor:
        """Divergence of each row, [b]."""
        return similarity_kl(self.queue, q, k, self.temperature, self.temperature_teacher, exclude=own)

    def encoders(self) -> dict[str, nn.Module]:
        return {"student": self.student.get_submodule("backbone"), "teacher": self.teacher.network}


class Compress2Q(Compress1Q):
    """CompRess with anchors in both spaces; the student is the plain backbone (`compress_2q`).

    The student's anchors come from its moving average (EMA), which is not evaluated. Both anchors of an image are one
    row [teacher | student] of one queue; k is compared with it as [k | 0] and q as [0 | q].

    Published for ImageNet: momentum .999, the rest as for `compress_1q`. The default suits short runs.
    """

    defaults: ClassVar[dict[str, Any]] = {
        **Compress1Q.defaults,
        "method.momentum": 0.99,
        "method.momentum_schedule": "constant",
    }

    @classmethod
    def embedding_dim(cls, backbone_dim: int, teacher_dim: int = 0) -> int:
        return teacher_dim + backbone_dim

    def build(self, backbone: nn.Module) -> None:
        self.student = encoder(backbone, nn.Identity())
        self.average = Teacher(self.student)

    def update_teacher(self, momentum: float) -> None:
        self.average.update(self.student, momentum)

    def queries(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return F.pad(q, (k.shape[1], 0)), F.pad(k, (0, q.shape[1]))

    def anchors(self, k: Tensor, view: Tensor) -> Tensor:
        return torch.cat([k, unit(self.average(view))], dim=1)
