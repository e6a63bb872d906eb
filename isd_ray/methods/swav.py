"""Swapped prediction of clusters: the code of one view is predicted from the others.

Caron, Misra, Mairal, Goyal, Bojanowski, Joulin: Unsupervised Learning of Visual Features by Contrasting Cluster
Assignments, NeurIPS 2020 (arXiv 2006.09882). With z = n(g(f(view))), unit prototypes C, scores s = C z and the codes
Q = sinkhorn(s) of the two large views, over the global batch:

    loss = mean over large views c and all other views v of -sum_j Q_cj log softmax(s_v / t)_j

The codes give every prototype the same mass. On unbalanced data that is a prior which the data contradict.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isd_ray.errors import UserError
from isd_ray.methods.base import Method, Output, encoder, full_precision, multi_crop, spread, unit, width
from isd_ray.methods.simclr import local
from isd_ray.models.heads import mlp
from isd_ray.models.prototypes import Prototypes, sinkhorn


class SwAV(Method):
    """SwAV: projector d -> 2048 -> 128, no teacher; multi-crop by more than two views (`swav`).

    views: two large ones, whose codes are predicted, then any number of small ones. prototypes: how many. queue_start:
    step from which the embeddings in the queue take part in the codes, so that a small batch is spread over many
    prototypes; one row holds both large views of an image. freeze: first steps without a change of the prototypes.
    gather: as in SimCLR, here without a gradient.

    Published for ImageNet: 3000 prototypes, queue 3840 from epoch 15 (batches of 256), 2 x 224 and 6 x 96 px, LARS (lr
    4.8 for batches of 4096, .6 for 256, wd 1e-6), prototypes frozen for 313 steps. The CIFAR recipe of solo-learn has
    no small views. The defaults take fewer prototypes, and plain SGD. Views of one size share their
    batch statistics in the backbone, all views those of the projector.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "method.temperature": 0.1,
        "method.epsilon": 0.05,
        "method.prototypes": 300,
        "method.queue_start": 300,
        "method.freeze": 60,
        "method.views": ["simclr_cifar", "simclr_cifar"],
        "queue.size": 3840,
        "train.batch_norm": "sync",
        "train.lr": 0.1,
        "train.schedule": "cosine",
        "train.weight_decay": 1e-4,
    }
    dim: ClassVar[int] = 128

    def __init__(
        self,
        backbone: nn.Module,
        queue: Any,
        *,
        temperature: float | None = None,
        epsilon: float | None = None,
        prototypes: int | None = None,
        queue_start: int | None = None,
        freeze: int | None = None,
        views: Sequence[str] | None = None,
        gather: Callable[[Tensor], Tensor] = local,
    ) -> None:
        super().__init__()
        self.student = encoder(backbone, mlp([width(backbone), 2048, self.dim]))
        count, frozen = self.option("prototypes", prototypes), self.option("freeze", freeze)
        self.assign = Prototypes(self.dim, count, "step", frozen)
        self.queue, self.gather = queue, gather
        self.temperature: float = self.option("temperature", temperature)
        self.epsilon: float = self.option("epsilon", epsilon)
        self.queue_start: int = self.option("queue_start", queue_start)
        self.views = tuple(self.option("views", views))
        if len(self.views) < 2:
            raise UserError(f"SwAV takes two views or more, not {len(self.views)}: {list(self.views)}.")

    @classmethod
    def embedding_dim(cls, backbone_dim: int) -> int:
        return 2 * cls.dim

    def update_teacher(self, momentum: float) -> None:
        self.assign.begin_step()

    def forward(
        self, views: list[Tensor], index: Tensor, label: Tensor | None = None, diagnose: bool = False
    ) -> Output:
        z = [unit(x) for x in multi_crop(self.student, views)]  # V times b x D
        with full_precision(index):
            scores = [self.assign(x) for x in z]  # V times b x P
            codes = self.codes(z[:2], scores[:2])
            loss = self.loss(codes, scores)
        self.queue.enqueue(torch.cat(z[:2], dim=1), index, label)  # after the codes
        numbers = {"spread_student": spread(z[0].detach()), "code_mass": codes[0].amax(dim=1).mean()}
        return Output(loss, numbers if diagnose else {})

    @torch.no_grad()
    def codes(self, z: list[Tensor], scores: list[Tensor]) -> list[Tensor]:
        """Codes [b, P] of this rank's rows of both large views, balanced over the global batch and the queue."""
        older: Sequence[Tensor | None] = (None, None)
        if self.assign.steps > self.queue_start:
            older = self.queue.anchors().to(z[0].dtype).split(z[0].shape[1], dim=1)
        return [self.code(s, old) for s, old in zip(scores, older, strict=True)]

    def code(self, scores: Tensor, older: Tensor | None) -> Tensor:
        """Codes [b, P] for scores [b, P] of a view and older embeddings [K, D] of the same view."""
        every = self.gather(scores.detach())  # B x P
        if older is not None:
            every = torch.cat([every, self.assign(older)])
        return sinkhorn(scores.detach(), every, self.epsilon)

    def loss(self, codes: list[Tensor], scores: list[Tensor]) -> Tensor:
        log = [(s / self.temperature).log_softmax(dim=1) for s in scores]
        terms = [
            -(code * log[v]).sum(dim=1).mean()
            for c, code in enumerate(codes)
            for v in range(len(log))
            if v != c
        ]
        return torch.stack(terms).mean()

    def encoders(self) -> dict[str, nn.Module]:
        return {"student": self.student.get_submodule("backbone")}
