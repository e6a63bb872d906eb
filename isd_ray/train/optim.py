"""Optimisers and schedules. A schedule is an array indexed by step, so resuming needs nothing but the step."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from timm.optim import Lars
from torch import Tensor, nn

from isd_ray.config import TrainConfig

REMEMBERED = {  # what an optimiser keeps of a parameter, and whether it is all of it or nothing
    "SGD": ({"momentum_buffer"}, False),
    "Lars": ({"momentum_buffer"}, False),
    "AdamW": ({"step", "exp_avg", "exp_avg_sq"}, True),
}


def learning_rates(train: TrainConfig, steps_per_epoch: int) -> np.ndarray:
    """Return the learning rate of every step, float64 [epochs * steps_per_epoch].

    Warm-up is linear from zero and counts into the run. Cosine and step schedules change once an epoch, as in
    the published ISD code: `lr / 2 * (1 + cos(pi * epoch / epochs))`, or `lr` times `gamma` for each milestone
    that has passed. Codes of other methods change the rate every step (docs/methods.md).
    """
    epoch = np.repeat(np.arange(train.epochs), steps_per_epoch).astype(np.float64)
    if train.schedule == "cosine":
        factor = 0.5 * (1 + np.cos(np.pi * epoch / train.epochs))
    elif train.schedule == "step":
        passed = sum((epoch >= round(m * train.epochs)).astype(int) for m in train.milestones)
        factor = train.gamma ** np.asarray(passed, dtype=np.float64) * np.ones_like(epoch)
    else:
        factor = np.ones_like(epoch)
    warmup = train.warmup_epochs * steps_per_epoch
    ramp = np.minimum(1.0, (np.arange(len(epoch)) + 1) / max(warmup, 1))
    return train.lr * factor * ramp


def teacher_momenta(momentum: float | None, schedule: str | None, steps: int) -> np.ndarray:
    """Return the teacher's EMA momentum of every step, float64 [steps]; ones where there is no teacher (None).

    Cosine (BYOL, Grill et al. 2020): `1 - (1 - m0) * (cos(pi * step / steps) + 1) / 2`, from m0 to 1.
    """
    if momentum is None:
        return np.ones(steps)
    if schedule == "constant":
        return np.full(steps, momentum)
    return 1 - (1 - momentum) * (np.cos(np.pi * np.arange(steps) / steps) + 1) / 2


def build_optimizer(
    module: nn.Module, train: TrainConfig, constant: Sequence[str] = ()
) -> torch.optim.Optimizer:
    """Build the optimiser over the trainable parameters; `set_rate` sets the learning rate of each step.

    constant: submodules that keep the peak learning rate throughout (SimSiam's predictor).

    LARS (You et al. 2017, timm's) scales the step of each tensor by trust |w| / (|g| + weight_decay
    |w|), also where the weight decay is 0; but norm parameters and biases that are not decayed
    (`decay_norm_and_bias` off) it leaves to plain SGD, as every published LARS does.
    """
    fixed = tuple(f"{name}." for name in constant)
    groups = []
    for stays in (False, True):
        part = [(name, p) for name, p in module.named_parameters() if name.startswith(fixed) == stays]
        groups += [group | {"constant": stays} for group in _parameter_groups(part, train) if group["params"]]
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.lr)
    if train.optimizer == "lars":
        return Lars(
            groups,
            lr=train.lr,
            momentum=train.sgd_momentum,
            trust_coeff=train.trust,
            trust_clip=train.trust_clip,
        )
    return torch.optim.SGD(groups, lr=train.lr, momentum=train.sgd_momentum)


def set_rate(optimizer: torch.optim.Optimizer, rate: float, peak: float) -> None:
    """Set the learning rate of the step: `peak` for the parameters whose rate is constant."""
    for group in optimizer.param_groups:
        group["lr"] = peak if group.get("constant") else rate


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Take what an optimiser remembered of each parameter; its settings stay those of this run.

    Raises ValueError, TypeError or LookupError where that is of other parameters, or of another optimiser.
    """
    own, parts = optimizer.state_dict(), saved["state"]
    if [group["params"] for group in saved["param_groups"]] != [g["params"] for g in own["param_groups"]]:
        raise ValueError("its optimiser has other parameters")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names, whole = REMEMBERED[type(optimizer).__name__]
    for number, kept in parts.items():
        if not set(kept) <= names or (whole and set(kept) != names):
            raise ValueError("its optimiser remembers something else")
        shapes = (parameters[number].shape, torch.Size())
        if not all(x is None or _is_plain(x, shapes) for x in kept.values()):
            raise ValueError("what its optimiser remembers has other shapes")
    optimizer.load_state_dict({"state": parts, "param_groups": own["param_groups"]})


def _is_plain(x: Any, shapes: Sequence[torch.Size]) -> bool:
    """Tell whether this is a dense tensor of real numbers, of one of these shapes."""
    real = isinstance(x, Tensor) and x.is_floating_point() and x.layout == torch.strided
    return real and not x.is_meta and x.shape in shapes


def _parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], train: TrainConfig) -> list[dict]:
    """Split off norm parameters and biases if they are not decayed; LARS then does not adapt them either."""
    trainable = [p for _, p in parameters if p.requires_grad]
    adapted = {"always_adapt": True} if train.optimizer == "lars" else {}
    if train.decay_norm_and_bias:
        return [{"params": trainable, "weight_decay": train.weight_decay, **adapted}]
    matrices = [p for p in trainable if p.ndim > 1]
    vectors = [p for p in trainable if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": train.weight_decay, **adapted},
        {"params": vectors, "weight_decay": 0.0},
    ]
