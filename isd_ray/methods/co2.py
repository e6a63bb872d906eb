"""MoCo calls every anchor equally wrong; CO2 adds that query and key must agree on which are more alike.

Wei, Wang, Shen, Yuille: CO2: Consistent Contrast for Unsupervised Visual Representation Learning, ICLR 2021
(arXiv 2010.02217). With P = softmax(A q / temperature_consistency) and Q = softmax(A k /
temperature_consistency) over the anchors alone (the positive takes no part):

    loss = InfoNCE(q, k, A) + weight * (KL(P || Q) + KL(Q || P)) / 2
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from isd_ray.methods.moco import MoCoV2
from isd_ray.queue.losses import co2


class CO2(MoCoV2):
    """MoCo v2 with a consistency term (`co2`).

    temperature_consistency: of P and Q; weight: of their divergence, the paper's alpha. The values are those
    that the paper gives for MoCo v2 (for v1: .04 and 10); the rest is MoCo's.
    """

    defaults: ClassVar[dict[str, Any]] = {
        **{name: value for name, value in MoCoV2.defaults.items() if name != "method.symmetric"},
        "method.temperature_consistency": 0.05,
        "method.weight": 0.3,
    }

    def __init__(
        self,
        backbone: nn.Module,
        queue: Any,
        *,
        temperature: float | None = None,
        temperature_consistency: float | None = None,
        weight: float | None = None,
        views: Sequence[str] | None = None,
        exclude_own: bool = True,
    ) -> None:
        super().__init__(
            backbone, queue, temperature=temperature, symmetric=False, views=views, exclude_own=exclude_own
        )
        self.temperature_consistency: float = self.option("temperature_consistency", temperature_consistency)
        self.weight: float = self.option("weight", weight)

    def loss(self, q: Tensor, k: Tensor, own: Tensor | None) -> Tensor:
        """InfoNCE and the weighted consistency of each row, [b]."""
        consistency = co2(self.queue, q, k, self.temperature_consistency, exclude=own)
        return super().loss(q, k, own) + self.weight * consistency
