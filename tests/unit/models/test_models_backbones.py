import pytest
import timm
import torch
import torchvision
from torch import nn

from isd_ray.errors import UserError
from isd_ray.models.backbones import build_backbone, check_size


@pytest.mark.parametrize(
    ("name", "dim"), [("resnet8", 64), ("resnet20", 64), ("resnet18", 512), ("timm:resnet10t", 512)]
)
def test_features_are_pooled_to_b_x_dim(name, dim):
    backbone = build_backbone(name)
    features = backbone(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, dim)
    assert backbone.dim == dim
    assert backbone.training


@pytest.mark.parametrize(
    (
        "name",
        "layers",
        "parameters",
    ),  # He et al. 2016, table 6: 0.27M and 0.46M with a classifier of 650, option A
    [("resnet8", 8, 75_290), ("resnet14", 14, 172_506), ("resnet20", 20, 269_722), ("resnet32", 32, 464_154)],
)
def test_small_resnets_have_the_size_of_the_paper(name, layers, parameters):
    backbone = build_backbone(name)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in backbone.modules())
    assert convolutions + 1 - 2 == layers  # the classifier; two projections are not counted as layers
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64  # option B
    assert sum(p.numel() for p in backbone.parameters()) + 650 - projections == parameters


def test_small_resnet_starts_he_normal():
    weights = build_backbone("resnet20").layer3[1].conv1.weight
    expected = (2 / (9 * 64)) ** 0.5
    assert weights.std().item() == pytest.approx(expected, rel=0.03)


def test_shortcut_is_projected_where_the_shape_changes():
    first, second = build_backbone("resnet14").layer2
    with torch.no_grad():
        for block in (first, second):
            block.bn2.weight.zero_()
        x = torch.rand(2, 16, 8, 8)
        y = first(x)
        torch.testing.assert_close(y, first.downsample(x).relu())
        torch.testing.assert_close(second(y), y)


def test_stride2_stem_halves_the_resolution():
    maps = []
    net = build_backbone("resnet8", stem="stride2").eval()
    net.layer1.register_forward_hook(lambda _, __, out: maps.append(out.shape))
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 64)
    assert maps == [(2, 16, 16, 16)]


def test_stem_follows_the_image_size():
    assert build_backbone("resnet18", image_size=64).conv1.stride == (1, 1)
    assert isinstance(build_backbone("resnet18", image_size=64).maxpool, nn.Identity)
    assert build_backbone("resnet18", image_size=96).conv1.kernel_size == (7, 7)
    assert build_backbone("resnet18", stem="imagenet").conv1.stride == (2, 2)
    assert build_backbone("resnet18", stem="cifar", image_size=224).conv1.padding == (1, 1)


def test_imagenet_resnet_equals_torchvision():
    ours = build_backbone("resnet18", stem="imagenet").eval()
    reference = torchvision.models.resnet18()
    reference.load_state_dict(ours.state_dict(), strict=False)
    reference.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), reference.eval()(images))


def test_timm_vit_takes_the_image_size():
    backbone = build_backbone("timm:vit_tiny_patch16_224", image_size=32)
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, backbone.dim) == (2, 192)


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224"])
@torch.no_grad()
def test_transformers_take_views_of_other_sizes_and_are_the_same_at_their_own(name):
    ours = build_backbone(name, image_size=64).eval()
    fixed = timm.create_model(name.removeprefix("timm:"), num_classes=0, img_size=64).eval()
    assert ours.state_dict().keys() == fixed.state_dict().keys()
    fixed.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(images), fixed(images))
    for side in (64, 32, 96):
        check_size(ours, side)
        features = ours(torch.randn(2, 3, side, side))
        assert features.shape == (2, ours.dim)
        assert features.isfinite().all()


@pytest.mark.parametrize(
    ("name", "side", "words"),
    [
        ("timm:vit_tiny_patch16_224", 40, r"Input height \(40\) should be divisible by patch size \(16\)"),
        ("timm:mixer_s16_224", 32, r"Input height \(32\) doesn't match model \(64\)"),
        ("timm:levit_128s", 32, "size of tensor"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_size_that_a_backbone_does_not_take_is_one_line(name, side, words, training):
    backbone = build_backbone(name, image_size=64).train(training)
    check_size(backbone, 64)
    with pytest.raises(UserError, match=f"for 64 pixels does not take images of {side}: .*{words}") as error:
        check_size(backbone, side)
    assert str(error.value).isprintable()
    assert backbone.training == training


def test_resnets_take_any_size():
    for name in ("resnet8", "resnet18", "timm:resnet10t"):
        for side in (1, 17, 96):
            check_size(build_backbone(name), side)


def test_timm_dim_is_that_of_the_features_where_a_head_widens_them():
    backbone = build_backbone("timm:mobilenetv3_small_050")
    assert backbone.eval()(torch.randn(1, 3, 32, 32)).shape[1] == backbone.dim
    assert backbone.dim != timm.create_model("mobilenetv3_small_050").num_features


@pytest.mark.parametrize("name", ["convnext_atto", "levit_128s", "edgenext_xx_small"])
def test_timm_models_keep_layers_of_any_name(name):
    """Their first layers are called `stem`."""
    backbone = build_backbone(f"timm:{name}", image_size=64).eval()
    assert isinstance(backbone.stem, nn.Module)
    assert backbone.stem_kind == "own"
    assert backbone(torch.randn(1, 3, 64, 64)).shape == (1, backbone.dim)


def test_probing_leaves_the_running_statistics_alone():
    backbone = build_backbone("timm:resnet10t")
    assert all(m.num_batches_tracked == 0 for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet21"}, r"unknown backbone 'resnet21'\. Did you mean 'resnet"),
        ({"name": "vit_tiny_patch16_224"}, "Did you mean 'timm:vit_tiny_patch16_224'"),
        ({"name": "timm:resnet10tt"}, "Did you mean 'timm:resnet10t'"),
        ({"name": "resnet18", "stem": "cifr"}, "Did you mean 'cifar'"),
        ({"name": "resnet20", "stem": "imagenet"}, "use stem 'auto'"),
        ({"name": "resnet18", "stem": "stride2"}, "use stem 'auto'"),
        ({"name": "timm:resnet18", "stem": "cifar"}, "use stem 'auto'"),
        (
            {"name": "timm:vit_tiny_patch16_224", "image_size": 8},
            r"does not take images of 8 pixels \(--data.image_size\): Input height \(8\) should be divisible",
        ),
    ],
)
def test_mistakes_are_said_in_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        build_backbone(**options)
    assert "\n" not in str(error.value)
