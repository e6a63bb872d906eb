"""Whether a configuration can be learned, known before images are read or anything is written.

Networks are built without weights (on PyTorch's meta device): that takes a tenth of a second and no
memory, so a sweep or a study looks at every setting of its own.
"""

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from isd_ray.config import Config
from isd_ray.data.views import get_views
from isd_ray.errors import UserError, harmless, listed
from isd_ray.methods import build_method, find_method
from isd_ray.models.backbones import build_backbone
from isd_ray.models.frozen import Frozen
from isd_ray.queue import DistributedQueue
from isd_ray.queue.bank import Bank
from isd_ray.train.batch_norm import spread_batch_norm
from isd_ray.train.loggers import install_hint
from isd_ray.train.state import method_options
from isd_ray.train.teacher import asked_teacher

CPU = torch.device("cpu")
MOST_STEPS = 10**8  # the schedule of a run is an array: some GB at this length


def check_learnable(config: Config) -> None:
    """Refuse what only training would find; raises UserError that lists every fault.

    Names of views and backbones, a stem or an image size that the backbone does not take, views or
    batch norm that the method cannot have, a frozen teacher that is not given (its weights are not
    read), and trackers that are not installed.
    """
    faults = []
    for check in (_check_backbone, _check_method, _check_loggers):
        try:
            check(config)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError(listed(faults))


def check_steps(config: Config, images: int) -> None:
    """Refuse a run of more steps than its schedule can be kept for; raises UserError."""
    steps = config.train.epochs * (images // config.train.batch_size)
    if steps > MOST_STEPS:
        raise UserError(
            f"--train.epochs {config.train.epochs}: {steps:,} steps in all, at most {MOST_STEPS:,} "
            "are taken; choose fewer epochs or a larger --train.batch_size"
        )


def _check_backbone(config: Config) -> None:
    """Look at an image of every size that the views have: multi-crop has several."""
    model, size = config.model, config.data.image_size
    sides = {size, *(view.pixels(size) for view in get_views(config.method.views))}
    try:
        _look(model.backbone, model.stem, size, tuple(sorted(sides)))
    except UserError as error:
        raise UserError(f"--model.backbone {model.backbone}, stem {model.stem}: {error}") from None


@lru_cache(maxsize=256)
def _look(name: str, stem: str, size: int, sides: tuple[int, ...]) -> None:
    """Build a backbone for images of `size` and look at images of `sides` pixels."""
    try:
        with torch.device("meta"):
            _try_out(name, stem, size, sides)
    except Exception:  # some networks need numbers where they are built
        _try_out(name, stem, size, sides)


@torch.no_grad()
def _try_out(name: str, stem: str, size: int, sides: tuple[int, ...]) -> None:
    network = build_backbone(name, stem=stem, image_size=size).eval()
    for side in sides:
        try:
            network(torch.zeros(1, 3, side, side))
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = harmless(str(error), 200)
            raise UserError(
                f"of images of {size} pixels --method.views makes some of {side}, which it does "
                f"not take ({reason}); choose other views, or another backbone"
            ) from None


class _StandIn(nn.Module):
    """Has a backbone's attributes and no weights: methods are built in no time."""

    dim, arch, stem_kind = 8, "none", "none"

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


def _check_method(config: Config) -> None:
    """Build the method on a stand-in, with a memory of a few rows where it has any."""
    kind: Any = find_method(config.method.name)
    teacher = None if asked_teacher(config.method) is None else Frozen(_StandIn())
    widths = [_StandIn.dim] * (1 if teacher is None else 2)
    memory: DistributedQueue | Bank | None = None
    if kind.uses_queue:
        memory = DistributedQueue(4, kind.embedding_dim(*widths))
    if kind.uses_bank:
        memory = Bank(4, kind.embedding_dim(*widths), kind.bank_ids)
    with torch.device("meta"):
        options = method_options(config, teacher)
        method = build_method(config.method.name, _StandIn(), memory, **options)
    spread_batch_norm(method, config.train.batch_norm, CPU)


def _check_loggers(config: Config) -> None:
    for name in config.train.loggers:
        if find_spec(name) is None:
            raise UserError(install_hint(name))
