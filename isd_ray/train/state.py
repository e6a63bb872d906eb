"""What changes while training, and what a checkpoint therefore holds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np
import torch
from torch import nn

from isd_ray.config import Config
from isd_ray.methods import Method, build_method, find_method, initial_keys, options_of
from isd_ray.models.backbones import build_backbone
from isd_ray.queue import DistributedQueue
from isd_ray.queue.exchange import all_gather
from isd_ray.train.optim import build_optimizer


@dataclass
class Worker:
    """This process among the workers, the device that it computes on, and where its lines for the user go.

    tell: passes numbers measured on the way to whoever started the run, who answers whether to stop here; None where
    nobody listens.
    """

    rank: int
    world: int
    device: torch.device
    out: TextIO
    tell: Callable[[dict[str, Any]], bool] | None = None


@dataclass
class State:
    """Everything that changes while training; `queue` is None for a method without one.

    `step` counts finished optimiser steps.
    """

    method: Method
    queue: DistributedQueue | None
    optimizer: torch.optim.Optimizer
    step: int = 0

    def save(self) -> dict[str, Any]:
        """Return tensors and plain values. All ranks call it together: a sharded queue is gathered."""
        return {
            "step": self.step,
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "queue": None if self.queue is None else self.queue.state_dict(),
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Continue from `saved`, whatever number of workers saved it."""
        self.method.load_state_dict(saved["method"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.queue is not None:
            self.queue.load_state_dict(saved["queue"])
        self.step = saved["step"]


def build_state(config: Config, device: torch.device) -> State:
    """Build the method, its queue and its optimiser from the seed: the same on every rank."""
    torch.manual_seed(config.train.seed)
    model, size = config.model, config.data.image_size
    backbone = build_backbone(model.backbone, stem=model.stem, image_size=size)
    name, queue = config.method.name, None
    if find_method(name).uses_queue:
        dim = find_method(name).embedding_dim(int(backbone.dim))  # type: ignore[arg-type]
        queue = build_queue(config, dim, device)
    method = build_method(name, backbone, queue, **method_options(config))
    if config.train.sync_batch_norm:
        method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
    method.to(device)
    method.to(memory_format=torch.channels_last)
    return State(method, queue, build_optimizer(method, config.train, constant=method.constant_lr))


def method_options(config: Config) -> dict[str, Any]:
    """Return the arguments that the method's constructor takes, and no others."""
    values = config.method.model_dump() | {"exclude_own": config.queue.exclude_own, "gather": all_gather}
    return {option: values[option] for option in options_of(config.method.name)}


def build_queue(config: Config, dim: int, device: torch.device) -> DistributedQueue:
    """Build the queue and, where asked, fill it with random anchors that belong to no image."""
    dtype = getattr(torch, config.queue.dtype)
    queue = DistributedQueue(config.queue.size, dim, layout=config.queue.layout, dtype=dtype, device=device)
    if config.queue.init != "empty":
        generator = torch.Generator().manual_seed(config.train.seed)
        keys = initial_keys(config.queue.init, config.queue.size, dim, generator)
        none, count = torch.full((len(keys),), -1), torch.tensor(len(keys))
        state = {"keys": keys, "index": none, "label": none, "seen": count, "steps": torch.tensor(0)}
        queue.load_state_dict(state)  # every rank knows all of them: no rank enqueues another's
    return queue


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the torch seed of one step on one rank, for layers that draw (dropout): no generator state to save."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)
