"""Distillation of a frozen teacher: from a run or a file, on the common loop, continued to the same bits."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pretrain import assert_same
from tiny_run import options_of_tiny_run

import isd_ray
from isd_ray.config import resolve
from isd_ray.errors import UserError
from isd_ray.interop import export_backbone
from isd_ray.methods import METHODS
from isd_ray.models.backbones import build_backbone
from isd_ray.train.folder import RunFolder, load_checkpoint
from isd_ray.train.teacher import load_teacher
from isd_ray.train.trainer import evaluate

pytestmark = pytest.mark.usefixtures("ray_session")
FROZEN = [name for name in METHODS if "method.teacher" in METHODS[name].defaults]
HALF = "step-00000005.pt"


@pytest.fixture(scope="module")
def teacher_run(ray_session, tiny_shards, tmp_path_factory) -> str:
    """The folder of a finished run of ISD-plus with two checkpoints."""
    options = options_of_tiny_run(tiny_shards, tmp_path_factory.mktemp("teacher"))
    options |= {"train.epochs": 1, "train.log_every": 5, "model.backbone": "resnet14"}
    return isd_ray.pretrain(options)["folder"]


@pytest.fixture
def options(tiny_options, teacher_run):
    every = {"train.epochs": 1, "train.log_every": 5, "train.keep_checkpoints": 5}
    return tiny_options | every | {"method.name": "compress_2q", "method.teacher": teacher_run}


def load(options):
    return load_teacher(resolve(options))


@pytest.mark.parametrize("name", FROZEN)
def test_a_run_continues_to_the_same_bits_and_is_evaluated(options, name):
    options |= {"method.name": name, "evaluate.protocols": ["knn1", "knn20"]}
    result = isd_ray.pretrain(options | {"name": "whole", "evaluate.enabled": True})
    assert set(result["metrics"]) == {"student", "teacher", "untrained", "pixels"}
    whole, half = (RunFolder(f"{options['output']}/{run}") for run in ("whole", "half"))
    half.write(f"checkpoints/{HALF}", whole.read(f"checkpoints/{HALF}"))
    isd_ray.pretrain(options | {"name": "half"})
    saved, middle = load_checkpoint(whole), load_checkpoint(whole, HALF)
    assert saved["step"] == 10
    assert [n for n in saved["method"] if n.startswith("teacher")] == ["teacher._extra_state"]
    moved = {n.split(".")[0] for n, w in saved["method"].items() if not torch.equal(w, middle["method"][n])}
    assert moved == {"student", "average"} if name == "compress_2q" else {"student"}
    assert saved["queue"]["keys"].shape == (32, 128 if name == "compress_2q" else 64)
    assert_same(saved, load_checkpoint(half))


def test_two_workers_train_and_one_continues(options):
    options |= {"method.name": "seed"}
    isd_ray.pretrain(options | {"name": "two", "train.workers": 2})
    two, one = (RunFolder(f"{options['output']}/{run}") for run in ("two", "one"))
    one.write(f"checkpoints/{HALF}", two.read(f"checkpoints/{HALF}"))
    isd_ray.pretrain(options | {"name": "one"})
    saved = [load_checkpoint(folder) for folder in (one, two)]
    assert torch.equal(saved[0]["queue"]["index"], saved[1]["queue"]["index"])


def test_the_teacher_is_the_network_that_the_run_evaluated(options, teacher_run):
    """The same accuracies as in that run's own evaluation."""
    names = ["knn1", "knn20", "knn200_weighted"]
    plain = {"protocols": names, "baselines": False}
    own = evaluate(teacher_run, None, plain, {})["metrics"]
    small = options | {"evaluate.enabled": True, "evaluate.protocols": names, "evaluate.baselines": False}
    for encoder in ("student", "teacher"):
        run = small | {"name": encoder, "method.teacher_encoder": encoder}
        assert isd_ray.pretrain(run)["metrics"]["teacher"] == own[encoder]


def test_a_run_refuses_another_teacher(options, teacher_run, tmp_path):
    moving = tmp_path / "moving"
    shutil.copytree(teacher_run, moving)
    options |= {"method.teacher": str(moving)}
    isd_ray.pretrain(options)
    run = RunFolder(f"{options['output']}/run")
    run.remove("result.json")
    run.remove("checkpoints/step-00000010.pt")
    (moving / "checkpoints/step-00000010.pt").unlink()
    with pytest.raises(UserError, match=r"method.teacher: .*weights differ") as error:
        isd_ray.pretrain(options)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"weights differ"):
        evaluate(run.uri, None, {"linear": False}, {})
    with pytest.raises(UserError, match=r"method.teacher was .*another --name"):
        isd_ray.pretrain(options | {"method.teacher": teacher_run})


def test_checkpoint_and_exported_backbone_are_the_same_teacher(options, teacher_run):
    of_run = load(options)
    for path in ("checkpoints/step-00000010.pt", "backbone.safetensors"):
        other = load(options | {"method.teacher": f"{teacher_run}/{path}"})
        assert torch.equal(other.fingerprint, of_run.fingerprint), path
    older = load(options | {"method.teacher": f"{teacher_run}/checkpoints/{HALF}"})
    assert not torch.equal(older.fingerprint, of_run.fingerprint)
    average = load(options | {"method.teacher_encoder": "teacher"})
    assert not torch.equal(average.fingerprint, of_run.fingerprint)
    saved = load_checkpoint(RunFolder(teacher_run))["method"]
    for network, prefix in ((of_run, "student."), (average, "teacher.network.")):
        state = network.network.state_dict()
        assert all(torch.equal(value, saved[f"{prefix}backbone.{n}"]) for n, value in state.items())


def with_classifier(backbone, prefix="", **heads):
    """Weights as published: with a classifier, and old ones without batch norm's counts."""
    state = {n: v for n, v in backbone.state_dict().items() if not n.endswith("num_batches_tracked")}
    return {prefix + name: value.clone() for name, value in (state | heads).items()}


@pytest.mark.parametrize(
    ("arch", "stem", "classifier"),
    [
        ("resnet18", "imagenet", "fc"),
        ("resnet18", "cifar", "fc"),
        ("timm:resnet10t", "auto", "fc"),
        ("timm:mobilenetv3_small_050", "auto", "classifier"),
    ],
)
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_weights_from_elsewhere(options, tmp_path, arch, stem, classifier, kind):
    backbone, path = build_backbone(arch, stem=stem), tmp_path / f"weights.{kind}"
    state = with_classifier(backbone, **{f"{classifier}.weight": torch.zeros(9, backbone.dim)})
    save_file(state, path) if kind == "safetensors" else torch.save(state, path)
    teacher = load(options | {"method.teacher": str(path), "method.teacher_backbone": arch})
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(teacher(images), backbone.eval()(images))


@pytest.mark.parametrize("encoder", ["student", "teacher"])
def test_published_checkpoint(options, tmp_path, encoder):
    networks = {
        "student": build_backbone("resnet18", "imagenet"),
        "teacher": build_backbone("resnet18", "imagenet"),
    }
    state = {}
    for name, prefix in (("student", "module.encoder_q."), ("teacher", "module.encoder_k.")):
        state |= with_classifier(networks[name], prefix, **{"fc.0.weight": torch.zeros(3, 512)})
    path = tmp_path / "moco_v2_800ep_pretrain.pth.tar"
    torch.save(
        {"epoch": 800, "arch": "resnet18", "state_dict": state | {"module.queue": torch.zeros(2, 3)}}, path
    )
    own = {"method.teacher_encoder": encoder, "method.teacher_backbone": "resnet18"}
    teacher, images = load(options | {"method.teacher": str(path)} | own), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(teacher(images), networks[encoder].eval()(images))


def files(folder):
    """Files that cannot be a teacher, and one that can."""
    (folder / "bytes.pth").write_bytes(b"no weights")
    (folder / "bytes.safetensors").write_bytes(b"no weights")
    export_backbone(build_backbone("resnet8"), folder / "ours.safetensors")
    save_file(load_file(folder / "ours.safetensors"), folder / "bare.safetensors")
    state = build_backbone("resnet18", "imagenet").state_dict()
    torch.save(state, folder / "resnet18.pth")
    torch.save({n: v * torch.nan for n, v in state.items()}, folder / "nan.pth")
    torch.save(build_backbone("timm:vit_tiny_patch16_224", image_size=224).state_dict(), folder / "vit.pth")
    torch.save({f"encoder_k.{n}": v for n, v in state.items()}, folder / "keys_only.pth")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method.teacher": None}, "--method.name compress_2q learns from a trained network: give --method.teacher"),
        ({"method.teacher": "FOLDER/none.pth"}, "no checkpoint at FOLDER/none.pth"),
        ({"method.teacher": "FOLDER/none.safetensors"}, "no weights at FOLDER/none.safetensors"),
        ({"method.teacher": "FOLDER"}, "--method.teacher FOLDER: no run there"),
        ({"method.teacher": "FOLDER/bytes.pth"}, "bytes.pth cannot be read"),
        ({"method.teacher": "FOLDER/bytes.safetensors"}, "no safetensors file"),
        ({"method.teacher": "FOLDER/resnet18.pth"}, "does not say which backbone"),
        (
            {"method.teacher": "FOLDER/resnet18.pth", "method.teacher_backbone": "resnet50"},
            "resnet18.pth does not match in 188 places: ",
        ),
        (
            {"method.teacher": "FOLDER/vit.pth", "method.teacher_backbone": "timm:vit_tiny_patch16_224"},
            "pos_embed: [1, 197, 192] in the file",
        ),
        (
            {"method.teacher": "FOLDER/resnet18.pth", "method.teacher_backbone": "resnet19"},
            "unknown backbone 'resnet19'. Did you mean 'resnet18'?",
        ),
        ({"method.teacher": "FOLDER/nan.pth", "method.teacher_backbone": "resnet18"}, "not finite"),
        (
            {
                "method.teacher": "FOLDER/resnet18.pth",
                "method.teacher_backbone": "resnet18",
                "method.teacher_encoder": "teacher",
            },
            "has no encoder 'encoder_k'",
        ),
        (
            {"method.teacher": "FOLDER/keys_only.pth", "method.teacher_backbone": "resnet18"},
            "has no encoder 'encoder_q'",
        ),
        ({"method.teacher": "FOLDER/bare.safetensors", "method.teacher_backbone": "resnet8"}, "tell its stem"),
        ({"method.teacher": "FOLDER/ours.safetensors", "method.teacher_encoder": "teacher"}, "holds the student"),
        ({"method.teacher_backbone": "resnet8"}, "holds resnet14"),
        ({"data.mean": [0.5, 0.5, 0.5]}, "trained with --data.mean [0.485, 0.456, 0.406], this run has"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_anything_is_written(options, tmp_path, change, words):
    files(tmp_path)
    change = {n: v.replace("FOLDER", str(tmp_path)) if isinstance(v, str) else v for n, v in change.items()}
    with pytest.raises(UserError) as error:
        isd_ray.pretrain(options | change)
    assert words.replace("FOLDER", str(tmp_path)) in str(error.value)
    assert "\n" not in str(error.value)
    assert not RunFolder(f"{options['output']}/run").exists("config.yaml")


def test_a_teacher_that_takes_no_such_images(options, tmp_path):
    path = tmp_path / "vit.safetensors"
    export_backbone(build_backbone("timm:vit_tiny_patch16_224", image_size=32), path)
    assert load(options | {"method.teacher": str(path), "data.image_size": 32}).dim == 192
    with pytest.raises(UserError, match=r"vit.safetensors: it does not take images of 40 pixels: Input"):
        load(options | {"method.teacher": str(path), "data.image_size": 40})


def test_a_run_that_cannot_be_a_teacher(options, teacher_run, tmp_path):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(teacher_run, unfinished)
    (unfinished / "result.json").unlink()
    with pytest.raises(UserError, match="not finished; name one of its checkpoints"):
        load(options | {"method.teacher": str(unfinished)})
    assert load(options | {"method.teacher": f"{unfinished}/checkpoints/{HALF}"}) is not None
    with pytest.raises(UserError, match=r"no checkpoint 'step-7.pt'; there are: step-00000005.pt"):
        load(options | {"method.teacher": f"{unfinished}/checkpoints/step-7.pt"})
    isd_ray.pretrain(options | {"method.name": "compress_1q"})
    chain = {"method.teacher": f"{options['output']}/run"}
    assert load(options | chain).network.arch == "resnet8"  # a student may teach the next one
    with pytest.raises(UserError, match=r"teacher_encoder teacher: the run .* trained no such network"):
        load(options | chain | {"method.teacher_encoder": "teacher"})


def test_a_relative_teacher_is_saved_with_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = resolve({"method.name": "seed", "method.teacher": "runs/isd"})
    assert config.method.teacher == str(tmp_path / "runs/isd")
    remote = resolve({"method.name": "seed", "method.teacher": "s3://bucket/runs/isd"})
    assert remote.method.teacher == "s3://bucket/runs/isd"
