"""Tensors out of files that anybody may have made: all is read or refused, nothing is executed.

Whatever is wrong with a file (no such format, cut, changed bytes, objects in it that are no
tensors) ends in one UserError that names it.
"""

import argparse
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from isd_ray.ending import broken, first_line
from isd_ray.errors import UserError, printable

StrPath = str | os.PathLike[str]
_GLOBAL = re.compile(r"GLOBAL (\S+) ")  # in PyTorch's message on a class that it does not load


def read_checkpoint(path: StrPath) -> dict[str, Tensor]:
    """Return the tensors of a .pth file by name, also from under `state_dict` or `model`.

    `module.` is left out of names. It is read with weights_only=True. The one class allowed besides
    tensors is argparse.Namespace, in which the published code keeps its options. Raises UserError for
    any other file, MachineError where the disk fails.
    """
    place = _file(path, "checkpoint")
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise broken(place, error) from None
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # of pickle protocols, in files that are no pickles
            loaded = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what the bytes happen to lead to
        raise UserError(f"{place} cannot be read as a checkpoint of tensors: {_reason(error)}") from None
    return _state(loaded, place)


def read_safetensors(path: StrPath) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name; raises UserError for any other file."""
    with _safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        return _plain(tensors, _file(path, "weights"))


def read_metadata(path: StrPath) -> dict[str, str]:
    """Return the texts in the header of a safetensors file; raises UserError for any other file."""
    with _safetensors(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def _safetensors(path: StrPath) -> Iterator[Any]:
    place = _file(path, "weights")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except UserError:
        raise
    except OSError as error:
        raise broken(place, error) from None
    except Exception as error:
        raise UserError(f"{place} is no safetensors file: {_reason(error)}") from None


def _file(path: StrPath, what: str) -> str:
    """Return the name of a file that exists, as a message may repeat it."""
    place = printable(os.fspath(path))
    if not Path(path).is_file():
        raise UserError(f"no {what} at {place}")
    return place


def _reason(error: Exception) -> str:
    """Say why a file cannot be read, without PyTorch's advice to let it execute code."""
    text = str(error)
    if found := _GLOBAL.search(text):
        return f"it holds more than tensors ({printable(found[1])[:100]}), which is not loaded"
    if not text or "weights_only" in text:
        return "it is damaged, or was not written by torch.save"
    return printable(first_line(error).partition(". ")[0])[:200]


def _state(loaded: Any, place: str) -> dict[str, Tensor]:
    """Return the state dict in what torch.save wrote."""
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    named = isinstance(loaded, Mapping) and all(isinstance(key, str) for key in loaded)
    if not named or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(
            f"{place} holds no state dict: expected tensors by name, also under 'state_dict' or 'model'"
        )
    state = {_without_wrappers(key): value for key, value in loaded.items()}
    if len(state) < len(loaded):
        raise UserError(f"{place} has two tensors of one name, once 'module' is left out of their names")
    return _plain(state, place)


def is_plain(value: Any) -> bool:
    """Is a value a tensor with numbers in it, neither sparse nor quantised nor nested?"""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return not (value.is_quantized or value.is_nested or value.is_meta)


def _plain(tensors: dict[str, Tensor], place: str) -> dict[str, Tensor]:
    for name, value in tensors.items():
        if not is_plain(value):
            raise UserError(f"{place}: {printable(name)[:100]} is no plain tensor of numbers")
    return tensors


def _without_wrappers(key: str) -> str:
    """DataParallel wraps a model or, in ISD's code, its parts: encoder_q.module.fc -> encoder_q.fc."""
    return ".".join(part for part in key.split(".") if part != "module")
