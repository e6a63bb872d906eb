"""A target that does not chase the student: the exponential moving average (EMA) of its weights."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Teacher(nn.Module):
    """EMA copy of `student` (any module); it gets no gradient and keeps its own batch-norm statistics.

    Only parameters are averaged. Batch norm works as in MoCo and ISD: in train mode the teacher normalises
    with the statistics of its own batch and fills its own running buffers. `shuffle(network, images)` computes the
    embeddings where that shall not be this worker's own batch (train/batch_norm.py).
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(student).requires_grad_(False)
        self.shuffle: Callable[[nn.Module, Tensor], Tensor] | None = None

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.network(images) if self.shuffle is None else self.shuffle(self.network, images)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """`teacher <- momentum * teacher + (1 - momentum) * student`: 1 leaves it, 0 copies the student.

        Raises ValueError where the student's parameters are not those it was built from, by name.
        """
        own, other = dict(self.network.named_parameters()), dict(student.named_parameters())
        if own.keys() != other.keys():
            raise ValueError(f"student and teacher differ in parameters: {sorted(own.keys() ^ other.keys())}")
        torch._foreach_lerp_(list(own.values()), [other[name] for name in own], 1.0 - momentum)
