"""Where a frozen teacher comes from: a run, a published checkpoint or a file of weights. Nothing is downloaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from isd_ray import interop
from isd_ray.config import Config, MethodConfig
from isd_ray.data.views import get_views
from isd_ray.errors import UserError, printable
from isd_ray.methods import options_of
from isd_ray.models.backbones import SMALL_RESNETS, TORCHVISION_RESNETS, build_backbone
from isd_ray.models.frozen import Frozen
from isd_ray.train.folder import RunFolder, load_checkpoint, saved_config
from isd_ray.weight_files import read_checkpoint, read_safetensors

RUN_PREFIX = {"student": "student.backbone.", "teacher": "teacher.network.backbone."}
PUBLISHED_PREFIXES = {  # MoCo's and ISD's files; MSF calls its teacher the target
    "student": ("encoder_q.",),
    "teacher": ("encoder_k.", "encoder_t."),
}


class Found(NamedTuple):
    """Weights and what they belong to. Numbers that the source does not tell are None."""

    weights: dict[str, Tensor]
    arch: str
    stem: str = "auto"
    image_size: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


def load_teacher(config: Config) -> Frozen | None:
    """Load the frozen teacher of `--method.teacher` on the CPU; None for a method that takes none.

    Its images are those of the student, normalised with the run's data.mean and data.std. Raises UserError where
    there is no teacher, where it cannot be loaded key by key, does not take images of the run's size, or is known
    to have been trained with another normalisation.
    """
    method, data = config.method, config.data
    source = asked_teacher(method)
    if source is None:
        return None
    found = find_in_run(method) or find_in_file(method)
    network = build_backbone(found.arch, found.stem, found.image_size or data.image_size)
    # Weights from the time before batch norm counted its batches; nothing here reads that count.
    counts = {n: v for n, v in network.state_dict().items() if n.endswith(".num_batches_tracked")}
    interop.load_weights(network, counts | without_classifier(found.weights, network), source)
    for name in ("mean", "std"):
        trained, given = getattr(found, name), getattr(data, name)
        if trained is not None and list(trained) != list(given):
            raise UserError(
                f"--method.teacher {method.teacher}: trained with --data.{name} {list(trained)}, this run has "
                f"{list(given)}; give it the teacher's"
            )
    teacher = Frozen(network)
    for side in sorted({data.image_size, *(v.pixels(data.image_size) for v in get_views(method.views))}):
        try_out(teacher, side, source)
    return teacher


def asked_teacher(method: MethodConfig) -> str | None:
    """Return where the teacher lies, None for a method without one; raises UserError."""
    if "teacher" not in options_of(method.name):
        return None
    if method.teacher is None:
        raise UserError(
            f"--method.name {method.name} learns from a trained network: give --method.teacher, "
            "the folder of a run or a file of weights"
        )
    return method.teacher


def find_in_run(method: MethodConfig) -> Found | None:
    """Take an encoder from a run of ours: its folder, or one of its checkpoints; None where it is no run."""
    spec = str(method.teacher).rstrip("/")
    uri, _, checkpoint = spec.rpartition("/checkpoints/") if spec.endswith(".pt") else (spec, "", None)
    folder = RunFolder(uri) if uri else None
    if folder is None or not folder.exists("config.yaml"):
        return None
    if checkpoint is None and not folder.exists("result.json"):
        raise UserError(f"--method.teacher {spec}: that run is not finished; name one of its checkpoints")
    saved, run = load_checkpoint(folder, checkpoint), saved_config(folder)
    if saved is None:
        raise UserError(f"--method.teacher {spec}: that run has no checkpoint")
    name = method.teacher_encoder or "student"
    weights = below(saved["method"], RUN_PREFIX[name])
    if not weights:
        raise UserError(f"--method.teacher_encoder {name}: the run {uri} trained no such network")
    model, data = run.model, run.data
    refuse_another_backbone(method, model.backbone)
    return Found(weights, model.backbone, model.stem, data.image_size, mean=data.mean, std=data.std)


def find_in_file(method: MethodConfig) -> Found:
    """Take an encoder from a local file: ours or anyone's safetensors, a checkpoint of MoCo or ISD, a state dict."""
    path = str(method.teacher)
    if Path(path).is_dir():
        raise UserError(
            f"--method.teacher {path}: no run there (config.yaml is missing); give a run or a file"
        )
    if not path.endswith(".safetensors"):
        weights = of_encoder(read_checkpoint(path), method)
        return Found(weights, *what_it_is(weights, method))
    weights, described = read_safetensors(path), interop.describe(path)
    if described is None:
        weights = of_encoder(weights, method)
        return Found(weights, *what_it_is(weights, method))
    refuse_another_backbone(method, described.arch)
    if method.teacher_encoder == "teacher":
        raise UserError(f"--method.teacher_encoder teacher: {path} holds the student; give the run's folder")
    return Found(weights, *described)


def of_encoder(weights: dict[str, Tensor], method: MethodConfig) -> dict[str, Tensor]:
    """Keep the weights of one encoder, where the file has two as MoCo's, ISD's and MSF's have."""
    name = method.teacher_encoder or "student"
    for prefix in PUBLISHED_PREFIXES[name]:
        if chosen := below(weights, prefix):
            return chosen
    others = [prefix for prefixes in PUBLISHED_PREFIXES.values() for prefix in prefixes]
    if name == "teacher" or any(below(weights, prefix) for prefix in others):
        names = " or ".join(f"'{prefix[:-1]}'" for prefix in PUBLISHED_PREFIXES[name])
        raise UserError(f"--method.teacher_encoder {name}: {method.teacher} has no encoder {names}")
    return weights


def what_it_is(weights: dict[str, Tensor], method: MethodConfig) -> tuple[str, str]:
    """Return name and stem of the backbone that a file of weights alone does not tell."""
    arch, known = method.teacher_backbone, f"{', '.join(TORCHVISION_RESNETS)} or timm:NAME"
    if arch is None:
        raise UserError(
            f"--method.teacher {method.teacher}: the file does not say which backbone it holds; give "
            f"--method.teacher_backbone ({known})"
        )
    if arch in SMALL_RESNETS:  # their stems have the same weights
        raise UserError(
            f"--method.teacher_backbone {arch}: a file of weights does not tell its stem; give --method.teacher the "
            "run's folder or its backbone.safetensors"
        )
    if arch not in TORCHVISION_RESNETS:
        return arch, "auto"
    first = weights.get("conv1.weight")
    return arch, "cifar" if first is not None and first.shape[-1] == 3 else "imagenet"


def without_classifier(weights: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Leave out the classifier of a network trained on labels, and MoCo's head, which has its name."""
    names = getattr(network, "pretrained_cfg", {}).get("classifier", "fc")
    prefixes = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    return {name: value for name, value in weights.items() if not name.startswith(prefixes)}


def below(weights: Any, prefix: str) -> dict[str, Tensor]:
    """Return the weights under a prefix, without it; {} where there are none, or no mapping."""
    named = weights.items() if isinstance(weights, Mapping) else ()
    return {n.removeprefix(prefix): value for n, value in named if str(n).startswith(prefix)}


def refuse_another_backbone(method: MethodConfig, arch: str) -> None:
    """Refuse an option that contradicts what the teacher says of itself."""
    if method.teacher_backbone not in (None, arch):
        raise UserError(
            f"--method.teacher_backbone {method.teacher_backbone}: {method.teacher} holds "
            f"{printable(arch)}; leave it out"
        )


def try_out(teacher: Frozen, size: int, source: str) -> None:
    """Refuse, before a run begins, a teacher that does not take images of this size or answers no numbers."""
    try:
        features = teacher(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"--method.teacher {source}: it does not take images of {size} pixels: {reason}"
        ) from None
    if not features.isfinite().all():
        raise UserError(f"--method.teacher {source}: its features are not finite; the weights are broken")
