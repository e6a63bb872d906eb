"""Where the time of a run goes: the parts of every step on the device's own clock, and what to do about the largest.

A part ends where the next begins, so that the shares sum to one. On CUDA the marks are events: they cost
microseconds, nothing waits for them, and "wait" is the time in which the device had nothing to do.
"""

import time
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import nn

from isd_ray.data.read import STAGES
from isd_ray.queue import DistributedQueue
from isd_ray.queue.bank import Bank

# In the order of a step. "communicate" is what averaging gradients adds behind the last gradient; the queue's own
# exchange counts as queue.
PARTS = ("wait", "views", "forward", "queue", "backward", "communicate", "update", "log")


class Clock:
    """Seconds of each part since the last `take`; `mark(part)` says that what ran since the last mark was `part`."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, part: str) -> None:
        """End a part here."""
        self.marks.append((part, self._now()))

    def take(self) -> dict[str, float]:
        """Return the seconds of every part and start anew; on CUDA it waits for the last mark."""
        if self.cuda:
            self.marks[-1][1].synchronize()
        seconds = dict.fromkeys(PARTS, 0.0)
        for (_, before), (part, now) in zip(self.marks, self.marks[1:], strict=False):
            seconds[part] += before.elapsed_time(now) / 1000 if self.cuda else now - before
        self.marks = [("", self.marks[-1][1])]
        return seconds

    def watch_queue(self, memory: DistributedQueue | Bank | None) -> None:
        """Count what queue or bank do, which happens inside the forward pass, as a part of its own."""
        for name in ("attend", "topk", "enqueue", "nearest", "read", "write"):
            if hasattr(memory, name):
                setattr(memory, name, self._timed(getattr(memory, name), "forward", "queue"))

    def watch_gradients(self, backbone: nn.Module) -> None:
        """Tell computing gradients from waiting for the other workers': the first layer's gradient comes last."""
        first = next(p for p in backbone.parameters() if p.requires_grad)
        first.register_post_accumulate_grad_hook(lambda _: self.mark("backward"))

    def _timed(self, function: Callable, before: str, part: str) -> Callable:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.mark(before)
            try:
                return function(*args, **kwargs)
            finally:
                self.mark(part)

        return timed


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return each part's share of all the time; all zero where there was none."""
    total = sum(seconds.values())
    return {part: value / total if total > 0 else 0.0 for part, value in seconds.items()}


def run_shares(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Return the shares of a whole run from its lines of metrics, each weighed by the time that it stands for.

    Lines without shares (of an older version) do not count; no such line gives no share.
    """
    known = [line for line in lines if all(f"{part}_share" in line for part in PARTS)]
    if not known:
        return {}
    weights = [1 / max(line["images_per_second"], 1e-9) for line in known]
    return {
        part: sum(w * line[f"{part}_share"] for w, line in zip(weights, known, strict=True)) / sum(weights)
        for part in PARTS
    }


def run_stages(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean milliseconds that reading tasks spent an image in each stage; {} where nothing was streamed."""
    known = [line for line in lines if any(line.get(f"{stage}_ms", 0) > 0 for stage in STAGES)]
    return {stage: sum(line[f"{stage}_ms"] for line in known) / len(known) for stage in STAGES if known}


ADVICE = {
    "views": "making the views: --data.augment_on tasks, more --train.threads, a GPU, or fewer and smaller views",
    "network": "the network itself ({}): more workers or GPUs, a smaller --model.backbone or --data.image_size, "
    "--train.precision bfloat16 on a CPU that has AMX",
    "queue": "the queue: a smaller --queue.size, or --queue.layout sharded over more workers",
    "communicate": "waiting for the other workers' gradients: a larger --train.batch_size, or fewer, closer workers",
    "update": "optimiser and teacher: a larger --train.batch_size, so that there are fewer steps",
    "log": "metrics and checkpoints: a larger --train.log_every or --train.checkpoint_seconds",
}
WAIT_ADVICE = {
    "read": "waiting for data (mostly reading): shards on a local disk or nearer storage, or --data.cache memory",
    "decode": "waiting for data (mostly decoding): more CPUs, smaller files in the shards, or --data.cache memory",
    "transform": "waiting for data (mostly making views): more CPUs, a smaller --data.image_size, or fewer views",
    "": "waiting for data: more CPUs, or more memory bandwidth where the images are already cached",
}


def sentence(part_shares: Mapping[str, float], stages: Mapping[str, float]) -> str:
    """Say in one sentence what took most of the time, and what to change; "" where no shares are known.

    Forward and backward pass together are the network. `stages`: milliseconds an image of the reading tasks.
    """
    if not part_shares:
        return ""
    merged = {"wait": part_shares["wait"], "network": part_shares["forward"] + part_shares["backward"]}
    merged |= {part: part_shares[part] for part in ADVICE if part != "network"}
    largest = max(merged, key=lambda part: merged[part])
    if largest == "wait":
        advice = WAIT_ADVICE[max(stages, key=lambda stage: stages[stage]) if stages else ""]
    else:
        both = f"forward {part_shares['forward']:.0%}, backward {part_shares['backward']:.0%}"
        advice = ADVICE[largest].format(both)
    return f"{merged[largest]:.0%} of the training time went to {advice}."
