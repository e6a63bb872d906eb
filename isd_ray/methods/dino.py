"""Self-distillation without labels: the student matches the teacher's centred, sharpened distribution over prototypes.

Caron, Touvron, Misra, Jegou, Mairal, Bojanowski, Joulin: Emerging Properties in Self-Supervised Vision Transformers,
ICCV 2021 (arXiv 2104.14294). With scores o = C n(g(f(view))) over weight-normed prototypes C, and the centre c, a
moving average of the teacher's scores over the global batch:

    loss = mean over the teacher's views i and the student's other views v of
           -sum_j softmax((o_teacher_i - c) / temperature_teacher)_j log softmax(o_v / temperature)_j
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isd_ray.errors import UserError
from isd_ray.methods.base import Method, Output, by_size, encoder, full_precision, spreads, unit, width
from isd_ray.methods.simclr import local
from isd_ray.models.prototypes import Prototypes
from isd_ray.models.teacher import Teacher

HIDDEN, BOTTLENECK = 2048, 256


class Unit(nn.Module):
    """Rows at length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return unit(x)


class DINO(Method):
    """DINO: head d -> 2048 -> 2048 -> 256 with GELU, unit length, prototypes; EMA teacher of rising momentum (`dino`).

    views: two large ones that student and teacher see, then any number of small ones for the student (multi-crop).
    prototypes: how many. freeze: first steps without a change of the student's prototypes. centre: momentum of the
    centre. gather: as in SimCLR; the centre is that of the global batch.

    Published for ImageNet: 65 536 prototypes, temperature_teacher from .04 to .07 over 30 epochs, momentum .996 to 1,
    prototypes frozen for an epoch, AdamW (lr 5e-4 a 256 images, weight decay from .04 to .4). The CIFAR recipe of
    solo-learn: 4096 prototypes, momentum .9995, LARS lr .3. The defaults take fewer prototypes, a constant temperature,
    a momentum for short runs, and plain SGD; further views of theirs are `dino_small`.
    """

    uses_queue: ClassVar[bool] = False
    defaults: ClassVar[dict[str, Any]] = {
        "method.temperature": 0.1,
        "method.temperature_teacher": 0.04,
        "method.prototypes": 1024,
        "method.freeze": 60,
        "method.centre": 0.9,
        "method.momentum": 0.99,
        "method.momentum_schedule": "cosine",
        "method.views": ["dino_1", "dino_2"],
        "train.batch_norm": "sync",
        "train.lr": 0.1,
        "train.schedule": "cosine",
        "train.weight_decay": 1e-4,
    }

    def __init__(
        self,
        backbone: nn.Module,
        *,
        temperature: float | None = None,
        temperature_teacher: float | None = None,
        prototypes: int | None = None,
        freeze: int | None = None,
        centre: float | None = None,
        views: Sequence[str] | None = None,
        gather: Callable[[Tensor], Tensor] = local,
    ) -> None:
        super().__init__()
        count, frozen = self.option("prototypes", prototypes), self.option("freeze", freeze)
        self.student = encoder(backbone, self.head(width(backbone), count, frozen))
        self.teacher = Teacher(self.student)
        self.temperature: float = self.option("temperature", temperature)
        self.temperature_teacher: float = self.option("temperature_teacher", temperature_teacher)
        self.centre: float = self.option("centre", centre)
        self.views = tuple(self.option("views", views))
        if len(self.views) < 2:
            raise UserError(f"DINO takes two views or more, not {len(self.views)}: {list(self.views)}.")
        self.gather = gather
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(count))

    @staticmethod
    def head(dim: int, count: int, frozen: int) -> nn.Module:
        """Features [b, dim] -> scores [b, count] against prototypes.

        Weights start normal of deviation .02, cut at 2, and biases at 0, as in the authors' code.
        """
        layers = [nn.Linear(dim, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU()]
        layers += [nn.Linear(HIDDEN, BOTTLENECK), Unit()]
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        return nn.Sequential(*layers, Prototypes(BOTTLENECK, count, "weight", frozen))

    def update_teacher(self, momentum: float) -> None:
        for module in self.student.modules():
            if isinstance(module, Prototypes):
                module.begin_step()
        self.teacher.update(self.student, momentum)

    def forward(
        self, views: list[Tensor], index: Tensor, label: Tensor | None = None, diagnose: bool = False
    ) -> Output:
        scores = by_size(self.student, views)  # V times b x P
        targets = by_size(self.teacher, views[:2])  # b x P, no gradient
        with full_precision(index):
            loss = self.loss(scores, targets)
            self.move_centre(targets)  # after the loss
            numbers = {} if not diagnose else spreads(unit(scores[0].detach()), unit(targets[0]))
        return Output(loss, numbers)

    def loss(self, scores: list[Tensor], targets: list[Tensor]) -> Tensor:
        """Of the student's scores of all views and the teacher's of the large ones, each [b, P]."""
        log = [(wide(s) / self.temperature).log_softmax(dim=1) for s in scores]
        sharp = [((wide(t) - self.mean) / self.temperature_teacher).softmax(dim=1) for t in targets]
        terms = [
            -(p * log[v]).sum(dim=1).mean() for i, p in enumerate(sharp) for v in range(len(log)) if v != i
        ]
        return torch.stack(terms).mean()

    @torch.no_grad()
    def move_centre(self, targets: list[Tensor]) -> None:
        """Towards the teacher's mean scores over the global batch."""
        now = torch.stack([self.gather(t).mean(dim=0) for t in targets]).mean(dim=0)
        self.mean.lerp_(now.to(self.mean.dtype), 1 - self.centre)

    def encoders(self) -> dict[str, nn.Module]:
        networks = {"student": self.student, "teacher": self.teacher.network}
        return {name: network.get_submodule("backbone") for name, network in networks.items()}


def wide(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
