"""The positive is a neighbour: the anchor nearest to one view is what the other view must predict.

Dwibedi, Aytar, Tompson, Sermanet, Zisserman: With a Little Help from My Friends, ICCV 2021 (arXiv 2104.14548). With
z = n(g(f(view))), p = n(h(z)) and nn(z) the anchor in the queue that is most similar to z:

    loss = mean over i of -log exp(nn(z_1i).p_2i / t) / sum_j exp(nn(z_1i).p_2j / t),  and with the views swapped
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isd_ray.methods.base import Method, Output, encoder, full_precision, spread, two_views, unit, width
from isd_ray.methods.simclr import local
from isd_ray.models.heads import mlp
from isd_ray.queue.losses import queue_diagnostics


class NNCLR(Method):
    """NNCLR (`nnclr`): projector d -> 2048 -> 2048 -> 256 with batch norm also at its end,
    predictor 256 -> 4096 -> 256.

    gather: as in SimCLR; the negatives are the predictions for the global batch. exclude_own: the neighbour is another
    image's embedding. While the queue is empty, an embedding is its own neighbour. Embeddings of the first view enter
    the queue, after the search.

    Published for ImageNet: temperature .1, queue 98 304, LARS (lr .3 a 256 images, wd 1e-6, batches of 4096, 10 epochs
    of warm-up), own embeddings not excluded; CIFAR (solo-learn): temperature .2, queue 65 536, LARS lr .4, wd 1e-5. The
    defaults keep the temperature of CIFAR and replace LARS by plain SGD. The loss is the mean over
    both directions.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "method.temperature": 0.2,
        "method.views": ["byol_1", "byol_2"],
        "queue.size": 4096,
        "queue.exclude_own": True,
        "train.batch_norm": "sync",
        "train.lr": 0.1,
        "train.schedule": "cosine",
        "train.weight_decay": 1e-4,
    }

    def __init__(
        self,
        backbone: nn.Module,
        queue: Any,
        *,
        temperature: float | None = None,
        views: Sequence[str] | None = None,
        exclude_own: bool = True,
        gather: Callable[[Tensor], Tensor] = local,
    ) -> None:
        super().__init__()
        dim = self.embedding_dim(width(backbone))
        self.student = encoder(backbone, mlp([width(backbone), 2048, 2048, dim], last_norm="bn"))
        self.predictor = mlp([dim, 4096, dim])
        self.queue = queue
        self.temperature: float = self.option("temperature", temperature)
        self.views = two_views("NNCLR", self.option("views", views))
        self.exclude_own, self.gather = exclude_own, gather

    @classmethod
    def embedding_dim(cls, backbone_dim: int) -> int:
        return 256

    def forward(
        self, views: list[Tensor], index: Tensor, label: Tensor | None = None, diagnose: bool = False
    ) -> Output:
        embeddings = [self.student(view) for view in views]
        p = [unit(self.predictor(z)) for z in embeddings]
        z = [unit(z.detach()) for z in embeddings]
        with full_precision(index):
            found = [self.neighbour(one, index) for one in z]
            loss = (self.loss(found[0], p[1]) + self.loss(found[1], p[0])) / 2
            diagnostics = self.diagnose(z[0], index, label) if diagnose else {}
        self.queue.enqueue(z[0], index, label)  # after the search
        return Output(loss, diagnostics)

    @torch.no_grad()
    def neighbour(self, z: Tensor, index: Tensor) -> Tensor:
        """The anchor [b, D] nearest to each row of z; the row itself where there is no anchor."""
        similarity, key, _, _ = self.queue.topk(z, 1, exclude=index if self.exclude_own else None)
        return torch.where(similarity.isinf(), z, key[:, 0].to(z.dtype))

    def loss(self, neighbour: Tensor, p: Tensor) -> Tensor:
        """Cross-entropy of each neighbour [b, D] with the predictions of the global batch; p [b, D] are this rank's."""
        every = self.gather(p)  # B x D
        own = (neighbour * p).sum(dim=1)
        logits = neighbour @ every.T / self.temperature
        return (logits.logsumexp(dim=1) - own / self.temperature).mean()

    def diagnose(self, z: Tensor, index: Tensor, label: Tensor | None) -> dict[str, Tensor]:
        """How an embedding sees the queue at this temperature; spread of the student."""
        own = index if self.exclude_own else None
        numbers = queue_diagnostics(self.queue, z, self.temperature, index, label, exclude=own)
        return numbers | {"spread_student": spread(z)}

    def encoders(self) -> dict[str, nn.Module]:
        return {"student": self.student.get_submodule("backbone")}
