"""What stands in a queue before the first step: nothing, or the published codes' random rows."""

import torch
import torch.nn.functional as F
from torch import Tensor

from isd_ray.errors import UserError, nearest

QUEUE_INITS = ("empty", "unit", "isd_v1")


def initial_keys(kind: str, size: int, dim: int, generator: torch.Generator | None = None) -> Tensor:
    """Anchors of a new queue, oldest first, [size, dim] float32; enqueue them with index -1 and label -1.

    kind: "empty" (no rows: a slot takes no part until it is filled), "unit" (random unit rows, as published
    for ISD-plus), "isd_v1" (as published for ISD: every column at length 1 over the queue, so that rows
    have a length of about sqrt(dim / size) and the teacher starts out nearly uniform).
    """
    if kind not in QUEUE_INITS:
        raise UserError(
            f"unknown queue initialisation '{kind}': choose one of {', '.join(QUEUE_INITS)}."
            f"{nearest(kind, QUEUE_INITS)}"
        )
    if kind == "empty":
        return torch.empty(0, dim)
    return F.normalize(torch.randn(size, dim, generator=generator), dim=1 if kind == "unit" else 0)
