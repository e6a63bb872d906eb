"""Transformers learn from views of several sizes; one that they do not take is said beforehand."""

import pytest
import torch

from isd_ray.config import resolve
from isd_ray.errors import UserError
from isd_ray.interop import export_backbone
from isd_ray.models.backbones import build_backbone
from isd_ray.train.encoder import from_weights
from isd_ray.train.learnable import check_learnable
from isd_ray.train.state import build_state

VIT = {
    "model.backbone": "timm:vit_tiny_patch16_224", "model.stem": "auto", "data.image_size": 64, "queue.size": 8,
}  # fmt: skip
MULTI_CROP = {
    "swav": ["swav_large", "swav_large", "swav_small"],
    "deepcluster_v2": ["swav_large", "swav_large", "swav_small"],
    "dino": ["dino_1", "dino_2", "dino_small", "dino_small"],
}


@pytest.mark.parametrize("name", MULTI_CROP)
def test_a_vit_learns_from_small_views(name):
    views = MULTI_CROP[name]
    options = VIT | {
        "data.image_size": 112,
        "method.name": name,
        "method.views": views,
        "method.prototypes": 8,
    }
    method = build_state(resolve(options), torch.device("cpu"), images=20).method
    sides = [112, 112, *[48] * (len(views) - 2)]
    method.begin_epoch(0)
    method.update_teacher(0.9)
    loss = method([torch.randn(2, 3, side, side) for side in sides], torch.arange(2)).loss
    loss.backward()
    assert loss.isfinite()


def test_a_view_that_is_no_multiple_of_the_patch_is_refused_beforehand():
    options = VIT | {"method.name": "dino", "method.views": MULTI_CROP["dino"]}
    with pytest.raises(UserError, match=r"makes some of 27, which it does not take .*patch size") as e:
        check_learnable(resolve(options))
    assert str(e.value).isprintable()
    check_learnable(resolve(options | {"data.image_size": 112}))


def test_weights_are_tried_on_the_size_that_is_asked_for(tmp_path):
    path = str(tmp_path / "vit.safetensors")
    export_backbone(build_backbone("timm:vit_tiny_patch16_224", image_size=32), path)
    assert from_weights(path, image_size=64).view.size == 64
    with pytest.raises(UserError, match="does not take images of 40: Input height"):
        from_weights(path, image_size=40)
