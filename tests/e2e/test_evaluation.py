"""All protocols on a run of seconds, features that are read again, and embeddings of any image set."""

import importlib.util
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import isd_ray
from isd_ray.data.index import read_index
from isd_ray.ending import run_job
from isd_ray.errors import UserError
from isd_ray.evaluate.table import markdown
from isd_ray.models.backbones import build_backbone
from isd_ray.train import embedding
from isd_ray.train.embedding import read_vectors
from isd_ray.train.encoder import from_run, from_weights
from isd_ray.train.trainer import evaluate

pytestmark = pytest.mark.usefixtures("ray_session")
EVERY = ["knn1", "knn20", "linear", "linear_sdclr", "fewshot5", "labels10", "nmi", "ari",
         "transfer/aircraft", "transfer/caltech101"]  # fmt: skip


def job(*arguments: str) -> int:
    """Call jobs/embed.py as its command line does."""
    path = Path(__file__).parents[2] / "jobs" / "embed.py"
    spec = importlib.util.spec_from_file_location("embed", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return run_job(module.main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def torchvision_root(tmp_path_factory) -> Path:
    """Two sets as torchvision unpacks them, with a few tiny images: Aircraft (with a val split) and Caltech-101."""
    root, generator = tmp_path_factory.mktemp("torchvision"), np.random.default_rng(0)

    def image(path: Path, level: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.clip(generator.normal(level, 30, (12, 15, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path)

    aircraft, variants = root / "fgvc-aircraft-2013b" / "data", ["A-1", "B 2"]
    for split, number in (("train", 6), ("val", 4), ("test", 5)):
        lines = [f"{split}{i:04d} {variants[i % 2]}" for i in range(number)]
        for i, line in enumerate(lines):
            image(aircraft / "images" / f"{line.split()[0]}.jpg", 60 + 120 * (i % 2))
        (aircraft / f"images_variant_{split}.txt").write_text("\n".join(lines) + "\n")
    (aircraft / "variants.txt").write_text("\n".join(variants) + "\n")
    for c, name in enumerate(("accordion", "anchor")):
        for i in range(1, 33 + c):
            image(root / "caltech101" / "101_ObjectCategories" / name / f"image_{i:04d}.jpg", 60 + 120 * c)
    for folder in ("Annotations", "101_ObjectCategories/BACKGROUND_Google"):
        (root / "caltech101" / folder).mkdir()
    return root


@pytest.fixture(scope="module")
def run(tiny_shards, tmp_path_factory) -> str:
    """The folder of a run of one epoch that was not evaluated."""
    from tiny_run import options_of_tiny_run

    folder = tmp_path_factory.mktemp("evaluated")
    isd_ray.pretrain(options_of_tiny_run(tiny_shards, folder) | {"train.epochs": 1})
    return str(folder / "runs" / "run")


def test_every_protocol_on_a_run_and_the_second_time_nothing_is_computed(
    run, torchvision_root, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("ISD_RAY_CACHE", str(tmp_path))
    options = {"protocols": EVERY, "transfer_root": str(torchvision_root), "baselines": True, "enabled": True}
    first = evaluate(run, None, options, {})
    assert set(first["metrics"]) == {"student", "teacher", "untrained", "pixels"}
    for network in ("student", "teacher", "untrained"):
        assert list(first["metrics"][network]) == EVERY
        assert all(0 <= value <= 100 for name, value in first["metrics"][network].items() if name != "ari")
    assert first["metrics"]["pixels"]["transfer/aircraft"] is None
    assert first["metrics"]["student"]["transfer/caltech101"] > 75  # dark and light images
    aircraft, caltech = (first["protocol"][f"transfer/{name}"] for name in ("aircraft", "caltech101"))
    assert (aircraft["train_images"], aircraft["test_images"]) == (6 + 4, 5)
    assert (caltech["train_images"], caltech["test_images"]) == (60, 5)
    assert aircraft["chosen_on"] == "the set's validation split"
    assert "left_out" not in aircraft
    assert "lambda" in first["details"]["student"]["transfer/aircraft"]
    for part in ("10 % labels", "5-shot", "SDCLR", "NMI", "aircraft"):
        assert part in markdown(first)

    def refuse(*_: object) -> None:
        raise AssertionError("features were computed again")

    monkeypatch.setattr(embedding.Embedder, "__call__", refuse)
    second = evaluate(
        run, None, options | {"protocols": ["knn1", "knn7", "transfer/aircraft"], "workers": 2}, {}
    )
    for network in ("student", "teacher"):
        for name in ("knn1", "transfer/aircraft"):
            assert second["metrics"][network][name] == first["metrics"][network][name]
    with pytest.raises(AssertionError, match="computed again"):
        evaluate(run, None, options | {"bank": "train", "protocols": ["knn1"]}, {"image_size": 8})


def test_features_are_thrown_away_where_nobody_wants_them(run):
    before = sorted(Path(run).rglob("*.parquet"))
    result = evaluate(run, None, {"protocols": ["knn1"], "keep_features": False, "baselines": False}, {})
    assert set(result["metrics"]) == {"student", "teacher"}
    assert sorted(Path(run).rglob("*.parquet")) == before


def test_faults_of_protocols_come_before_training_and_all_at_once(tiny_options):
    options = tiny_options | {"evaluate.enabled": True, "evaluate.protocols": ["fewshot41", "labels1", "knn161",
                                                                             "transfer/dtd"]}  # fmt: skip
    with pytest.raises(UserError) as error:
        isd_ray.pretrain(options)
    expected = [
        "transfer/dtd: give --evaluate.transfer_root",
        "fewshot41: class 0 has 40 images",
        "labels1: class 0 has 40 images in the bank, of which 1 % is none",
        "knn161: the bank has 160",
    ]
    for words in expected:
        assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path(options["output"]).exists()
    with pytest.raises(UserError, match=r"transfer/dtd: torchvision:DTD cannot be read under '/nowhere'"):
        isd_ray.pretrain(
            options | {"evaluate.protocols": ["transfer/dtd"], "evaluate.transfer_root": "/nowhere"}
        )


def test_embeddings_of_the_runs_images_and_of_other_shards(run, tiny_shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embedding, "PART_ROWS", 64)
    out = tmp_path / "out"
    assert job("--run", run, "--out", out, "--workers", 0, "--network", "teacher") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"160 embeddings of 64 float32 in {out}"
    assert "160/160 images" in said[-2]
    assert "s left" in said[-2]
    teacher = read_vectors(str(out), "embedding")
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.parquet")}
    (out / "part-000001.parquet").unlink()  # as after a kill
    again = ["--run", run, "--out", out, "--workers", 0, "--network", "teacher"]
    assert job(*again, "--shards", tiny_shards / "train") == 0
    after = {p.name: p.stat().st_mtime_ns for p in out.glob("*.parquet")}
    assert [name for name in sorted(after) if after[name] != before[name]] == ["part-000001.parquet"]
    assert torch.equal(read_vectors(str(out), "embedding"), teacher)
    part = pq.read_table(out / "part-000002.parquet")
    assert part.column_names == ["shard", "key", "label", "embedding"]
    assert part.num_rows == 160 - 128
    assert not torch.allclose(teacher, _embedded(run, "student", tiny_shards))


def _embedded(run: str, network: str, shards: Path) -> torch.Tensor:
    """Features by hand: decode, centre view, forward."""
    encoder = from_run(run, network)
    table = read_index(str(shards / "train"))
    content = (shards / "train" / table["shard"][0].as_py()).read_bytes()
    rows = []
    for shard, offset, size in zip(*(table[n].to_pylist() for n in ("shard", "offset", "size")), strict=True):
        content = (shards / "train" / shard).read_bytes()[offset : offset + size]
        image = torch.from_numpy(np.array(Image.open(io.BytesIO(content)))).permute(2, 0, 1)
        rows.append(encoder.view(image[None]))
    with torch.no_grad():
        return encoder.network.eval()(torch.cat(rows))


def test_embeddings_equal_those_by_hand(run, tiny_shards, tmp_path):
    weights = Path(run, "backbone.safetensors")
    assert (
        job("--weights", weights, "--shards", tiny_shards / "train", "--out", tmp_path / "w", "--workers", 0)
        == 0
    )
    torch.testing.assert_close(
        read_vectors(str(tmp_path / "w"), "embedding"),
        _embedded(run, "student", tiny_shards),
        atol=1e-5,
        rtol=1e-4,
    )


def test_weights_of_published_layouts(tmp_path):
    network = build_backbone("resnet18", "cifar", 32)
    state = {f"encoder_k.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state | {"encoder_k.fc.weight": torch.zeros(2, 512)}}, tmp_path / "moco.pth")
    encoder = from_weights(str(tmp_path / "moco.pth"), "resnet18", "cifar", "encoder_k", 32)
    assert torch.equal(encoder.network.conv1.weight, network.conv1.weight)
    assert encoder.view.size == 32
    with pytest.raises(UserError, match="does not say which backbone"):
        from_weights(str(tmp_path / "moco.pth"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--run", "/nowhere"], "no run there"),
        (["--shards", "/nowhere"], "no index at '/nowhere/index.parquet'"),
        (["--dataset", "cifar11"], "Did you mean 'cifar10'"),
        (["--checkpoint", "step-9.pt"], "no checkpoint 'step-9.pt'; there are: step-000000"),
        (["--device", "cuda"], "no GPU"),
        (["--batch-size", "0"], "give 1 image or more"),
    ],
)
def test_bad_input_of_the_job_is_one_line_and_code_2(run, tmp_path, capsys, change, words):
    if "cuda" in change and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert job("--run", run, "--out", tmp_path / "out", *change) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()
