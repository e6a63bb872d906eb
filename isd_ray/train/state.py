"""What changes while training, and what a checkpoint therefore holds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np
import torch

from isd_ray.config import Config
from isd_ray.ending import of_memory
from isd_ray.errors import UserError, printable
from isd_ray.methods import Method, build_method, find_method, options_of
from isd_ray.models.backbones import build_backbone
from isd_ray.models.frozen import Frozen
from isd_ray.queue import DistributedQueue
from isd_ray.queue.bank import Bank
from isd_ray.queue.exchange import all_gather
from isd_ray.queue.initial import initial_keys
from isd_ray.train.batch_norm import spread_batch_norm
from isd_ray.train.optim import build_optimizer, load_optimizer
from isd_ray.train.teacher import load_teacher


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
    """Everything that changes while training; `queue` and `bank` are None for a method without one.

    `step` counts finished optimiser steps.
    """

    method: Method
    queue: DistributedQueue | None
    bank: Bank | None
    optimizer: torch.optim.Optimizer
    step: int = 0

    def save(self) -> dict[str, Any]:
        """Return tensors and plain values. All ranks call it together: a sharded queue or bank is gathered."""
        return {
            "step": self.step,
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "queue": None if self.queue is None else self.queue.state_dict(),
            "bank": None if self.bank is None else self.bank.state_dict(),
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Continue from `saved`, whatever number of workers saved it."""
        with fitting(saved):
            self.method.load_state_dict(saved["method"])
            load_optimizer(self.optimizer, saved["optimizer"])
            if self.queue is not None:
                self.queue.load_state_dict(saved["queue"])
            if self.bank is not None:
                self.bank.load_state_dict(saved["bank"])
            self.step = int(saved["step"])

    def load_networks(self, saved: dict[str, Any]) -> None:
        """Take the networks of `saved` alone, to evaluate or export them."""
        with fitting(saved):
            self.method.load_state_dict(saved["method"])


@contextmanager
def fitting(saved: dict[str, Any]) -> Iterator[None]:
    """Raise UserError where what is loaded within is of other networks than these options build."""
    try:
        yield
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        if of_memory(error):
            raise
        reason = printable(" ".join(str(error).split()))[:200]
        raise UserError(
            f"the checkpoint of step {saved.get('step')} does not fit the run's options ({type(error).__name__}: "
            f"{reason}); put config.yaml or the checkpoint back as it was, or remove the checkpoint"
        ) from None


def build_state(config: Config, device: torch.device, images: int) -> State:
    """Build the method, its queue or bank and its optimiser from the seed: the same on every rank.

    images: size of the training set, for the bank; 1 where only the networks are wanted.
    """
    teacher = load_teacher(config)  # before the seed: to build it draws random numbers
    torch.manual_seed(config.train.seed)
    model, size = config.model, config.data.image_size
    backbone = build_backbone(model.backbone, stem=model.stem, image_size=size)
    kind: Any = find_method(config.method.name)
    widths = [network.dim for network in (backbone, teacher) if network is not None]
    queue, bank = None, None
    if kind.uses_queue:
        queue = build_queue(config, kind.embedding_dim(*widths), device)
    if kind.uses_bank:
        bank = Bank(images, kind.embedding_dim(*widths), kind.bank_ids, config.train.seed, device=device)
    memory = bank if queue is None else queue
    method = build_method(config.method.name, backbone, memory, **method_options(config, teacher))
    method = spread_batch_norm(method, config.train.batch_norm, device)
    method.to(device)
    method.to(memory_format=torch.channels_last)
    return State(method, queue, bank, build_optimizer(method, config.train, constant=method.constant_lr))


def method_options(config: Config, teacher: Frozen | None = None) -> dict[str, Any]:
    """Return the arguments that the method's constructor takes, and no others."""
    values = config.method.model_dump() | {"exclude_own": config.queue.exclude_own, "gather": all_gather}
    values["teacher"] = teacher
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
