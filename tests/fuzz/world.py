"""Good input of every kind, small and made once: what the cases damage."""

import io
import json
import shutil
import sys
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image

from isd_ray.config import resolve
from isd_ray.data.shards import make_shards
from isd_ray.models.backbones import build_backbone
from isd_ray.train.trainer import pretrain

SIDE = 8  # pixels
CLASSES = ("ant", "bee", "cat")
IMAGES = {"train": 10, "test": 4}  # of a class
JOBS = Path(__file__).parents[2] / "jobs"


def load_job(name: str) -> ModuleType:
    """Load jobs/NAME.py as a module; its `main` is the job."""
    spec = spec_from_file_location(f"job_{name}", JOBS / f"{name}.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def picture(label: int, number: int, kind: str = "PNG", side: int = SIDE) -> bytes:
    """The file of a small image of noise."""
    pixels = np.random.default_rng([label, number]).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def rows_of(split: str) -> list[dict[str, Any]]:
    """Key, label, name of the class and image of every image."""
    start = 100 * len(split)
    return [
        {"key": f"{name}/{i}", "label": label, "label_name": name, "image": picture(label, start + i)}
        for label, name in enumerate(CLASSES)
        for i in range(IMAGES[split])
    ]


@dataclass
class World:
    """Where the good things lie: images, shards, runs, a sweep, a study, embeddings and weights."""

    root: Path

    @property
    def images(self) -> Path:
        """A folder of class folders."""
        return self.root / "images"

    @property
    def parquet(self) -> Path:
        """A Parquet file of images."""
        return self.root / "train.parquet"

    @property
    def shards(self) -> Path:
        """Folder of train/ and test/, each with two tars and an index."""
        return self.root / "shards"

    @property
    def run(self) -> Path:
        """A finished run that was evaluated on the way."""
        return self.root / "runs" / "run"

    def options(self, shards: Path | None = None, **change: Any) -> dict[str, Any]:
        """Options of a run of a second."""
        return {
            "data.dataset": "shards",
            "data.shards": str(shards or self.shards),
            "data.image_size": SIDE,
            "data.validation": 2,
            "model.backbone": "resnet8",
            "model.stem": "stride2",
            "method.name": "isd_plus",
            "queue.size": 8,
            "train.epochs": 2,
            "train.batch_size": 8,
            "train.threads": 1,
            "train.workers": 0,
            "train.log_every": 1,
            "evaluate.every": 1,
            "evaluate.protocols": ["knn1"],
            "evaluate.baselines": False,
        } | change

    def arguments(self, **change: Any) -> list[str]:
        """The same as a command line."""
        return as_arguments(self.options(**change))

    def command(self, job: str, output: Path | str, name: str = "run") -> list[str]:
        """Return arguments with which a job does its work into a folder, or a name in it."""
        named = [f"--output={output}", f"--name={name}"]
        place = f"{output}/{name}" if name else f"{output}"
        weights, shards = self.root / "weights.safetensors", self.shards / "test"
        return {
            "pretrain": [*self.arguments(**{"evaluate.every": 0}), *named],
            "evaluate": [place, "--protocols", "knn1"],
            "embed": [f"--weights={weights}", f"--shards={shards}", f"--out={place}"],
            "make_shards": [f"--source={self.images}", f"--out={place}"],
            "sweep": [f"--space={self.root / 'space.yaml'}", *named],
            "compare": [f"--study={self.root / 'study.yaml'}", *named],
        }[job]

    def make(self) -> None:
        """Make everything."""
        for row in rows_of("train"):
            place = self.images / f"{row['key']}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(row["image"])
        for split in IMAGES:
            pq.write_table(pa.Table.from_pylist(rows_of(split)), self.root / f"{split}.parquet")
            source = str(self.root / f"{split}.parquet")
            make_shards(source, str(self.shards), split=split, shard_size=15, workers=0)
        self._make_runs()
        self._make_weights()
        self._make_sweep()
        self._make_study()

    def _make_runs(self) -> None:
        pretrain(resolve(self.options(), {"output": str(self.run.parent), "name": "run"}))
        shutil.rmtree(self.run / "tensorboard", ignore_errors=True)

    def _make_weights(self) -> None:
        shutil.copy(self.run / "backbone.safetensors", self.root / "weights.safetensors")
        state = build_backbone("resnet8", "stride2", SIDE).state_dict()
        moco = {f"module.encoder_q.{name}": value for name, value in state.items()}
        torch.save({"state_dict": moco, "epoch": 3, "arch": "resnet8"}, self.root / "weights.pth")
        embed = load_job("embed")
        out = str(self.root / "embeddings")
        embed.main(["--run", str(self.run), "--shards", str(self.shards / "train"), "--out", out])

    def _make_sweep(self) -> None:
        sweep = load_job("sweep")
        (self.root / "space.yaml").write_text(yaml.safe_dump(self.space()))
        given = ["--space", str(self.root / "space.yaml"), "--output", str(self.root / "sweeps")]
        sweep.main([*given, "--name", "sweep"])

    def space(self) -> dict[str, Any]:
        """A search space."""
        own = ("data.validation", "evaluate.every", "train.epochs", "train.threads")
        return {
            "config": {k: v for k, v in self.options().items() if k not in own},
            "space": {
                "method.temperature": {"loguniform": [0.02, 0.5]},
                "train.optimizer": {"choice": ["sgd", "lars"]},
                "train.warmup_epochs": {"uniform": [0.0, 4.0], "when": {"train.optimizer": "lars"}},
            },
            "constraints": ["queue.size <= data.size / 2"],
            "goals": ["student.knn20"],
            "budget": {"trials": 3, "epochs": 2, "seeds": 1},
            "validation": {"per_class": 2, "every": 1},
            "scheduler": {"name": "asha", "grace": 1, "factor": 2},
            "sampler": {"startup": 2},
            "confirm": {"best": 1, "seeds": 1},
            "resources": {"cpus": 1, "concurrent": 1},
        }

    def study(self) -> dict[str, Any]:
        """A study of two cells."""
        own = (
            "data.dataset",
            "data.shards",
            "data.validation",
            "evaluate.every",
            "train.threads",
            "method.name",
        )
        given = {k: v for k, v in self.options().items() if k not in (*own, "evaluate.baselines")}
        return {
            "description": "Two cells",
            "config": given | {"evaluate.linear": False, "train.epochs": 1, "train.keep_checkpoints": 1},
            "methods": {"isd_plus": {}, "moco_v2": {}},
            "data": {"set": {"data.dataset": "shards", "data.shards": str(self.shards)}},
            "imbalances": {"natural": {"scheme": "natural"}},
            "seeds": [0],
            "baseline": "moco_v2",
            "metrics": ["student.knn1"],
            "resources": {"cpus": 1, "concurrent": 1},
            "pictures": {"enabled": False},
        }

    def _make_study(self) -> None:
        content = self.study()
        (self.root / "study.yaml").write_text(yaml.safe_dump(content))
        given = ["--study", str(self.root / "study.yaml"), "--output", str(self.root / "studies")]
        assert load_job("compare").main([*given, "--name", "study"]) == 0


def as_arguments(options: dict[str, Any]) -> list[str]:
    """Return options as words of a command line."""
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in options.items() if v is not None}
    return [f"--{name}={text}" for name, text in texts.items()]
