"""Learned directions that stand for clusters: scores against them, and codes that use all of them alike."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Prototypes(nn.Module):
    """`count` prototypes of width `dim`; embeddings [b, dim] -> scores [b, count], cosines for unit embeddings.

    norm: "weight" divides each prototype by its length in the forward pass (weight norm of gain 1, as DINO does);
    "step" sets the stored prototypes to length 1 before each step, by `begin_step` (as SwAV does). The two have the
    same scores and differ in the gradient.
    """

    def __init__(self, dim: int, count: int, norm: str, frozen: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(count, dim), dim=1))
        self.norm, self.frozen = norm, frozen
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def begin_step(self) -> None:
        """Call it once an optimiser step, before the forward pass."""
        self.steps += 1
        if self.norm == "step":
            self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        weight = F.normalize(self.weight, dim=1) if self.norm == "weight" else self.weight
        if self.steps <= self.frozen:  # a gradient of zero, since other ranks wait for one
            weight = weight.detach() + (weight - weight.detach()) * 0
        return F.linear(x, weight.to(x.dtype))


@torch.no_grad()
def sinkhorn(
    scores: Tensor, every: Tensor | None = None, epsilon: float = 0.05, iterations: int = 3
) -> Tensor:
    """Codes [b, P] of scores [b, P]: rows sum to 1, and all columns have about the same mass (SwAV, eq. 3 to 5).

    every [B, P]: the scores over which the mass is balanced, these among them (None: these alone). Sinkhorn-Knopp on
    exp(scores / epsilon), in logarithms so that nothing overflows. Rows are normalised last, so that the code of a row
    follows from its scores and the columns' potentials: a rank needs no other rank's rows of the result.
    """
    own = (scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores) / epsilon
    log = own if every is None else every.to(own.dtype) / epsilon
    rows = torch.zeros_like(log[:, :1])
    for _ in range(iterations):
        columns = (log - rows).logsumexp(dim=0)
        rows = (log - columns).logsumexp(dim=1, keepdim=True)
    return (own - columns).softmax(dim=1)
