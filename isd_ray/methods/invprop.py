"""Neighbours of neighbours are positives too: similarity spreads along the graph of nearest neighbours.

Wang, Liu, Guo, Sun: Unsupervised Representation Learning by Invariance Propagation, NeurIPS 2020 (arXiv 2010.11694).
With z = n(g(f(view))), s_j = z.m_j over the bank, T the `negatives` images of largest s_j besides i, and P the
`positives` least similar of the images within 3 steps of 4-nearest-neighbour links from i:

    loss = -log e^{s_i/t} / (e^{s_i/t} + sum_{j in T} e^{s_j/t})
           - weight log sum_{p in P} e^{s_p/t} / sum_{j in T} e^{s_j/t}

then m_i <- n(bank_momentum m_i + (1 - bank_momentum) z), and the links of i are those of T.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isd_ray.errors import UserError
from isd_ray.methods.base import Method, Output, encoder, full_precision, spread, unit, width
from isd_ray.models.heads import mlp

LINKS, LAYERS = 4, 3


class InvProp(Method):
    """Invariance propagation: head d -> d -> 128, one view, a bank with four links a row, no teacher (`invprop`).

    weight_start: step from which the second term counts; an image that no link leads away from has none. The image's
    own row is always in the denominator of the first term; in the authors' code, if it is among the
    nearest. Links that lead back to the image itself are left out of P, where the authors' code may
    take it for one of the least similar.

    Published for ImageNet: temperature .2, 4096 negatives, 50 positives, weight .6 after 30 epochs, lr .03, wd 1e-4,
    batches of 128, 800 epochs; for CIFAR: 20 positives, wd 5e-4. The defaults are those of CIFAR and start earlier.
    """

    uses_queue: ClassVar[bool] = False
    uses_bank: ClassVar[bool] = True
    bank_ids: ClassVar[int] = LINKS
    defaults: ClassVar[dict[str, Any]] = {
        "method.temperature": 0.2,
        "method.negatives": 4096,
        "method.positives": 20,
        "method.weight": 0.6,
        "method.weight_start": 100,
        "method.bank_momentum": 0.5,
        "method.views": ["moco_v1"],
        "train.lr": 0.03,
        "train.schedule": "cosine",
        "train.weight_decay": 5e-4,
    }

    def __init__(
        self,
        backbone: nn.Module,
        bank: Any,
        *,
        temperature: float | None = None,
        negatives: int | None = None,
        positives: int | None = None,
        weight: float | None = None,
        weight_start: int | None = None,
        bank_momentum: float | None = None,
        views: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        dim = width(backbone)
        self.student = encoder(backbone, mlp([dim, dim, self.embedding_dim(dim)], norm="none"))
        self.bank = bank
        self.temperature: float = self.option("temperature", temperature)
        self.negatives: int = max(self.option("negatives", negatives), LINKS)
        self.positives: int = self.option("positives", positives)
        self.weight: float = self.option("weight", weight)
        self.weight_start: int = self.option("weight_start", weight_start)
        self.bank_momentum: float = self.option("bank_momentum", bank_momentum)
        self.views = tuple(self.option("views", views))
        if len(self.views) != 1:
            raise UserError(
                f"Invariance propagation takes one view, not {len(self.views)}: {list(self.views)}."
            )
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @classmethod
    def embedding_dim(cls, backbone_dim: int) -> int:
        return 128

    def update_teacher(self, momentum: float) -> None:
        self.steps += 1

    def forward(
        self, views: list[Tensor], index: Tensor, label: Tensor | None = None, diagnose: bool = False
    ) -> Output:
        z = unit(self.student(views[0]))
        with full_precision(z):
            similarity, nearest = self.bank.nearest(z, self.negatives + 1, exclude=index)
            floor = self.floor(similarity)
            others = self.bank.lse(z, self.temperature, exclude=index, floor=floor)
            own = (z * self.bank.read(index)).sum(dim=1) / self.temperature
            loss = (torch.logaddexp(own, others) - own).mean()
            reached = self.reach(index)  # collective: on every rank at every step
            if self.steps > self.weight_start:
                loss = loss + self.weight * self.spread_loss(z, reached, index, others)
        rows = nn.functional.normalize(self.bank.read(index).lerp(z.detach(), 1 - self.bank_momentum), dim=1)
        self.bank.write(index, rows, nearest[:, :LINKS])  # after the loss
        return Output(loss, {"spread_student": spread(z.detach())} if diagnose else {})

    def floor(self, similarity: Tensor) -> Tensor:
        """What lies below the `negatives` largest of similarities [b, negatives + 1], in descending order."""
        if similarity.shape[1] <= self.negatives:  # the whole bank
            return torch.full_like(similarity[:, 0], -torch.inf)
        return similarity[:, -2:].mean(dim=1)  # halfway, so that rounding cannot drop the last one

    def reach(self, index: Tensor) -> Tensor:
        """Images [b, 4 + 16 + 64] within three links of images [b], with repeats; -1 where there is no link."""
        layers = [index[:, None]]
        for _ in range(LAYERS):
            last = layers[-1].flatten()
            links = self.bank.read_ids(last.clamp_min(0)).masked_fill(last[:, None] < 0, -1)
            layers.append(links.unflatten(0, (len(index), -1)).flatten(1))
        return torch.cat(layers[1:], dim=1)

    def spread_loss(self, z: Tensor, reached: Tensor, index: Tensor, others: Tensor) -> Tensor:
        """The second term over reached images [b, R], without its factor."""
        rows = self.bank.read(reached.flatten().clamp_min(0)).unflatten(0, reached.shape)
        similarity = torch.einsum("bd,brd->br", z, rows.to(z)) / self.temperature
        out = (reached < 0) | (reached == index[:, None])
        order = similarity.detach().masked_fill(out, torch.inf)
        least = order.topk(min(self.positives, order.shape[1]), dim=1, largest=False).indices
        chosen = similarity.masked_fill(out, -torch.inf).gather(1, least)
        has = ~out.gather(1, least).all(dim=1)
        return (others[has] - chosen[has].logsumexp(dim=1)).sum() / len(z)

    def encoders(self) -> dict[str, nn.Module]:
        return {"student": self.student.get_submodule("backbone")}
