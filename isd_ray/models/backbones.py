"""A study needs the same backbone call for every network: `images [b, 3, S, S] -> pooled features [b, dim]`.

Small CIFAR resnets run on a laptop, torchvision's resnets are what papers report, timm has everything else.
A backbone has no classifier; `dim`, `arch`, `stem_kind` and `image_size` are attributes of it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from isd_ray.errors import UserError, nearest

SMALL_RESNETS = {"resnet8": 1, "resnet14": 2, "resnet20": 3, "resnet32": 5}  # name -> blocks a stage
TORCHVISION_RESNETS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "resnet34": torchvision.models.resnet34,
    "resnet50": torchvision.models.resnet50,
}
STEMS = ("auto", "imagenet", "cifar", "stride2")
SIZE_ERRORS = (RuntimeError, ValueError, AssertionError)  # what timm's models raise for a size that is wrong
CIFAR_STEM_UP_TO = 64  # pixels: above this, a stem that keeps the resolution costs more than it brings


def build_backbone(name: str, stem: str = "auto", image_size: int = 32) -> nn.Module:
    """Build an untrained backbone: images float [b, 3, S, S] -> features [b, dim].

    name: resnet8, resnet14, resnet20, resnet32 (He et al. 2016, section 4.2), resnet18, resnet34, resnet50
        (torchvision), or any timm model as "timm:NAME".
    stem: of torchvision's resnets. "imagenet" is 7x7 stride 2 and a max-pool; "cifar" is 3x3 stride 1,
    padding 1, no max-pool; "auto" takes "cifar" up to 64 pixels. The small resnets have a CIFAR stem, or with
    "stride2" one that halves the resolution and costs a quarter. timm has its own.
    image_size: side in pixels; passed on to the timm models that are built for one size. Those that
    can (ViT, EVA, Swin) take other sizes too, with interpolated positions: see `check_size`.

    Raises UserError for an unknown name or stem, a stem that the network does not have, or an image size that
    it cannot process.
    """
    if stem not in STEMS:
        raise UserError(f"unknown stem '{stem}': choose one of {', '.join(STEMS)}.{nearest(stem, STEMS)}")
    if name in SMALL_RESNETS:
        _refuse_stem(name, stem, allowed=("auto", "cifar", "stride2"))
        resolved = "cifar" if stem == "auto" else stem
        network = SmallResNet(SMALL_RESNETS[name], stride=2 if stem == "stride2" else 1)
        return _describe(network, name, resolved, image_size, dim=64)
    if name in TORCHVISION_RESNETS:
        _refuse_stem(name, stem, allowed=("auto", "cifar", "imagenet"))
        resolved = stem
        if stem == "auto":
            resolved = "cifar" if image_size <= CIFAR_STEM_UP_TO else "imagenet"
        return _torchvision_resnet(name, resolved, image_size)
    if name.startswith("timm:"):
        _refuse_stem(name, stem, allowed=("auto",))
        return _timm_model(name, image_size)
    raise UserError(f"unknown backbone '{name}'.{nearest(name, backbone_names())}")


def backbone_names() -> list[str]:
    """Every name that `build_backbone` knows, timm's included."""
    import timm  # takes about a second: only paid by those who use it

    return [*SMALL_RESNETS, *TORCHVISION_RESNETS, *(f"timm:{name}" for name in timm.list_models())]


class SmallResNet(nn.Module):
    """The CIFAR resnet of He et al. (2016), section 4.2: three stages of 16, 32 and 64 channels, 6n+2 layers.

    Shortcuts are the paper's option B: where the shape changes, a 1x1 convolution with batch norm projects the
    input. (Option A, subsampling without weights, cost 12 points of 20-NN on the embedded data set.) Convolutions
    start He-normal.
    """

    def __init__(self, blocks: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return x.mean(dim=(2, 3))


class SmallBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected by a 1x1 convolution where the shape changes (option B)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or channels != channels_in:
            projection = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.downsample(x) + residual)


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = SmallBlock(channels_in, channels, stride)
    return nn.Sequential(first, *(SmallBlock(channels, channels, 1) for _ in range(blocks - 1)))


def _torchvision_resnet(name: str, stem: str, image_size: int) -> nn.Module:
    # torchvision's own start (He-normal, last BN of a block at one) is that of the published ISD code.
    model: Any = TORCHVISION_RESNETS[name](weights=None)
    dim = model.fc.in_features
    model.fc = nn.Identity()
    if stem == "cifar":
        model.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return _describe(model, name, stem, image_size, dim)


def _timm_model(name: str, image_size: int) -> nn.Module:
    import timm

    architecture = name.removeprefix("timm:")
    if not timm.is_model(architecture):
        raise UserError(f"timm has no model '{architecture}'.{nearest(name, backbone_names())}")
    try:
        model = _create_timm(architecture, image_size)
        dim = _probe_dim(model, image_size)
    except SIZE_ERRORS as error:
        raise UserError(
            f"backbone '{name}' does not take images of {image_size} pixels (--data.image_size): {_why(error)}"
        ) from error
    return _describe(model, name, "own", image_size, dim)


def _create_timm(architecture: str, image_size: int) -> nn.Module:
    """Create a timm model of this size that also takes other sizes, as small views are, where it can."""
    import timm

    options: dict[str, Any] = {"pretrained": False, "num_classes": 0, "in_chans": 3}
    one_size = options | {"img_size": image_size}
    for chosen in (one_size | {"dynamic_img_size": True}, one_size):
        try:
            return timm.create_model(architecture, **chosen)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
    return timm.create_model(architecture, **options)  # built for any size


@torch.no_grad()
def _probe_dim(model: nn.Module, image_size: int) -> int:
    """Width of the features, by one forward pass: timm's attributes do not say it for every family."""
    features = model.eval()(torch.zeros(1, 3, image_size, image_size))
    model.train()
    if features.ndim != 2:
        raise ValueError(f"features have shape {tuple(features.shape)}, not [b, dim]")
    return features.shape[1]


def check_size(backbone: Any, side: int) -> None:
    """Raise UserError where a backbone of `build_backbone` does not take images of `side` pixels."""
    if not backbone.arch.startswith("timm:") or side == backbone.image_size:
        return  # resnets average over whatever is left
    training = backbone.training
    try:
        _probe_dim(backbone, side)
    except SIZE_ERRORS as error:
        raise UserError(
            f"backbone '{backbone.arch}' for {backbone.image_size} pixels does not take images of {side}: "
            f"{_why(error)}"
        ) from error
    finally:
        backbone.train(training)


def _why(error: Exception) -> str:
    return (str(error).splitlines() or ["its layers do not fit that size"])[0]


def _describe(model: Any, arch: str, stem: str, image_size: int, dim: int) -> nn.Module:
    model.arch, model.image_size, model.dim = arch, image_size, dim
    model.stem_kind = stem  # `stem` is a layer of many timm models
    return model


def _refuse_stem(name: str, stem: str, allowed: tuple[str, ...]) -> None:
    if stem not in allowed:
        raise UserError(f"backbone '{name}' has no stem '{stem}': use stem '{allowed[0]}'.")
