"""Published checkpoints come in exactly; backbones go out in the same bytes and load elsewhere."""

import argparse
import json
import os
import pickle
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from isd_ray.errors import UserError
from isd_ray.interop import (
    describe,
    export_backbone,
    load_backbone,
    load_encoder,
    load_isd_checkpoint,
)
from isd_ray.methods import build_method, find_method
from isd_ray.models.backbones import build_backbone
from isd_ray.queue.distributed import DistributedQueue

ROWS = 12


class Published(nn.Module):
    """Modules and buffers of the published scripts, under the names that their files have."""

    def __init__(self, plus: bool, data_parallel: bool, arch: str = "resnet18") -> None:
        super().__init__()
        wrap = nn.DataParallel if data_parallel else (lambda module: module)
        trunks = [torchvision.models.get_model(arch) for _ in range(2)]
        d = trunks[0].fc.in_features
        for trunk in trunks:
            trunk.fc = self.mlp(d, 2 * d, d // 4) if plus else nn.Sequential()
        self.encoder_q, self.encoder_k = map(wrap, trunks)
        self.predict_q = wrap(self.mlp(d // 4, 2 * d, d // 4) if plus else self.mlp(d, d, d, bias=False))
        rows = torch.randn(ROWS, d // 4 if plus else d)
        self.register_buffer("queue", nn.functional.normalize(rows, dim=1 if plus else 0))
        if plus:
            self.register_buffer("labels", torch.arange(ROWS))
        self.register_buffer("queue_ptr", torch.tensor([5]))
        for buffer_name, buffer in self.named_buffers():  # as after some training
            if "running" in buffer_name:
                buffer.add_(torch.rand_like(buffer))

    @staticmethod
    def mlp(a: int, b: int, c: int, bias: bool = True) -> nn.Sequential:
        return nn.Sequential(nn.Linear(a, b, bias=bias), nn.BatchNorm1d(b), nn.ReLU(), nn.Linear(b, c))


def save(tmp_path, model, layout="state_dict", prefix=""):
    state = {prefix + key: value for key, value in model.state_dict().items()}
    path = tmp_path / "ckpt_epoch_200.pth"
    options = argparse.Namespace(arch="resnet18", lr_decay_epochs=[140, 180], temp=0.02)
    torch.save({"opt": options, layout: state, "epoch": 200} if layout else state, path)
    return path


def fresh(name, size=ROWS, arch="resnet18"):
    backbone = build_backbone(arch, stem="imagenet")
    queue = DistributedQueue(size, find_method(name).embedding_dim(backbone.dim))
    return build_method(name, backbone, queue)


@pytest.mark.parametrize(
    ("name", "data_parallel", "layout", "prefix"),
    [
        ("isd", True, "state_dict", ""),  # as the published scripts save
        ("isd_plus", True, "state_dict", ""),
        ("isd_r18", False, "model", "module."),
        ("isd_plus", False, None, "module."),
    ],
)
@torch.no_grad()
def test_published_isd_is_loaded_exactly(tmp_path, name, data_parallel, layout, prefix):
    published = Published(name == "isd_plus", data_parallel).eval()
    method = fresh(name).eval()
    assert load_isd_checkpoint(save(tmp_path, published, layout, prefix), method) == []
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(method.student(images), published.encoder_q(images))
    assert torch.equal(
        method.predictor(method.student(images)), published.predict_q(published.encoder_q(images))
    )
    assert torch.equal(method.teacher(images), published.encoder_k(images))
    state = method.queue.state_dict()
    by_age = [5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4]
    assert torch.equal(state["keys"], published.queue[by_age])
    assert state["label"].tolist() == (by_age if name == "isd_plus" else [-1] * ROWS)
    method.queue.enqueue(torch.zeros(1, method.queue.dim))  # replaces the row under the published pointer
    assert torch.equal(method.queue.state_dict()["keys"][:-1], published.queue[by_age[1:]])


def test_resnet50_plus_is_loaded_exactly(tmp_path):
    published = Published(plus=True, data_parallel=True, arch="resnet50").eval()
    method = fresh("isd_plus", arch="resnet50").eval()
    load_isd_checkpoint(save(tmp_path, published), method)
    images = torch.randn(1, 3, 64, 64)
    assert method.queue.dim == 512
    assert torch.equal(method.student(images), published.encoder_q(images))


def test_what_does_not_match_is_named_and_nothing_changes(tmp_path):
    path = save(tmp_path, Published(plus=True, data_parallel=True))
    method = fresh("isd", size=ROWS + 1)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    with pytest.raises(UserError, match="does not match in") as error:
        load_isd_checkpoint(path, method)
    assert "predictor.0.weight: [1024, 128] in the file, [512, 512] here" in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    unmatched = load_isd_checkpoint(path, method, allow_unmatched=True)
    assert "student.projector.0.weight: only in the file" in unmatched
    assert f"queue: [{ROWS}, 128] in the file, [{ROWS + 1}, 512] here" in unmatched
    assert method.queue.fill == 0
    assert not torch.equal(method.student.backbone.conv1.weight, before["student.backbone.conv1.weight"])


@pytest.mark.parametrize("encoder", ["encoder_q", "encoder_k"])
def test_moco_encoder_is_loaded_without_its_head(tmp_path, encoder):
    moco = nn.Module()
    moco.encoder_q, moco.encoder_k = (torchvision.models.resnet18(num_classes=128) for _ in range(2))
    backbone = build_backbone("resnet18", stem="imagenet")
    load_encoder(save(tmp_path, moco, prefix="module."), backbone, encoder)
    source = getattr(moco, encoder).state_dict()
    assert all(torch.equal(value, source[key]) for key, value in backbone.state_dict().items())


def test_encoder_mistakes(tmp_path):
    path = save(tmp_path, Published(plus=False, data_parallel=True))
    with pytest.raises(
        UserError, match="no encoder 'base_encoder': its keys begin with encoder_k, encoder_q"
    ):
        load_encoder(path, build_backbone("resnet18"), "base_encoder")
    with pytest.raises(UserError, match=r"conv1.weight: \[64, 3, 7, 7\] in the file, \[64, 3, 3, 3\] here"):
        load_encoder(path, build_backbone("resnet18", stem="cifar"))


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    path = tmp_path / "bad.pth"
    path.write_bytes(pickle.dumps({"state_dict": Malicious()}, protocol=2))
    with pytest.raises(UserError, match=r"bad.pth cannot be read"):
        load_encoder(path, build_backbone("resnet18"))
    torch.save({"state_dict": Malicious()}, path)
    with pytest.raises(UserError, match=r"bad.pth cannot be read"):
        load_encoder(path, build_backbone("resnet18"))
    for content in (b"", b"no checkpoint", bytes(range(256))):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"bad.pth cannot be read"):
            load_encoder(path, build_backbone("resnet18"))
    with pytest.raises(UserError, match="no checkpoint at"):
        load_encoder(tmp_path / "none.pth", build_backbone("resnet18"))


@pytest.mark.parametrize("create", [torchvision.models.resnet18, lambda: timm.create_model("resnet18")])
@torch.no_grad()
def test_exported_backbone_gives_the_same_features_elsewhere(tmp_path, create):
    ours = build_backbone("resnet18", stem="imagenet").to(memory_format=torch.channels_last)
    ours(torch.randn(4, 3, 64, 64))  # running statistics of its own
    export_backbone(ours, tmp_path / "backbone.safetensors")
    other = create()
    keys = other.load_state_dict(load_file(tmp_path / "backbone.safetensors"), strict=False)
    assert sorted(keys.missing_keys) == ["fc.bias", "fc.weight"]
    assert keys.unexpected_keys == []
    other.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(other.eval()(images), ours.eval()(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "timm:resnet10t", "timm:convnext_atto"])
def test_export_and_load_are_exact_and_say_what_the_file_is(tmp_path, name):
    path = tmp_path / "backbone.safetensors"
    source, target = build_backbone(name), build_backbone(name)
    export_backbone(source, path, mean=(0.5, 0.5, 0.5))
    load_backbone(target, path)
    assert all(torch.equal(value, target.state_dict()[key]) for key, value in source.state_dict().items())
    described = describe(path)
    assert (described.arch, described.mean) == (name, (0.5, 0.5, 0.5))
    again = build_backbone(described.arch, described.stem, described.image_size)
    load_backbone(again, path)
    assert list(tmp_path.iterdir()) == [path]


def test_the_metadata_are_texts_that_anybody_can_read(tmp_path):
    path = tmp_path / "backbone.safetensors"
    export_backbone(build_backbone("timm:resnet10t"), path, mean=(0.5, 0.25, 0.125))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {
            "arch": "timm:resnet10t", "stem": "own", "dim": "512", "image_size": "32", "mean": "[0.5, 0.25, 0.125]",
            "std": "[0.229, 0.224, 0.225]",
        }  # fmt: skip
        assert sorted(file.keys()) == sorted(build_backbone("timm:resnet10t").state_dict())


def test_a_file_of_before_the_header_was_sorted_loads(tmp_path):
    source, target = build_backbone("resnet8"), build_backbone("resnet8")
    text = {"stem": source.stem_kind} | {
        key: str(getattr(source, key)) for key in ("image_size", "arch", "dim")
    }
    save_file(
        source.state_dict(), tmp_path / "old.safetensors", text | {"std": "[1, 1, 1]", "mean": "[0, 0, 0]"}
    )
    load_backbone(target, tmp_path / "old.safetensors")
    assert all(torch.equal(value, target.state_dict()[key]) for key, value in source.state_dict().items())
    assert describe(tmp_path / "old.safetensors") == ("resnet8", "cifar", 32, (0, 0, 0), (1, 1, 1))
    save_file(source.state_dict(), tmp_path / "bare.safetensors")
    assert describe(tmp_path / "bare.safetensors") is None


EXPORT = """
import sys, torch
from isd_ray.interop import export_backbone
from isd_ray.models.backbones import build_backbone
torch.manual_seed(0)
export_backbone(build_backbone("resnet8"), sys.argv[1])
"""


def test_equal_backbones_are_equal_bytes_in_every_process(tmp_path):
    written = []
    for hash_seed in ("0", "1", "2"):  # safetensors alone writes one of 720 orders each time
        path = tmp_path / f"{hash_seed}.safetensors"
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        subprocess.run([sys.executable, "-c", EXPORT, str(path)], check=True, env=environment)
        written.append(path.read_bytes())
    assert len(set(written)) == 1
    length = int.from_bytes(written[0][:8], "little")
    assert length % 8 == 0
    texts = json.loads(written[0][8 : 8 + length])["__metadata__"]
    assert list(texts) == sorted(texts)


def test_load_backbone_fails_loudly(tmp_path):
    path = tmp_path / "backbone.safetensors"
    export_backbone(build_backbone("resnet14"), path)
    with pytest.raises(UserError, match=r"layer1.2.conv1.weight: not in the file"):
        load_backbone(build_backbone("resnet20"), path)
    with pytest.raises(UserError, match="no weights at"):
        load_backbone(build_backbone("resnet20"), tmp_path / "none.safetensors")
    path.write_bytes(b"no header")
    with pytest.raises(UserError, match="no safetensors file"):
        load_backbone(build_backbone("resnet20"), path)
