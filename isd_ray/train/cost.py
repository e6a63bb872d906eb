"""What a method costs an image: how often networks look at it, so that a study can equalise epochs or compute."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from isd_ray.config import Config
from isd_ray.data.views import get_views
from isd_ray.methods import Method
from isd_ray.models.frozen import Frozen
from isd_ray.models.teacher import Teacher
from isd_ray.train.state import build_state

IMAGES = 4


def cost(config: Config) -> dict[str, float]:
    """Count one step of the run's method on a few made-up images; returns numbers an image.

    student_forward, teacher_forward: looks of the student's and of all teachers' backbones, a smaller view by its share
    of pixels; backward: looks of the student that the gradient comes back from; gflop: 10^9 multiplications and
    additions of forward and backward pass with heads and loss, without the look-up in a queue (it is empty here).
    """
    with torch.random.fork_rng():
        method = build_state(config, torch.device("cpu"), images=IMAGES).method.train()
        sides = [view.pixels(config.data.image_size) for view in get_views(config.method.views)]
        views = [torch.randn(IMAGES, 3, side, side) for side in sides]
        return count(method, views, config.data.image_size)


def count(method: Method, views: list[Tensor], size: int) -> dict[str, float]:
    """`cost` of a method for given views [b, 3, s, s], in looks of `size` x `size` pixels."""
    passes = {"student_forward": 0.0, "teacher_forward": 0.0, "backward": 0.0}
    rows = len(views[0])

    def looked(network: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            share = inputs[0].shape[0] * inputs[0].shape[2:].numel() / (rows * size**2)
            passes[f"{network}_forward"] += share
            passes["backward"] += share if out.requires_grad else 0

        return hook

    handles = [method.encoders()["student"].register_forward_hook(looked("student"))]
    handles += [teacher.register_forward_hook(looked("teacher")) for teacher in teachers(method)]
    with FlopCounterMode(display=False) as flops:
        method(views, torch.arange(rows)).loss.backward()
    for handle in handles:
        handle.remove()
    return {name: round(value, 3) for name, value in passes.items()} | {
        "gflop": round(flops.get_total_flops() / rows / 1e9, 4)
    }


def teachers(method: Method) -> list[nn.Module]:
    """Backbones of the networks that follow the student or are frozen."""
    found = []
    for module in method.modules():
        if isinstance(module, Teacher):
            found.append(module.network.get_submodule("backbone"))
        elif isinstance(module, Frozen):
            found.append(module.network)
    return found
