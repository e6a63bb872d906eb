"""Weights come in from published checkpoints and go out to torchvision and timm, key by key or not at all.

A loader that skips keys it does not know evaluates a random network and says nothing; these raise instead.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from isd_ray.errors import UserError, printable
from isd_ray.methods.isd import ISD
from isd_ray.weight_files import StrPath, is_plain, read_checkpoint, read_metadata, read_safetensors

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ISD_PARTS = {  # in the published files -> in ours; the first prefix that fits counts
    "encoder_q.fc.": "student.projector.",
    "encoder_q.": "student.backbone.",
    "encoder_k.fc.": "teacher.network.projector.",
    "encoder_k.": "teacher.network.backbone.",
    "predict_q.": "predictor.",
}
LARGEST_SIZE = 4096  # of images, in pixels
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

    encoder: prefix of its keys: "encoder_q" (student), "encoder_k" (teacher; "encoder_t" in MSF's
    files), "" for a plain torchvision state. Raises and returns as `load_isd_checkpoint`.
    """
    prefix = f"{encoder}." if encoder else ""
    state = read_checkpoint(path)
    weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    weights = {key: value for key, value in weights.items() if not key.startswith("fc.")}
    if not weights:
        parts = sorted({printable(key.split(".")[0])[:50] for key in state})[:8] or ["nothing"]
        raise UserError(
            f"{printable(os.fspath(path))} has no encoder '{encoder}': its keys begin with {', '.join(parts)}."
        )
    unmatched = _unmatched(weights, backbone.state_dict())
    _refuse(unmatched, path, allow_unmatched)
    _copy(weights, backbone)
    return unmatched


class Description(NamedTuple):
    """What a file of `export_backbone` says of itself: how to build it, and the normalisation."""

    arch: str
    stem: str
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def export_backbone(
    backbone: nn.Module,
    path: StrPath,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> None:
    """Write a backbone of `build_backbone` as safetensors: the same bytes for the same backbone.

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
    unfinished.write_bytes(_with_sorted_metadata(save(state, metadata)))
    unfinished.replace(path)


def _with_sorted_metadata(file: bytes) -> bytes:
    """Return a safetensors file with its metadata in order: safetensors deals them anew each time.

    A file is the length of its header (8 bytes, little-endian), the header (JSON, filled up with
    blanks to a multiple of 8 bytes) and the tensors.
    """
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + file[end:]


def describe(path: StrPath) -> Description | None:
    """Return what a safetensors file says of itself; None: `export_backbone` did not write it.

    Raises UserError for a file that is no safetensors or whose description is damaged.
    """
    metadata = read_metadata(path)
    if not metadata.keys() >= {*Description._fields}:
        return None
    try:
        size = int(metadata["image_size"])
        mean, std = (tuple(map(float, json.loads(metadata[name]))) for name in ("mean", "std"))
        sound = len(mean) == len(std) == 3 and all(map(math.isfinite, mean + std)) and min(std) > 0
        if not sound or not 1 <= size <= LARGEST_SIZE:
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise UserError(
            f"{printable(os.fspath(path))}: its metadata are damaged (image_size, mean or std); export it anew"
        ) from None
    stem = "auto" if metadata["stem"] == "own" else metadata["stem"]
    return Description(metadata["arch"], stem, size, mean, std)


def load_backbone(backbone: nn.Module, path: StrPath) -> None:
    """Load a safetensors file into a backbone. Raises UserError on any key or shape that does not match."""
    load_weights(backbone, read_safetensors(path), path)


def load_weights(backbone: nn.Module, weights: Mapping[str, Tensor], source: StrPath) -> None:
    """Copy weights into a backbone, all or none. Raises UserError, in the name of `source`, on any key or shape
    that does not match."""
    _refuse(_unmatched(weights, backbone.state_dict()), source, allowed=False)
    _copy(weights, backbone)


def _rename(key: str) -> str:
    for published, ours in ISD_PARTS.items():
        if key.startswith(published):
            return ours + key.removeprefix(published)
    return key


def _unmatched(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    both = [key for key in own if key in weights]
    return [
        *(
            f"{key}: {_form(weights[key])} in the file, {_form(own[key])} here"
            for key in both
            if not _fits(weights[key], own[key])
        ),
        *(f"{key}: not in the file" for key in own if key not in weights),
        *(f"{printable(key)[:100]}: only in the file" for key in weights if key not in own),
    ]


def _fits(value: Any, own: Tensor) -> bool:
    """Can it be copied: numbers of the same shape, fractions for fractions?

    Whole numbers, the counts of batch norm, may be fractions in the file: some convert all of a
    file to float16.
    """
    if not is_plain(value) or value.is_complex() or value.shape != own.shape:
        return False
    return value.is_floating_point() or not own.is_floating_point()


def _form(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    kind = "" if value.is_floating_point() else f"{value.dtype} ".removeprefix("torch.")
    return f"{kind}{list(value.shape)}"


def _refuse(unmatched: list[str], path: StrPath, allowed: bool) -> None:
    if unmatched and not allowed:
        more = f"; and {len(unmatched) - 8} more" if len(unmatched) > 8 else ""
        raise UserError(
            f"{printable(os.fspath(path))} does not match in {len(unmatched)} places: "
            f"{'; '.join(unmatched[:8])}{more}."
        )


def _copy(weights: Mapping[str, Tensor], module: nn.Module) -> None:
    own = module.state_dict()
    matching = {key: value for key, value in weights.items() if key in own and _fits(value, own[key])}
    module.load_state_dict(matching, strict=False)


def _unmatched_queue(published: Mapping[str, Tensor], queue: Any) -> list[str]:
    """What keeps a published ring (rows, where the oldest is, labels) from being taken over."""
    missing = [f"{key}: not in the file" for key in ("queue", "queue_ptr") if key not in published]
    if missing:
        return missing
    rows, pointer, labels = published["queue"], published["queue_ptr"], published.get("labels")
    own = [queue.size, queue.dim]
    faults = []
    if list(rows.shape) != own or not rows.is_floating_point():
        faults.append(f"queue: {_form(rows)} in the file, {own} here")
    if pointer.numel() != 1 or not _whole(pointer) or not 0 <= int(pointer) < queue.size:
        faults.append(f"queue_ptr: no row of the {queue.size:,} in the queue")
    if labels is not None and (list(labels.shape) != own[:1] or not _whole(labels)):
        faults.append(f"labels: {_form(labels)} in the file, whole numbers {own[:1]} here")
    return faults


def _whole(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def _load_queue(published: Mapping[str, Tensor], queue: Any) -> None:
    """Rows in order of age: the pointer of the published ring stands at the oldest."""
    oldest = int(published["queue_ptr"])
    keys = published["queue"].roll(-oldest, dims=0)
    none = torch.full((len(keys),), -1, dtype=torch.int64)
    label = published["labels"].roll(-oldest) if "labels" in published else none
    counts = {"seen": torch.tensor(len(keys)), "steps": torch.tensor(0)}
    queue.load_state_dict({"keys": keys, "index": none, "label": label, **counts})
