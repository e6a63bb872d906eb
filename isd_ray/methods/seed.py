"""A network too small to learn by contrast learns instead what a large one sees: its similarities to past images.

Fang, Wang, Wang, Zhang, Yang, Liu: SEED: Self-Supervised Distillation for Visual Representation, ICLR 2021 (arXiv
2101.04731). The teacher is frozen and both networks see the same view. With embeddings q of the student and k of the
teacher, both of unit length, and anchors A (past k of other images), the image itself counts among the anchors:

    P = softmax([k.k ; A k] / temperature_teacher),  Q = softmax([q.k ; A q] / temperature)
    loss = -sum_j P_j log Q_j
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from isd_ray.methods.base import encoder, width
from isd_ray.methods.compress import Compress1Q
from isd_ray.models.heads import mlp
from isd_ray.queue.losses import seed


class SEED(Compress1Q):
    """SEED: head d -> d -> width of the teacher without batch norm (`seed`).

    The paper's teachers end in their own head of 128 dimensions. Here the teacher is the backbone alone, as in
    CompRess: k are its features, and the student's head ends in their width.

    Published for ImageNet: queue 65 536, own anchors not excluded, lr .03 for batches of 256, 200 epochs. The authors'
    code has a temperature_teacher of 1e-4, next to which only the image itself counts; the default is the paper's .01.
    The defaults keep the views and SGD, and take a queue for small data.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "method.teacher": None,
        "method.teacher_backbone": None,
        "method.teacher_encoder": "student",
        "method.temperature": 0.2,
        "method.temperature_teacher": 0.01,
        "method.views": ["moco_v2"],
        "queue.size": 4096,
        "queue.exclude_own": True,
        "train.lr": 0.03,
        "train.schedule": "cosine",
        "train.weight_decay": 1e-4,
    }

    def build(self, backbone: nn.Module) -> None:
        dim = width(backbone)
        self.student = encoder(backbone, mlp([dim, dim, self.teacher.dim], norm="none"))

    def loss(self, q: Tensor, k: Tensor, own: Tensor | None) -> Tensor:
        """Cross-entropy of each row, [b]."""
        return seed(self.queue, q, k, self.temperature, self.temperature_teacher, exclude=own)
