"""Weights come in from published checkpoints and go out to torchvision and timm, key by key or not at all.

A loader that skips keys it does not know evaluates a random network and says nothing; these raise instead.
"""

import argparse
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isd_ray.errors import UserError
from isd_ray.methods.isd import ISD

StrPath = str | os.PathLike[str]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ISD_PARTS = {  # in the published files -> in ours; the first prefix that fits counts
    "encoder_q.fc.": "student.projector.",
    "encoder_q.": "student.backbone.",
    "encoder_k.fc.": "teacher.network.projector.",
    "encoder_k.": "teacher.network.backbone.",
    "predict_q.": "predictor.",
}
ISD_QUEUE = ("queue", "queue_ptr", "labels")  # labels: in the plus variant only


def load_isd_checkpoint(path: StrPath, method: ISD, allow_unmatched: bool = False) -> list[str]:
    """Load a file of the published ISD code (train_isd*.py) into `method` and its queue.

    Fills the student (backbone, projector), the predictor, the teacher and the queue (in order of age; the
    files have no image indices). Build the method as the file was: "isd" or "isd_plus", stem "imagenet",
    queue.size as published (128 000).

    Raises UserError with everything that does not match, before anything is changed. With `allow_unmatched`
    the rest is loaded and that list returned (empty: all matched).
    """
    published = read_checkpoint(path)
    weights = {_rename(key): value for key, value in published.items() if key not in ISD_QUEUE}
    unmatched = _unmatched(weights, method.state_dict()) + _unmatched_queue(published, method.queue)
    _refuse(unmatched, path, allow_unmatched)
    _copy(weights, method)
    if not _unmatched_queue(published, method.queue):
        _load_queue(published, method.queue)
    return unmatched


def load_encoder(
    path: StrPath,
    backbone: nn.Module,
    encoder: str = "encoder_q",
    allow_unmatched: bool = False,
) -> list[str]:
    """Load one encoder of a MoCo-style checkpoint (MoCo, ISD, MSF) into a backbone, without its head `fc.*`.

    encoder: prefix of its keys: "encoder_q" (student), "encoder_k" (teacher), "" for a plain torchvision
    state. Raises and returns as `load_isd_checkpoint`.
    """
    prefix = f"{encoder}." if encoder else ""
    state = read_checkpoint(path)
    weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    weights = {key: value for key, value in weights.items() if not key.startswith("fc.")}
    if not weights:
        parts = sorted({key.split(".")[0] for key in state})
        raise UserError(f"{path} has no encoder '{encoder}': its keys begin with {', '.join(parts)}.")
    unmatched = _unmatched(weights, backbone.state_dict())
    _refuse(unmatched, path, allow_unmatched)
    _copy(weights, backbone)
    return unmatched


def export_backbone(
    backbone: nn.Module,
    path: StrPath,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> None:
    """Write a backbone of `build_backbone` as safetensors.

    torchvision's and timm's resnets load it with strict=False: only fc.* is missing. The metadata (strings)
    say arch, stem, dim, image_size, and mean and std of the normalisation as JSON lists. A backbone with a
    CIFAR stem needs the same stem on the other side. The file appears whole or not at all.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in backbone.state_dict().items()}
    metadata = {key: str(getattr(backbone, key)) for key in ("arch", "dim", "image_size")}
    metadata |= {
        "stem": str(backbone.stem_kind),
        "mean": json.dumps(list(mean)),
        "std": json.dumps(list(std)),
    }
    unfinished = Path(f"{os.fspath(path)}.part")
    save_file(state, unfinished, metadata=metadata)
    unfinished.replace(path)


def backbone_metadata(path: StrPath) -> dict[str, str]:
    """Metadata that `export_backbone` wrote; {} for a safetensors file from elsewhere."""
    if not Path(path).is_file():
        raise UserError(f"no weights at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file: {error}") from error


def load_backbone(backbone: nn.Module, path: StrPath) -> None:
    """Load a safetensors file into a backbone. Raises UserError on any key or shape that does not match."""
    backbone_metadata(path)
    load_weights(backbone, load_file(path), path)


def load_weights(backbone: nn.Module, weights: Mapping[str, Tensor], source: StrPath) -> None:
    """Copy weights into a backbone, all or none. Raises UserError, in the name of `source`, on any key or shape
    that does not match."""
    _refuse(_unmatched(weights, backbone.state_dict()), source, allowed=False)
    _copy(weights, backbone)


def read_checkpoint(path: StrPath) -> dict[str, Tensor]:
    """Tensors of a .pth file, from under `state_dict` or `model` if there, without `module.` in their names.

    Nothing in the file is executed: it is read with weights_only=True. The one class allowed besides
    tensors is argparse.Namespace, in which the published code keeps its options.
    """
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0] or "it ends too early"
        raise UserError(f"{path} cannot be read as a checkpoint of tensors: {reason}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(
            f"{path} holds no state dict: expected tensors by name, also under 'state_dict' or 'model'."
        )
    return {_without_wrappers(key): value for key, value in content.items()}


def _without_wrappers(key: str) -> str:
    """DataParallel wraps the model or, in the ISD code, its parts: encoder_q.module.fc -> encoder_q.fc."""
    return ".".join(part for part in key.split(".") if part != "module")


def _rename(key: str) -> str:
    for published, ours in ISD_PARTS.items():
        if key.startswith(published):
            return ours + key.removeprefix(published)
    return key


def _unmatched(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    reshaped = [key for key in own if key in weights and weights[key].shape != own[key].shape]
    return [
        *(f"{key}: {list(weights[key].shape)} in the file, {list(own[key].shape)} here" for key in reshaped),
        *(f"{key}: not in the file" for key in own if key not in weights),
        *(f"{key}: only in the file" for key in weights if key not in own),
    ]


def _refuse(unmatched: list[str], path: StrPath, allowed: bool) -> None:
    if unmatched and not allowed:
        more = f"; and {len(unmatched) - 8} more" if len(unmatched) > 8 else ""
        raise UserError(
            f"{path} does not match in {len(unmatched)} places: {'; '.join(unmatched[:8])}{more}."
        )


def _copy(weights: Mapping[str, Tensor], module: nn.Module) -> None:
    own = module.state_dict()
    matching = {key: value for key, value in weights.items() if key in own and value.shape == own[key].shape}
    module.load_state_dict(matching, strict=False)


def _unmatched_queue(published: Mapping[str, Tensor], queue: Any) -> list[str]:
    missing = [f"{key}: not in the file" for key in ("queue", "queue_ptr") if key not in published]
    if missing:
        return missing
    shape, own = list(published["queue"].shape), [queue.size, queue.dim]
    return [] if shape == own else [f"queue: {shape} in the file, {own} here"]


def _load_queue(published: Mapping[str, Tensor], queue: Any) -> None:
    """Rows in order of age: the pointer of the published ring stands at the oldest."""
    oldest = int(published["queue_ptr"])
    keys = published["queue"].roll(-oldest, dims=0)
    none = torch.full((len(keys),), -1, dtype=torch.int64)
    label = published["labels"].roll(-oldest) if "labels" in published else none
    counts = {"seen": torch.tensor(len(keys)), "steps": torch.tensor(0)}
    queue.load_state_dict({"keys": keys, "index": none, "label": label, **counts})
