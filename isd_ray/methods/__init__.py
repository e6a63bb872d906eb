"""Self-supervised methods, one page each, and how to build one by name."""

import inspect
from typing import Any

from torch import nn

from isd_ray.errors import UserError, nearest, shown
from isd_ray.methods.barlow_twins import BarlowTwins
from isd_ray.methods.base import Method, Output
from isd_ray.methods.byol import BYOL, BYOLAsym
from isd_ray.methods.co2 import CO2
from isd_ray.methods.compress import Compress1Q, Compress2Q
from isd_ray.methods.debiased import Debiased
from isd_ray.methods.deepcluster import DeepClusterV2
from isd_ray.methods.dino import DINO
from isd_ray.methods.fnc import FNC
from isd_ray.methods.invprop import InvProp
from isd_ray.methods.isd import ISD, ISDR18, ISDPlus
from isd_ray.methods.moco import MoCoV1, MoCoV2
from isd_ray.methods.msf import MSF
from isd_ray.methods.nnclr import NNCLR
from isd_ray.methods.npid import NPID
from isd_ray.methods.pirl import PIRL
from isd_ray.methods.ressl import ReSSL
from isd_ray.methods.sce import SCE
from isd_ray.methods.seed import SEED
from isd_ray.methods.simclr import SimCLR
from isd_ray.methods.simsiam import SimSiam
from isd_ray.methods.swav import SwAV
from isd_ray.methods.vicreg import VICReg

METHODS: dict[str, type[Method]] = {
    "isd": ISD,
    "isd_r18": ISDR18,
    "isd_plus": ISDPlus,
    "npid": NPID,
    "pirl": PIRL,
    "invprop": InvProp,
    "moco_v1": MoCoV1,
    "moco_v2": MoCoV2,
    "simclr": SimCLR,
    "byol": BYOL,
    "byol_asym": BYOLAsym,
    "simsiam": SimSiam,
    "ressl": ReSSL,
    "sce": SCE,
    "co2": CO2,
    "msf": MSF,
    "debiased": Debiased,
    "fnc": FNC,
    "nnclr": NNCLR,
    "barlow_twins": BarlowTwins,
    "vicreg": VICReg,
    "deepcluster_v2": DeepClusterV2,
    "swav": SwAV,
    "dino": DINO,
    "compress_1q": Compress1Q,
    "compress_2q": Compress2Q,
    "seed": SEED,
}

__all__ = ["METHODS", "Method", "Output", "build_method", "find_method", "options_of"]


def find_method(name: str) -> type[Method]:
    """The class of a method; raises UserError with the nearest name for an unknown one."""
    if name not in METHODS:
        hint = nearest(name, METHODS) or f" Known: {', '.join(METHODS)}."
        raise UserError(f"unknown method {shown(name)}.{hint}")
    return METHODS[name]


def build_method(name: str, backbone: nn.Module, memory: Any = None, **options: Any) -> Method:
    """Build a method on a backbone and, where `find_method(name).uses_queue` or `.uses_bank`, on a queue or bank of
    `find_method(name).embedding_dim(backbone.dim)` columns; of a method with the option `teacher` (a
    `models.frozen.Frozen`), `embedding_dim(backbone.dim, teacher.dim)`.

    options: the keyword arguments of its constructor. Raises UserError for one that it does not have.
    """
    method: Any = find_method(name)
    for option in options:
        _refuse_unknown(name, option)
    remembers = method.uses_queue or method.uses_bank
    return method(backbone, memory, **options) if remembers else method(backbone, **options)


def options_of(name: str) -> tuple[str, ...]:
    """Names of the options of a method: the keyword-only arguments of its constructor."""
    parameters = inspect.signature(find_method(name)).parameters.values()
    return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


def _refuse_unknown(name: str, option: str) -> None:
    known = options_of(name)
    if option in known:
        return
    owners = [other for other in METHODS if option in options_of(other)]
    hint = f" {', '.join(owners)} has it." if owners else nearest(option, known)
    raise UserError(f"method '{name}' has no option '{option}'.{hint}")
