"""A whole run: what it leaves behind, that it can be fed back and continued, and what it refuses."""

import json
import shutil

import pytest
import torch
from torchvision.models import resnet18

import isd_ray
from isd_ray import interop
from isd_ray.config import parse, resolve
from isd_ray.data.index import read_index
from isd_ray.errors import UserError
from isd_ray.models.backbones import build_backbone
from isd_ray.train.folder import RunFolder, load_checkpoint
from isd_ray.train.parts import PARTS
from isd_ray.train.trainer import evaluate

pytestmark = pytest.mark.usefixtures("ray_session")


def checkpoint(options) -> dict:
    return load_checkpoint(RunFolder(f"{options['output']}/{options['name']}"))


def assert_same(a, b, path="") -> None:
    """Compare two checkpoints bit by bit."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    else:
        assert a == b, path


def test_a_run_leaves_everything_and_continues_to_nothing(tiny_options, capsys):
    result = isd_ray.pretrain(tiny_options | {"evaluate.enabled": True})
    folder = RunFolder(f"{tiny_options['output']}/run")
    for name in ("config.yaml", "selection.parquet", "metrics.jsonl", "backbone.safetensors", "result.json"):
        assert folder.exists(name), name
    assert set(result["metrics"]) == {"student", "teacher", "untrained", "pixels"}
    for encoder in result["metrics"]:
        assert set(result["metrics"][encoder]) == {"knn1", "knn20", "knn200_weighted", "linear"}
        assert 0 <= result["metrics"][encoder]["knn20"] <= 100
    assert result["metrics"]["student"]["knn200_weighted"] is None  # 160 images cannot give 200 neighbours
    assert len(result["per_class"]["student"]["knn20"]) == 4
    assert {"protocol", "seconds", "images_per_second", "versions", "config"} <= set(result)
    assert json.loads(folder.read("result.json")) == json.loads(json.dumps(result))
    rows = [json.loads(line) for line in folder.read("metrics.jsonl").splitlines()]
    assert [row["step"] for row in rows] == list(range(2, 31, 2))
    assert {"loss", "lr", "images_per_second", "wait_share", "teacher_entropy", "purity", "own_mass"} <= set(
        rows[-1]
    )
    for row in rows:
        assert sum(row[f"{part}_share"] for part in PARTS) == pytest.approx(1, abs=0.01)
    assert result["time_shares"]["forward"] > 0
    assert result["time_shares"]["queue"] > 0
    assert "of the training time went to" in result["time_note"]
    backbone = build_backbone("resnet8", stem="stride2")
    interop.load_backbone(backbone, f"{folder.path}/backbone.safetensors")
    saved = checkpoint(tiny_options)["method"]
    assert torch.equal(backbone.conv1.weight, saved["student.backbone.conv1.weight"])
    capsys.readouterr()
    assert isd_ray.pretrain(tiny_options | {"evaluate.enabled": True}) == json.loads(json.dumps(result))
    assert "finished" in capsys.readouterr().out


def test_saved_config_repeats_the_run(tiny_options):
    isd_ray.pretrain(tiny_options)
    again = parse(["--config", f"{tiny_options['output']}/run/config.yaml", "--name", "again"])
    isd_ray.pretrain(again)
    assert_same(checkpoint(tiny_options), checkpoint(tiny_options | {"name": "again"}))


def test_every_recipe_trains_and_learns_something_finite(tiny_options):
    for method in ("isd", "isd_r18", "isd_plus"):
        for init in ("empty", "unit", "isd_v1"):
            options = tiny_options | {"method.name": method, "queue.init": init, "name": f"{method}-{init}"}
            isd_ray.pretrain(options | {"train.epochs": 1})
            saved = checkpoint(options)
            assert saved["step"] == 10
            assert saved["queue"]["keys"].shape[0] == 32
            assert (saved["queue"]["index"] >= 0).all()  # random anchors have left


def test_accumulation_and_streaming_keep_the_batches(tiny_options):
    isd_ray.pretrain(tiny_options | {"data.cache": "none", "train.epochs": 1, "name": "stream"})
    isd_ray.pretrain(tiny_options | {"data.cache": "memory", "train.epochs": 1, "name": "memory"})
    streamed, kept = (checkpoint(tiny_options | {"name": name}) for name in ("stream", "memory"))
    assert_same(streamed, kept)
    isd_ray.pretrain(tiny_options | {"train.accumulate": 3, "train.epochs": 1, "name": "parts"})
    assert set(checkpoint(tiny_options | {"name": "parts"})["queue"]["index"].tolist()) == set(
        kept["queue"]["index"].tolist()
    )


def test_evaluate_an_older_checkpoint(tiny_options):
    isd_ray.pretrain(tiny_options)
    folder = RunFolder(f"{tiny_options['output']}/run")
    name = folder.names("checkpoints")[0]
    result = evaluate(folder.uri, name, {"linear": False, "bank": "train"}, {})
    assert result["protocol"]["bank"]["name"] == "train"
    assert set(result["metrics"]["student"]) == {"knn1", "knn20", "knn200_weighted"}
    assert folder.exists(f"evaluation-{name.removesuffix('.pt')}.json")


def test_other_options_under_the_same_name_are_refused(tiny_options):
    isd_ray.pretrain(tiny_options | {"train.epochs": 1})
    with pytest.raises(UserError, match=r"train.lr was .*another --name"):
        isd_ray.pretrain(tiny_options | {"train.epochs": 1, "train.lr": 0.123})


def test_a_loss_that_is_not_finite_stops_the_run_in_one_line(tiny_options):
    with pytest.raises(UserError, match="not finite") as error:
        isd_ray.pretrain(tiny_options | {"train.lr": 1e30})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data.shards": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"data.dataset": "cifar10_lt", "data.shards": None}, "root"),
        ({"model.backbone": "resnet19"}, "resnet18"),
        ({"train.workers": 10_000}, "10000"),
        ({"queue.size": 100_000}, "100000"),
        ({"train.batch_size": 5_000, "queue.size": 32}, "5000"),
        ({"train.accumulate": 9}, "9 parts a step"),
        ({"method.views": ["strong", "wek"]}, "weak"),
        ({"train.device": "cuda"}, "cuda"),
        ({"data.scheme": "exponentail"}, "exponential"),
    ],
)
def test_bad_input_is_one_line(tiny_options, change, words):
    if "cuda" in change.values() and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError) as error:
        isd_ray.pretrain(tiny_options | change)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_images_are_listed_and_skipped_up_to_the_limit(tiny_options, tiny_shards, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_shards, broken)
    rows = read_index(str(broken / "train")).to_pylist()
    for row in (rows[3], rows[77]):
        with open(broken / "train" / row["shard"], "r+b") as tar:
            tar.seek(row["offset"])
            tar.write(b"<html>not an image</html>")
    options = tiny_options | {"data.shards": str(broken), "train.epochs": 1}
    with pytest.raises(UserError, match=r"2 of 160 images are broken.*max_bad"):
        isd_ray.pretrain(options | {"name": "strict"})
    isd_ray.pretrain(options | {"name": "lenient", "data.max_bad": 0.05})
    for name in ("strict", "lenient"):
        lines = RunFolder(f"{options['output']}/{name}").read("bad_samples.jsonl").decode().splitlines()
        assert {json.loads(line)["key"] for line in lines} == {rows[3]["key"], rows[77]["key"]}
    assert checkpoint(options | {"name": "lenient"})["step"] == 10


@pytest.mark.parametrize(
    "change", [{"train.precision": "bfloat16"}, {"train.optimizer": "lars"}, {"train.optimizer": "adamw"}]
)
def test_other_precision_and_optimisers_train(tiny_options, change):
    isd_ray.pretrain(tiny_options | {"train.epochs": 1} | change)
    assert all(torch.isfinite(w.float()).all() for w in checkpoint(tiny_options)["method"].values())


def test_a_queue_beyond_a_quarter_of_the_data_is_announced(tiny_options, capsys):
    isd_ray.pretrain(tiny_options | {"queue.size": 100, "train.epochs": 1})
    assert "larger than a quarter" in capsys.readouterr().out


def test_published_resnet_layout_reaches_torchvision(tiny_options):
    options = tiny_options | {"model.backbone": "resnet18", "model.stem": "imagenet", "train.epochs": 1}
    isd_ray.pretrain(options | {"data.image_size": 32, "train.batch_size": 40})
    net = resnet18()
    from safetensors.torch import load_file

    missing, unexpected = net.load_state_dict(
        load_file(f"{options['output']}/run/backbone.safetensors"), strict=False
    )
    assert unexpected == []
    assert all(name.startswith("fc.") for name in missing)


def test_resolve_names_all_wrong_values_at_once():
    with pytest.raises(UserError) as error:
        resolve({"train.epochs": 0, "queue.size": 0})
    assert "train.epochs" in str(error.value)
    assert "queue.size" in str(error.value)
