"""An image and the puzzle of its own pieces get one embedding, told apart from those of all other images.

Misra, van der Maaten: Self-Supervised Learning of Pretext-Invariant Representations, CVPR 2020 (arXiv 1912.01991).
With v = n(g(f(view))), pieces p_1 ... p_9 of the other view, u = n(h([g'(f(p_1)), ..., g'(f(p_9))])) in random order,
m_i the bank's row of the image and L the loss of NPID:

    loss = weight L(u, m_i) + (1 - weight) L(v, m_i),   then m_i <- n(bank_momentum m_i + (1 - bank_momentum) v)
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isd_ray.methods.base import Method, Output, encoder, full_precision, spread, two_views, unit, width
from isd_ray.methods.npid import InstanceLoss
from isd_ray.methods.simclr import local
from isd_ray.models.heads import mlp

GRID = 3  # pieces along a side
SHARE = 0.75  # side of a piece over that of its cell: 64 of 85 pixels in the paper


class PIRL(Method):
    """PIRL: heads d -> 128 for image and pieces, 9 x 128 -> 128 for the puzzle, a bank, no teacher (`pirl`).

    views: (image, puzzle); the second is cut into a 3 x 3 grid, with a piece at a random place of each cell. Place
    and order follow from the image and the number of steps so far. negatives: as in NPID. gather: as in NPID.

    Published for ImageNet: 32 000 negatives, temperature .07, pieces of 64 pixels from 255, lr .03 a 256 images (.12
    for batches of 1024), wd 1e-4, 800 epochs. Nothing is published for small images; the defaults contrast with all.
    """

    uses_queue: ClassVar[bool] = False
    uses_bank: ClassVar[bool] = True
    defaults: ClassVar[dict[str, Any]] = {
        "method.temperature": 0.1,
        "method.negatives": 0,
        "method.bank_momentum": 0.5,
        "method.weight": 0.5,
        "method.views": ["pirl_image", "pirl_puzzle"],
        "train.lr": 0.03,
        "train.schedule": "cosine",
        "train.weight_decay": 1e-4,
    }

    def __init__(
        self,
        backbone: nn.Module,
        bank: Any,
        *,
        temperature: float | None = None,
        negatives: int | None = None,
        bank_momentum: float | None = None,
        weight: float | None = None,
        views: Sequence[str] | None = None,
        gather: Callable[[Tensor], Tensor] = local,
    ) -> None:
        super().__init__()
        dim = self.embedding_dim(width(backbone))
        self.student = encoder(backbone, mlp([width(backbone), dim]))
        self.piece = mlp([width(backbone), dim])
        self.puzzle = mlp([GRID * GRID * dim, dim])
        self.bank = bank
        self.criteria = nn.ModuleList(
            InstanceLoss(self.option("temperature", temperature), gather) for _ in range(2)
        )
        self.negatives: int = self.option("negatives", negatives)
        self.bank_momentum: float = self.option("bank_momentum", bank_momentum)
        self.weight: float = self.option("weight", weight)
        self.views = two_views("PIRL", self.option("views", views))
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
        v, u = unit(self.student(views[0])), self.solve(views[1], index)
        with full_precision(v):
            own = self.bank.read(index)
            noise = self.bank.shared(self.bank.draw(self.negatives)) if self.negatives else None
            of_puzzle, of_image = (
                loss(z, own, self.bank, noise) for loss, z in zip(self.criteria, (u, v), strict=True)
            )
            loss = self.weight * of_puzzle + (1 - self.weight) * of_image
        self.bank.mix(index, v, self.bank_momentum)  # after the loss
        numbers = {"spread_student": spread(v.detach()), "spread_puzzle": spread(u.detach())}
        return Output(loss, numbers if diagnose else {})

    def solve(self, view: Tensor, index: Tensor) -> Tensor:
        """Unit embeddings [b, 128] of the pieces of a view [b, 3, S, S] in random order."""
        chance = uniform(index, self.steps, 3 * GRID * GRID)
        pieces = cut(view, chance[:, GRID * GRID :])  # b x 9 x 3 x P x P
        features = self.piece(self.student.get_submodule("backbone")(pieces.flatten(0, 1)))
        features = features.unflatten(0, (len(view), -1))
        order = chance[:, : GRID * GRID].argsort(dim=1)
        shuffled = features.gather(1, order[..., None].expand_as(features))
        return unit(self.puzzle(shuffled.flatten(1)))

    def encoders(self) -> dict[str, nn.Module]:
        return {"student": self.student.get_submodule("backbone")}


def cut(view: Tensor, place: Tensor) -> Tensor:
    """Pieces [b, 9, 3, P, P] of a view [b, 3, S, S], one of each cell of the grid; place [b, 18] in 0 ... 1: where."""
    cell = view.shape[-1] // GRID
    side = max(round(SHARE * cell), 1)
    grid = torch.arange(GRID, device=view.device) * cell
    corners = torch.stack([grid.repeat_interleave(GRID), grid.repeat(GRID)])  # 2 x 9: rows, columns
    shift = (place.unflatten(1, (2, -1)) * (cell - side + 1)).long()
    span = torch.arange(side, device=view.device)
    rows, columns = ((corners + shift)[..., None] + span).unbind(dim=1)  # b x 9 x P
    image = torch.arange(len(view), device=view.device)[:, None, None, None]
    pieces = view.permute(0, 2, 3, 1)[image, rows[..., None], columns[:, :, None]]  # b x 9 x P x P x 3
    return pieces.permute(0, 1, 4, 2, 3)


def uniform(index: Tensor, steps: Tensor, n: int) -> Tensor:
    """Numbers [b, n] in 0 ... 1 that follow from the images and the step: the same on any rank, in any batch."""
    x = torch.arange(n, device=index.device) + n * (index[:, None] + 1)
    x = (x * 0x9E3779B1 + steps.to(index.device) * 0x85EBCA77) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x6C078965)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return (x ^ (x >> 16)).double() / 2**32
