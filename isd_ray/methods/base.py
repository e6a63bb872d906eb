"""Methods differ in heads, views and loss; the loop, the evaluation and the checkpoints see none of that."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isd_ray.errors import UserError
from isd_ray.models.teacher import Teacher


class Output(NamedTuple):
    """What a method returns for one batch: the mean loss over its rows, and numbers to look at (scalars)."""

    loss: Tensor
    diagnostics: dict[str, Tensor]


class Method(nn.Module):
    """One method of self-supervised learning: a page that declares heads, views and loss, and nothing else.

    The loop calls `begin_epoch`, and, once an optimiser step, `update_teacher(momentum)` and then `forward`. That
    is the papers' order: theirs updates the teacher after the student's forward pass and before the teacher's,
    and nothing between the two calls here depends on it.

    views: the augmentation recipe of each entry of `forward`'s list, in its order.
    defaults: dotted config names -> values of the published recipe; what the user sets goes before them. A
        method has exactly those options `method.*`, and `queue.exclude_own`, that stand here.
    uses_queue: whether the constructor takes a queue of anchors, after the backbone; uses_bank: a bank with a row for
        every training image, of `bank_ids` integers beside the embedding.
    constant_lr: submodules whose learning rate stays at its peak while the schedule lowers the others.
    """

    views: tuple[str, ...]
    defaults: ClassVar[dict[str, Any]] = {}
    uses_queue: ClassVar[bool] = True
    uses_bank: ClassVar[bool] = False
    bank_ids: ClassVar[int] = 0
    constant_lr: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def embedding_dim(cls, backbone_dim: int) -> int:
        """Width of the embeddings in the queue or bank, where there is one; known before any of them exists."""
        raise NotImplementedError

    @classmethod
    def option(cls, name: str, value: Any) -> Any:
        """`value`, or the recipe's own where it is None."""
        return cls.defaults[f"method.{name}"] if value is None else value

    def update_teacher(self, momentum: float) -> None:
        """Move the teacher towards the student; a method without a teacher has nothing to do."""

    def begin_epoch(self, epoch: int) -> None:
        """Called before the first step of each epoch, by all ranks."""

    def forward(
        self, views: list[Tensor], index: Tensor, label: Tensor | None = None, diagnose: bool = False
    ) -> Output:
        """Loss of one batch.

        views: a float tensor [b, 3, S, S] for each name in `self.views`.
        index: int64 [b], row of the index table. label: int64 [b] (-1: none) or None, for diagnostics only.
        diagnose: compute the diagnostics.
        """
        raise NotImplementedError

    def encoders(self) -> dict[str, nn.Module]:
        """The backbones to evaluate, by name: the student, and the teacher where there is one."""
        raise NotImplementedError


class StudentTeacher(Method):
    """A student (backbone, projector), a predictor that it alone has, and a teacher: the student's EMA."""

    def __init__(self, backbone: nn.Module, projector: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.predictor = predictor
        self.student = encoder(backbone, projector)
        self.teacher = Teacher(self.student)

    def query(self, view: Tensor) -> Tensor:
        """Unit embeddings q [b, D] of the student."""
        return unit(self.predictor(self.student(view)))

    def key(self, view: Tensor) -> Tensor:
        """Unit embeddings k [b, D] of the teacher, without gradient."""
        return unit(self.teacher(view))

    def update_teacher(self, momentum: float) -> None:
        self.teacher.update(self.student, momentum)

    def encoders(self) -> dict[str, nn.Module]:
        networks = {"student": self.student, "teacher": self.teacher.network}
        return {name: network.get_submodule("backbone") for name, network in networks.items()}


def encoder(backbone: nn.Module, projector: nn.Module) -> nn.Sequential:
    """Images [b, 3, S, S] -> embeddings [b, D]."""
    return nn.Sequential(OrderedDict(backbone=backbone, projector=projector))


def by_size(network: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> list[Tensor]:
    """Output [b, D] for each view [b, 3, S, S]; neighbouring views of one size pass as one batch.

    They then share their batch statistics, as in the published codes of SwAV, DeepCluster-v2 and
    DINO.
    """
    outputs: list[Tensor] = []
    for _, group in groupby(views, key=lambda view: view.shape[1:]):
        alike = list(group)
        outputs += network(torch.cat(alike)).chunk(len(alike))
    return outputs


def multi_crop(encoder: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
    """Embeddings [b, D] of views: of one size through the backbone, all through the projector."""
    features = by_size(encoder.get_submodule("backbone"), views)
    return list(encoder.get_submodule("projector")(torch.cat(features)).chunk(len(views)))


def width(backbone: nn.Module) -> int:
    """Width of the features of a backbone."""
    return int(backbone.dim)  # type: ignore[arg-type]


def two_views(method: str, views: Sequence[str]) -> tuple[str, ...]:
    """`views` as a pair; raises UserError for another number."""
    if len(views) != 2:
        raise UserError(f"{method} takes two views (student, teacher), not {len(views)}: {list(views)}.")
    return tuple(views)


def unit(x: Tensor) -> Tensor:
    """Rows of x [b, D] at length 1, in at least float32."""
    return F.normalize(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, dim=1)


def full_precision(x: Tensor) -> torch.autocast:
    """Context without autocast on the device of x: cosines divided by .02 need more than 8 bits."""
    return torch.autocast(x.device.type, enabled=False)


def spread(x: Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation over rows of unit vectors x [b, D], times sqrt(D).

    1 means that the batch fills the sphere, 0 that all embeddings are equal (collapse).
    """
    return x.std(dim=0, unbiased=False).mean() * x.shape[1] ** 0.5


@torch.no_grad()
def spreads(q: Tensor, k: Tensor) -> dict[str, Tensor]:
    """`spread` of the student's and the teacher's embeddings, as diagnostics."""
    return {"spread_student": spread(q), "spread_teacher": spread(k)}
