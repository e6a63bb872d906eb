"""Neither negatives nor a teacher: a predictor and a stopped gradient keep two views from collapsing.

Chen, He: Exploring Simple Siamese Representation Learning, CVPR 2021 (arXiv 2011.10566):

    z_i = g(f(view_i)),  p_i = h(z_i)
    loss = -(cos(p_1, stop(z_2)) + cos(p_2, stop(z_1))) / 2
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from isd_ray.methods.base import Method, Output, encoder, full_precision, spread, two_views, unit, width
from isd_ray.models.heads import mlp


class SimSiam(Method):
    """SimSiam: projector d -> d -> d -> 2048 (last norm not affine), predictor 2048 -> 512 -> 2048 (`simsiam`).

    The predictor keeps its learning rate while that of the rest falls, as in the paper. ImageNet recipe: SGD,
    lr .05 a 256 images, wd 1e-4, cosine, batches of 512. For CIFAR the paper has lr .03 a 256 images and wd
    5e-4, which are the defaults, and a projector of two layers. The last batch norm of each block
    of the backbone starts at 1, in the authors' code at 0. Collapse shows in the diagnostics:
    spread_student near 1 is sound, 0 is collapsed.
    """

    uses_queue: ClassVar[bool] = False
    constant_lr: ClassVar[tuple[str, ...]] = ("predictor",)
    defaults: ClassVar[dict[str, Any]] = {
        "method.views": ["strong", "strong"],
        "train.batch_norm": "sync",
        "train.lr": 0.03,
        "train.schedule": "cosine",
        "train.weight_decay": 5e-4,
    }

    def __init__(self, backbone: nn.Module, *, views: Sequence[str] | None = None) -> None:
        super().__init__()
        dim = width(backbone)
        projector = mlp([dim, dim, dim, 2048], bias=False, last_bias=False, last_norm="bn_no_affine")
        self.student = encoder(backbone, projector)
        self.predictor = mlp([2048, 512, 2048], bias=False)
        self.views = two_views("SimSiam", self.option("views", views))

    def forward(
        self, views: list[Tensor], index: Tensor, label: Tensor | None = None, diagnose: bool = False
    ) -> Output:
        z_1, z_2 = (self.student(view) for view in views)
        p_1, p_2 = self.predictor(z_1), self.predictor(z_2)
        with full_precision(z_1):
            loss = -(cosine(p_1, z_2.detach()) + cosine(p_2, z_1.detach())) / 2
            return Output(loss, {"spread_student": spread(unit(z_1.detach()))} if diagnose else {})

    def encoders(self) -> dict[str, nn.Module]:
        return {"student": self.student.get_submodule("backbone")}


def cosine(p: Tensor, z: Tensor) -> Tensor:
    """Mean cosine of the rows of p and z [b, D]."""
    return (unit(p) * unit(z)).sum(dim=1).mean()
