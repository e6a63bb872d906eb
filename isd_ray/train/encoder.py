"""Embeddings of any image set by any trained backbone: a run's student or teacher, or a file of weights."""

from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import ray
import torch
from torch import nn

from isd_ray import interop, session
from isd_ray.config import merge, validate
from isd_ray.data import files, index
from isd_ray.data.catalog import open_dataset
from isd_ray.data.plan import require_side
from isd_ray.data.shards import write_bad
from isd_ray.errors import UserError
from isd_ray.models.backbones import build_backbone, check_size
from isd_ray.train.cluster import default_threads
from isd_ray.train.embedding import PART_ROWS, CentreView, Compute, embed
from isd_ray.train.folder import RunFolder, load_checkpoint, saved_config
from isd_ray.train.teacher import RUN_PREFIX, below, without_classifier
from isd_ray.weight_files import read_safetensors

COLUMN = "embedding"


class Encoder(NamedTuple):
    """A backbone and the view that it takes."""

    network: nn.Module
    view: CentreView


def from_run(uri: str, network: str = "student", checkpoint: str | None = None) -> Encoder:
    """Load student or teacher of a run, from its newest or the named checkpoint; raises UserError where it has none."""
    folder = RunFolder(uri)
    config = saved_config(folder)
    saved = load_checkpoint(folder, checkpoint)
    if saved is None:
        raise UserError(f"{folder.uri}: no checkpoint yet; train the run first")
    weights = below(saved["method"], RUN_PREFIX[network])
    if not weights:
        raise UserError(f"--network {network}: the run {folder.uri} trained no such network")
    model, data = config.model, config.data
    backbone = build_backbone(model.backbone, model.stem, data.image_size)
    interop.load_weights(backbone, weights, folder.uri)
    return Encoder(backbone, CentreView(data.image_size, tuple(data.mean), tuple(data.std)))


def from_weights(
    path: str,
    backbone: str | None = None,
    stem: str = "auto",
    encoder: str = "",
    image_size: int | None = None,
) -> Encoder:
    """Load a local file of weights: safetensors of `export_backbone`, or any safetensors or .pth of a known backbone.

    backbone, stem: what the file holds, where it does not say. encoder: beginning of the keys, "encoder_q" or
    "encoder_k" in MoCo's and ISD's files, "encoder_q" or "encoder_t" in MSF's. image_size: default the file's, else
    224; without a note in the file images are normalised as for ImageNet. Raises UserError where a key, shape or
    size does not fit.
    """
    if image_size is not None:
        require_side(image_size)
    described = interop.describe(path) if path.endswith(".safetensors") else None
    if described is not None:
        network = build_backbone(described.arch, described.stem, described.image_size)
        size = image_size or described.image_size
        check_size(network, size)
        interop.load_backbone(network, path)
        return Encoder(network, CentreView(size, described.mean, described.std))
    if backbone is None:
        raise UserError(
            f"{path} does not say which backbone it holds: give --backbone (resnet50, timm:NAME, ...)"
        )
    network = build_backbone(backbone, stem, image_size or 224)
    if path.endswith(".safetensors"):
        interop.load_weights(network, without_classifier(read_safetensors(path), network), path)
    else:
        interop.load_encoder(path, network, encoder)
    return Encoder(network, CentreView(image_size or 224, interop.IMAGENET_MEAN, interop.IMAGENET_STD))


def images_of(
    run: str | None, shards: str | None, dataset: str | None, root: str | None, split: str
) -> pa.Table:
    """Return the index of shards, of a split of a data set, or, where neither is given, of the run's own images."""
    if shards is not None:
        return index.read_index(shards)
    if dataset is not None:
        table = getattr(open_dataset(dataset, root=root), split)
    elif run is not None:
        from isd_ray.train.trainer import open_splits

        saved, places = saved_config(RunFolder(run)).model_dump(), {"data.root": root} if root else {}
        table = getattr(open_splits(validate(merge(saved, places))), split)
    else:
        raise UserError("which images? give --shards, the folder of an index, or --dataset and --root")
    if table is None:
        raise UserError(f"--split {split}: this data set has no such split")
    return table


def embed_job(
    *, run: str | None, weights: str | None, shards: str | None, dataset: str | None, out: str, network: str,
    checkpoint: str | None, backbone: str | None, stem: str, encoder: str, image_size: int | None, split: str,
    root: str | None, dtype: str, device: str, workers: int | None, batch_size: int, max_bad: float,
) -> str:  # fmt: skip
    """Fill the folder `out` with shard, key, label and embedding of every image; returns what was done, as a sentence.

    The options are those of jobs/embed.py. Raises UserError for every mistake in them, before Ray starts where it can.
    """
    if session.inside_job() and "://" not in out and not Path(out).is_absolute():
        raise UserError(f"--out {out}: a job's working folder is thrown away; give an absolute path or a URI")
    if batch_size < 1 or (workers or 0) < 0:
        raise UserError(
            f"--batch-size {batch_size}, --workers {workers}: give 1 image or more, 0 actors or more"
        )
    table = images_of(run, shards, dataset, root, split)
    if run is not None:
        chosen = from_run(run, network, checkpoint)
    else:
        chosen = from_weights(str(weights), backbone, stem, encoder, image_size)
    session.start_ray()
    compute = how_to_compute(device, workers, table.num_rows, batch_size)
    bad = embed(
        table, {COLUMN: chosen.network}, chosen.view, out, compute, dtype=dtype, max_bad=max_bad, quiet=False
    )
    write_bad(bad, files.absolute(out))
    left = f"; {len(bad)} broken images are listed in bad_samples.jsonl" if bad else ""
    return f"{table.num_rows - len(bad):,} embeddings of {chosen.network.dim} {dtype} in {out}{left}"


def how_to_compute(device: str, workers: int | None, images: int, batch: int) -> Compute:
    """Return device and actors: one a GPU, or on CPU one a core but one, or this process for a set of one part."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if device == "cuda" and not gpus:
        raise UserError("--device cuda: this cluster has no GPU; use --device cpu")
    device = "cuda" if gpus and device != "cpu" else "cpu"
    if workers is None and device == "cpu":
        workers = 0 if images <= PART_ROWS else default_threads(1)
    workers = gpus if workers is None else workers
    if device == "cuda" and not workers and not torch.cuda.is_available():
        raise UserError("--workers 0: this process has no GPU; leave --workers out, or use --device cpu")
    return Compute(device, workers, batch=batch, threads=default_threads(max(workers, 1)))
