"""A teacher that was trained before and learns nothing more: it only answers."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from isd_ray.errors import UserError


class Frozen(nn.Module):
    """A trained backbone, images [b, 3, S, S] -> features [b, dim], in eval mode for good and without gradient.

    It moves to a device with the method that holds it, but is no part of that method's parameters, mode or
    checkpoint. A checkpoint holds a fingerprint of 32 bytes in its place, and loading one that was made with
    another teacher raises UserError.

    network: with the attributes `dim`, `arch` and `stem_kind`, as `build_backbone` makes it.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.dim = int(network.dim)  # type: ignore[arg-type]
        self.fingerprint = fingerprint(network)
        # In a tuple: as a plain attribute it would be a submodule, with parameters, a mode and a state dict.
        self._hidden = (network.eval().requires_grad_(False),)

    @property
    def network(self) -> nn.Module:
        """The backbone itself."""
        return self._hidden[0]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def _apply(self, fn: Any, recurse: bool = True) -> "Frozen":
        self.network._apply(fn, recurse)  # what .to(), .cuda() and .double() of the method around it call
        return super()._apply(fn, recurse)

    def get_extra_state(self) -> Tensor:
        """What stands in a checkpoint: the fingerprint, uint8 [32]."""
        return self.fingerprint

    def set_extra_state(self, state: Tensor) -> None:
        """Compare with the fingerprint in a checkpoint."""
        if not torch.equal(state.cpu(), self.fingerprint):
            raise UserError(
                "--method.teacher: this is not the teacher that the run was started with (its weights differ); "
                "restore it, or choose another --name"
            )


def fingerprint(network: nn.Module) -> Tensor:
    """SHA-256 of the architecture, the names and the bits of all weights, uint8 [32]."""
    digest = hashlib.sha256(f"{network.arch} {network.stem_kind}".encode())
    for name, value in sorted(network.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
