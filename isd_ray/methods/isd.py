"""Most images of an unbalanced set are no negatives of each other; ISD learns how similar they are instead.

Tejankar, Koohpayegani, Pillai, Favaro, Pirsiavash: ISD: Self-Supervised Learning by Iterative Similarity
Distillation, ICCV 2021 (arXiv 2012.09259). The student q and the teacher k see two views of an image and
compare it with the same anchors (past teacher embeddings in the queue); the student learns the teacher's
distribution over them:

    q = n(h(g(f(view_student)))),  k = n(g(f_teacher(view_teacher)))
    loss = KL(softmax(A k / temperature_teacher) || softmax(A q / temperature))
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isd_ray.methods.base import Output, StudentTeacher, full_precision, spreads, two_views, width
from isd_ray.models.heads import mlp
from isd_ray.queue.losses import queue_diagnostics, similarity_kl


class ISD(StudentTeacher):
    """ISD without a projector: the anchors are the features themselves, predictor d -> d -> d (`isd`).

    backbone: images -> features [b, backbone.dim]; queue: of `embedding_dim(backbone.dim)` columns.
    temperature: of the student; temperature_teacher: of the teacher. views: recipes (student, teacher).
    exclude_own: leave out the anchors that come from the image itself. On a set not much larger than the
    queue they would take nearly all of the teacher's mass. None: the recipe's value, as in `defaults`.

    The published recipe is made for ImageNet: momentum .999, queue 128 000, initialised "isd_v1", own
    anchors not excluded. The defaults keep its temperatures, optimiser and schedule (drops at epochs 140 and
    180 of 200) and suit the rest to small data (momentum .99 has a time constant of 100 steps). The
    teacher is evaluated with its own batch-norm statistics; `teacher_*` of the authors' eval_knn.py
    takes encoder_k's weights with those of encoder_q.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "method.temperature": 0.02,
        "method.temperature_teacher": 0.02,
        "method.momentum": 0.99,
        "method.momentum_schedule": "constant",
        "method.views": ["strong", "strong"],
        "queue.size": 4096,
        "queue.exclude_own": True,
        "queue.init": "empty",
        "train.batch_norm": "shuffle",
        "train.lr": 0.01,
        "train.schedule": "step",
        "train.milestones": [0.7, 0.9],
        "train.gamma": 0.2,
        "train.weight_decay": 1e-4,
        "train.epochs": 200,
        "train.batch_size": 256,
        "train.warmup_epochs": 0,
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
        super().__init__(backbone, *self.heads(width(backbone)))
        self.queue = queue  # neither module nor buffer: its state is saved apart, in global order of age
        self.temperature: float = self.option("temperature", temperature)
        self.temperature_teacher: float = self.option("temperature_teacher", temperature_teacher)
        self.views = two_views("ISD", self.option("views", views))
        self.exclude_own = exclude_own

    @classmethod
    def embedding_dim(cls, backbone_dim: int) -> int:
        return backbone_dim

    @staticmethod
    def heads(dim: int) -> tuple[nn.Module, nn.Module]:
        """Projector (student and teacher) and predictor (student only) for features of width `dim`."""
        return nn.Identity(), mlp([dim, dim, dim], bias=False)

    def forward(
        self, views: list[Tensor], index: Tensor, label: Tensor | None = None, diagnose: bool = False
    ) -> Output:
        view_student, view_teacher = views
        q = self.query(view_student)  # b x D
        k = self.key(view_teacher)  # b x D, no gradient
        own = index if self.exclude_own else None
        with full_precision(q):
            loss = similarity_kl(
                self.queue, q, k, self.temperature, self.temperature_teacher, exclude=own
            ).mean()
            diagnostics = self.diagnose(q, k, index, label) if diagnose else {}
        self.queue.enqueue(k, index, label)  # after the similarities: k is no anchor of its own step
        return Output(loss, diagnostics)

    @torch.no_grad()
    def diagnose(self, q: Tensor, k: Tensor, index: Tensor, label: Tensor | None) -> dict[str, Tensor]:
        """Entropy, top mass, own-image mass and purity of the teacher; spread of both networks."""
        own = index if self.exclude_own else None
        numbers = queue_diagnostics(self.queue, k, self.temperature_teacher, index, label, exclude=own)
        return numbers | spreads(q, k)


class ISDR18(ISD):
    """ISD with a choice of views, by default strong for the student and weak for the teacher (`isd_r18`)."""

    defaults: ClassVar[dict[str, Any]] = {**ISD.defaults, "method.views": ["strong", "weak"]}


class ISDPlus(ISD):
    """ISD with projector d -> 2d -> d/4, predictor d/4 -> 2d -> d/4 and a sharper teacher (`isd_plus`).

    The published recipe has momentum .99, queue 128 000 of random unit rows, and excludes nothing.
    """

    defaults: ClassVar[dict[str, Any]] = {
        **ISDR18.defaults,
        "method.temperature": 0.1,
        "method.temperature_teacher": 0.01,
        "train.batch_norm": "shuffle",
        "train.lr": 0.05,
        "train.schedule": "cosine",
    }

    @classmethod
    def embedding_dim(cls, backbone_dim: int) -> int:
        return backbone_dim // 4

    @staticmethod
    def heads(dim: int) -> tuple[nn.Module, nn.Module]:
        return mlp([dim, 2 * dim, dim // 4]), mlp([dim // 4, 2 * dim, dim // 4])
