"""Clusters of the last epoch's embeddings are this epoch's classes.

Caron, Bojanowski, Joulin, Douze: Deep Clustering for Unsupervised Learning of Visual Features, ECCV 2018; its second
version in SwAV, NeurIPS 2020 (arXiv 2006.09882). With z = n(g(f(view))) and, for each of several clusterings h,
centroids C_h and the cluster c_h of the image, both by spherical k-means over a bank when the epoch begins:

    loss = mean over h and views of -log softmax(C_h z / t)_{c_h}
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isd_ray.errors import UserError
from isd_ray.methods.base import Method, Output, encoder, full_precision, multi_crop, spread, unit, width
from isd_ray.models.heads import mlp
from isd_ray.queue.clusters import spherical_kmeans

CLUSTERINGS, LARGE = 3, 2


class DeepClusterV2(Method):
    """DeepCluster-v2: projector d -> 2048 -> 128, a bank of two large views' embeddings, no teacher (`deepcluster_v2`).

    views: two large ones, whose embeddings are clustered (clustering h takes those of view h modulo 2), then any number
    of small ones. prototypes: clusters of each of the three clusterings. The centroids are not trained. The first epoch
    only fills the bank: its loss and its gradient are zero.

    Published for ImageNet: 3000 prototypes, LARS (lr 4.8 for batches of 4096, wd 1e-6), 2 x 224 and 6 x 96 px, and a
    pass before the first epoch that fills the bank. The CIFAR recipe of solo-learn: LARS lr .6, wd 1e-6, two views. The
    defaults take fewer prototypes, and plain SGD.
    """

    uses_queue: ClassVar[bool] = False
    uses_bank: ClassVar[bool] = True
    bank_ids: ClassVar[int] = CLUSTERINGS
    defaults: ClassVar[dict[str, Any]] = {
        "method.temperature": 0.1,
        "method.prototypes": 300,
        "method.views": ["simclr_cifar", "simclr_cifar"],
        "train.batch_norm": "sync",
        "train.lr": 0.1,
        "train.schedule": "cosine",
        "train.weight_decay": 1e-4,
    }
    dim: ClassVar[int] = 128

    def __init__(
        self,
        backbone: nn.Module,
        bank: Any,
        *,
        temperature: float | None = None,
        prototypes: int | None = None,
        views: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.student = encoder(backbone, mlp([width(backbone), 2048, self.dim]))
        self.bank = bank
        self.temperature: float = self.option("temperature", temperature)
        self.prototypes: int = self.option("prototypes", prototypes)
        self.views = tuple(self.option("views", views))
        if len(self.views) < LARGE:
            raise UserError(
                f"DeepCluster-v2 takes two views or more, not {len(self.views)}: {list(self.views)}."
            )
        self.centroids: Tensor
        self.register_buffer("centroids", torch.zeros(CLUSTERINGS, self.prototypes, bank.dim // LARGE))

    @classmethod
    def embedding_dim(cls, backbone_dim: int) -> int:
        return LARGE * cls.dim

    @torch.no_grad()
    def begin_epoch(self, epoch: int) -> None:
        """Cluster what the last epoch left in the bank."""
        if epoch == 0:
            return
        dim = self.centroids.shape[2]
        for h in range(CLUSTERINGS):
            view = h % LARGE
            centroids, ids = spherical_kmeans(self.bank, slice(view * dim, (view + 1) * dim), self.prototypes)
            self.centroids[h] = centroids
            self.bank.ids[:, h] = ids

    def forward(
        self, views: list[Tensor], index: Tensor, label: Tensor | None = None, diagnose: bool = False
    ) -> Output:
        z = [unit(x) for x in multi_crop(self.student, views)]
        target = self.bank.read_ids(index)  # b x clusterings
        with full_precision(index):
            loss = torch.stack([self.loss(x, target) for x in z]).mean()
        self.bank.write(index, torch.cat(z[:LARGE], dim=1), target)  # after the loss
        return Output(loss, {"spread_student": spread(z[0].detach())} if diagnose else {})

    def loss(self, z: Tensor, target: Tensor) -> Tensor:
        """Of one view's embeddings [b, D]; an image that has no cluster as yet counts as 0."""
        scores = torch.einsum("bd,hpd->bph", z, self.centroids.to(z)) / self.temperature
        terms = nn.functional.cross_entropy(scores, target, ignore_index=-1, reduction="none")
        return terms.mean()

    def encoders(self) -> dict[str, nn.Module]:
        return {"student": self.student.get_submodule("backbone")}
