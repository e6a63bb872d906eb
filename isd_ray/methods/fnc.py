"""Some negatives show what the image shows: find them by further views of it, then drop them or pull them in.

Huynh, Kornblith, Walter, Maire, Khademi: Boosting Contrastive Self-Supervised Learning with False Negative
Cancellation, WACV 2022 (arXiv 2011.11765). Over SimCLR: the score of image i and a candidate c, a view of another image
of the global batch, is the largest cosine of c with any view of i, two that contrast and S support views. F_i are the
candidates among the `neighbours` best whose score lies above `threshold`. For each of the two views z_i of an image

    eliminate: loss = -log exp(z_i.z_i+ / t) / sum_{j != i, j not in F_i} exp(z_i.z_j / t)
    attract:   loss = mean over p in {z_i+} and F_i of -log exp(z_i.p / t) / sum_{j != i} exp(z_i.z_j / t)

Where F_i is empty both are SimCLR's loss.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isd_ray.errors import UserError
from isd_ray.methods.base import Method, Output, encoder, full_precision, spread, unit, width
from isd_ray.methods.simclr import local
from isd_ray.models.heads import mlp

MODES = ("eliminate", "attract")


class FNC(Method):
    """False negative cancellation: projector d -> d -> d -> 128 with batch norm after each layer; no teacher (`fnc`).

    false_negatives: what becomes of them, "eliminate" or "attract". views: two that contrast, then any number of
    support views, which serve the search alone and have no gradient. neighbours, threshold: the most false negatives
    an image may have, and the cosine above which they lie; one above 1 leaves SimCLR's loss. gather: as in SimCLR.

    Published for ImageNet: attract, 8 support views, 10 neighbours, threshold .7, LARS (lr .1 sqrt(batch), wd 1e-4,
    batches of 4096), RandAugment. The released code also contrasts the support views, as anchors, positives and
    candidates, and can score by an EMA encoder with a memory of 16 batches; neither is here. It
    sums the losses of both views, this is their mean. The defaults keep temperature, neighbours and
    threshold, and take 2 support views, SimCLR's views for CIFAR and its plain SGD.
    """

    uses_queue: ClassVar[bool] = False
    defaults: ClassVar[dict[str, Any]] = {
        "method.temperature": 0.1,
        "method.false_negatives": "attract",
        "method.neighbours": 10,
        "method.threshold": 0.7,
        "method.views": ["simclr_cifar"] * 4,
        "train.batch_norm": "sync",
        "train.lr": 0.25,
        "train.schedule": "cosine",
        "train.weight_decay": 1e-4,
    }

    def __init__(
        self,
        backbone: nn.Module,
        *,
        temperature: float | None = None,
        false_negatives: str | None = None,
        neighbours: int | None = None,
        threshold: float | None = None,
        views: Sequence[str] | None = None,
        gather: Callable[[Tensor], Tensor] = local,
    ) -> None:
        super().__init__()
        dim = width(backbone)
        projector = mlp([dim, dim, dim, 128], bias=False, last_bias=False, last_norm="bn")
        projector[-1].bias.requires_grad_(False)  # scaled, not shifted
        self.student = encoder(backbone, projector)
        self.temperature: float = self.option("temperature", temperature)
        self.false_negatives: str = self.option("false_negatives", false_negatives)
        self.neighbours: int = self.option("neighbours", neighbours)
        self.threshold: float = self.option("threshold", threshold)
        self.views = tuple(self.option("views", views))
        self.gather = gather
        if len(self.views) < 2:
            raise UserError(f"FNC takes two views or more, not {len(self.views)}: {list(self.views)}.")
        if self.false_negatives not in MODES:
            raise UserError(f"method.false_negatives: {' or '.join(MODES)}, not '{self.false_negatives}'.")

    def forward(
        self, views: list[Tensor], index: Tensor, label: Tensor | None = None, diagnose: bool = False
    ) -> Output:
        z = unit(self.student(torch.cat(views[:2])))  # 2b x D
        support = self.support(views[2:])  # S times b x D
        image = index.repeat(2)
        with full_precision(z):
            every, owner = self.gather(z), self.gather(image)  # 2B x D, 2B
            false = self.find([*z.detach().chunk(2), *support], every.detach(), index[:, None] == owner)
            loss = self.loss(z, every, image[:, None] == owner, false.repeat(2, 1))
        return Output(loss, self.diagnose(z, false, label) if diagnose else {})

    @torch.no_grad()
    def support(self, views: list[Tensor]) -> list[Tensor]:
        """Unit embeddings [b, D] of the support views, in one pass; their batch statistics are their own."""
        # After the pass that learns: autocast would keep the weights that it casts without a gradient for both.
        return list(unit(self.student(torch.cat(views))).chunk(len(views))) if views else []

    @torch.no_grad()
    def find(self, seen: list[Tensor], every: Tensor, own: Tensor) -> Tensor:
        """Which candidates `every` [2B, D] are false negatives of this rank's images, bool [b, 2B].

        seen: all views of the images, each [b, D]; own [b, 2B]: which candidates show the image itself.
        """
        score = seen[0] @ every.T
        for view in seen[1:]:
            score = torch.maximum(score, view @ every.T)
        best, place = score.masked_fill(own, -torch.inf).topk(min(self.neighbours, len(every)), dim=1)
        return torch.zeros_like(own).scatter(1, place, best > self.threshold)

    def loss(self, z: Tensor, every: Tensor, same: Tensor, false: Tensor) -> Tensor:
        """Of z [2b, D], whose row i and i +- b are the positive pairs, among `every` [2B, D].

        same, false [2b, 2B]: which of these show the row's own image, and which are its false negatives.
        """
        positive = (z * z.roll(len(z) // 2, dims=0)).sum(dim=1) / self.temperature
        logits = z @ every.T / self.temperature
        out, target = same, positive
        if self.false_negatives == "eliminate":
            out = same | false
        else:
            target = (positive + logits.masked_fill(~false, 0).sum(dim=1)) / (1 + false.sum(dim=1))
        rivals = torch.cat([positive[:, None], logits.masked_fill(out, -torch.inf)], dim=1)
        return (rivals.logsumexp(dim=1) - target).mean()

    @torch.no_grad()
    def diagnose(self, z: Tensor, false: Tensor, label: Tensor | None) -> dict[str, Tensor]:
        """Spread; false negatives found an image, and the share of them that carry the image's label."""
        numbers = {"spread_student": spread(z), "cancelled": false.sum(dim=1).float().mean()}
        if label is not None:
            alike = (label[:, None] == self.gather(label.repeat(2))) & (label[:, None] >= 0)
            numbers["cancelled_purity"] = (false & alike).sum() / false.sum().clamp_min(1)
        return numbers

    def encoders(self) -> dict[str, nn.Module]:
        return {"student": self.student.get_submodule("backbone")}
