"""What a trained network sees, on a few images: nearest neighbours, a map of embeddings, the teacher's anchors.

Made once from a run's checkpoint and kept as arrays beside it, so that a report costs no features.
"""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor

from isd_ray.config import Config
from isd_ray.data.augment import center_view
from isd_ray.data.catalog import Splits
from isd_ray.data.index import labels
from isd_ray.data.stream import ordered
from isd_ray.errors import UserError
from isd_ray.evaluate.features import extract
from isd_ray.evaluate.knn import neighbours
from isd_ray.methods.base import Method, StudentTeacher
from isd_ray.study.spec import Pictures
from isd_ray.train.evaluation import choose_bank
from isd_ray.train.folder import RunFolder, load_checkpoint, read_table
from isd_ray.train.state import build_state

FILE = "pictures.npz"
LARGEST = 64  # pixels of a side that are kept
Arrays = dict[str, np.ndarray]
FORMS = {  # kinds of numbers, and axes: queries, neighbours, colours, sides, points
    "query_image": ("u", "qcss"), "query_label": ("iu", "q"), "near_image": ("u", "qkcss"),
    "near_label": ("iu", "qk"), "near_similarity": ("f", "qk"), "map_place": ("f", "n2"),
    "map_label": ("iu", "n"),
}  # fmt: skip
ANCHOR_FORMS = {
    "anchor_image": ("u", "qacss"), "anchor_label": ("iu", "qa"), "anchor_probability": ("f", "qa"),
    "anchor_temperature": ("f", ""),
}  # fmt: skip


def make_pictures(
    config: Config, folder: RunFolder, splits: Splits, wanted: Pictures, counts: list[int], device: str
) -> None:
    """Write pictures.npz into a run's folder.

    counts [C]: pretraining images of each class, which say what is rare. Images are drawn by a fixed seed: the same for
    all methods on one subset. Holds, with Q queries: query_image uint8 [Q, 3, S, S], query_label [Q], near_image
    [Q, k, 3, S, S], near_label and near_similarity [Q, k], map_place [N, 2], map_label [N], and, for a method whose
    teacher is compared with a queue, anchor_image [Q, k, 3, S, S], anchor_label and anchor_probability [Q, k].
    """
    bank = choose_bank(config, splits)
    if bank is None or splits.test is None:
        raise UserError(f"{folder.uri}: no labelled test set to draw pictures from")
    method, saved = load_trained(config, folder, device)
    test = splits.test
    queries = images_of(test, rarest(labels(test), counts, wanted.queries), config)
    found: Arrays = {"query_image": thumbs(queries[0]), "query_label": queries[1].numpy()}
    found |= nearest_images(method, config, bank, queries[0], wanted, device)
    found |= map_of(method, config, test, wanted, device)
    if isinstance(method, StudentTeacher) and saved["queue"] is not None:
        selection = read_table(folder, "selection.parquet")
        found |= top_anchors(method, config, saved["queue"], selection, queries[0], wanted.anchors, device)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, wanted=np.array(wanted.model_dump_json()), **found)  # type: ignore[arg-type]
    folder.write(FILE, buffer.getvalue())


def read_pictures(folder: RunFolder, wanted: Pictures, classes: int) -> Arrays | None:
    """Return the arrays of a run over so many classes.

    None where there are none, others than are wanted now, or damaged ones: all are made anew.
    """
    if not folder.exists(FILE):
        return None
    content = io.BytesIO(folder.read(FILE))
    try:
        with np.load(content, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception:  # numpy and zipfile raise nearly anything on damaged bytes
        return None
    known = str(arrays.pop("wanted", None)) == wanted.model_dump_json()
    return arrays if known and _fit_together(arrays, classes) else None


def _fit_together(arrays: Arrays, classes: int) -> bool:
    """Tell whether all arrays are there, as many as there are queries and points, with labels below `classes`."""
    forms = FORMS | (ANCHOR_FORMS if "anchor_image" in arrays else {})
    if not all(name in arrays and arrays[name].dtype.kind in kinds for name, (kinds, _) in forms.items()):
        return False
    sizes = {"c": 3, "2": 2}
    for name, (_, axes) in forms.items():
        shape = arrays[name].shape
        if len(shape) != len(axes) or any(
            sizes.setdefault(axis, size) != size for axis, size in zip(axes, shape, strict=True)
        ):
            return False
    labels = [arrays[name] for name in ("query_label", "map_label")]
    points = [arrays[name] for name in forms if arrays[name].dtype.kind == "f"]
    within = all(((x >= 0) & (x < classes)).all() for x in labels)
    return within and all(np.isfinite(x).all() for x in points)


def load_trained(config: Config, folder: RunFolder, device: str) -> tuple[Method, dict[str, Any]]:
    """Return the method with the weights of the newest checkpoint, in eval mode, and the checkpoint."""
    saved = load_checkpoint(folder)
    if saved is None:
        raise UserError(f"{folder.uri}: no checkpoint to draw pictures from")
    method = build_state(config, torch.device("cpu"), images=1).method
    method.load_state_dict(saved["method"])
    return method.to(device).eval(), saved


def rarest(known: np.ndarray, counts: list[int], queries: int) -> np.ndarray:
    """Return rows, one of each of the rarest classes that were pretrained on and are tested; then a second of each."""
    present = [c for c in np.unique(known) if c >= 0 and counts[c] > 0]
    by_rarity = sorted(present, key=lambda c: (counts[c], c))
    drawn = {c: np.random.default_rng([0, c]).permutation(np.flatnonzero(known == c)) for c in by_rarity}
    rounds = [(i, drawn[c]) for i in range(queries) for c in by_rarity]
    return np.array([rows[i] for i, rows in rounds if i < len(rows)][:queries], np.int64)


def images_of(table: pa.Table, rows: np.ndarray, config: Config) -> tuple[Tensor, Tensor]:
    """Decode rows of an index: uint8 [n, 3, H, W] and labels int64 [n], in their order; broken images are left out."""
    taken = table.take(rows)
    batches = list(ordered(taken, size=config.data.image_size, max_bad=1.0))
    return torch.cat([b.image[:, 0] for b in batches]), torch.cat([b.label for b in batches])


def nearest_images(
    method: Method, config: Config, bank: pa.Table, queries: Tensor, wanted: Pictures, device: str
) -> Arrays:
    """The labelled images nearest to each query by the student's backbone, among a sample of the bank."""
    known = np.flatnonzero(labels(bank) >= 0)
    images, classes = images_of(bank, draw(known, wanted.bank), config)
    student = method.encoders()["student"]
    features, query = (extract(student, x, view(config), device=device) for x in (images, queries))
    similarity, row = neighbours(features, query, min(wanted.neighbours, len(features)))
    return {
        "near_image": thumbs(images[row.flatten()]).reshape(*row.shape, 3, *_sides(images)),
        "near_label": classes[row].numpy(),
        "near_similarity": similarity.numpy(),
    }


def map_of(method: Method, config: Config, test: pa.Table, wanted: Pictures, device: str) -> Arrays:
    """The student's features of a sample of test images, in two dimensions."""
    known = np.flatnonzero(labels(test) >= 0)
    images, classes = images_of(test, draw(known, wanted.sample), config)
    features = extract(method.encoders()["student"], images, view(config), device=device)
    unit = F.normalize(features, dim=1).numpy()
    if wanted.map == "pca":
        place = PCA(2, random_state=0).fit_transform(unit)
    else:
        perplexity = min(30.0, (len(unit) - 1) / 3)
        place = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(unit)
    return {"map_place": place.astype(np.float32), "map_label": classes.numpy()}


@torch.no_grad()
def top_anchors(
    method: StudentTeacher,
    config: Config,
    queue: dict[str, Tensor],
    selection: pa.Table,
    queries: Tensor,
    most: int,
    device: str,
) -> Arrays:
    """The anchors that the teacher finds most alike to each query, and their probabilities at its temperature.

    {} for a method that has no temperature over its queue (mean shift).
    """
    temperature = getattr(method, "temperature_teacher", None) or getattr(method, "temperature", None)
    if temperature is None:
        return {}
    keys = queue["keys"].float().to(device)
    embedded = method.key(view(config)(queries.to(device))).float()
    probability, slot = (embedded @ keys.T / temperature).softmax(dim=1).topk(min(most, len(keys)), dim=1)
    rows = queue["index"][slot.cpu()]  # -1: a random vector from before the first step
    there = np.unique(rows[rows >= 0].numpy())
    images, _ = images_of(selection, there, config)
    if len(images) < len(there):
        raise UserError("an image of an anchor cannot be read any more; did the data set change?")
    side = _sides(images)
    shown = np.full((rows.numel(), 3, *side), 200, np.uint8)  # grey: no image
    known = rows.flatten().numpy() >= 0
    shown[known] = thumbs(images)[np.searchsorted(there, rows.flatten().numpy()[known])]
    return {
        "anchor_image": shown.reshape(*rows.shape, 3, *side),
        "anchor_label": queue["label"][slot.cpu()].numpy(),
        "anchor_probability": probability.cpu().numpy(),
        "anchor_temperature": np.array(temperature),
    }


def draw(rows: np.ndarray, most: int) -> np.ndarray:
    """Return at most so many of the rows, in order; always the same ones."""
    return np.sort(np.random.default_rng(0).permutation(rows)[:most])


def view(config: Config) -> Any:
    """Return the centre view of the evaluation: uint8 [b, 3, H, W] -> float [b, 3, S, S]."""
    data = config.data
    return lambda images: center_view(images, data.image_size, data.mean, data.std)


def thumbs(images: Tensor) -> np.ndarray:
    """Return images small enough to keep many of: uint8 [n, 3, S, S] with S of at most 64."""
    side = _sides(images)
    if tuple(images.shape[-2:]) == side:
        return images.numpy()
    small = F.interpolate(images.float(), side, mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8).numpy()


def _sides(images: Tensor) -> tuple[int, int]:
    side = min(LARGEST, *images.shape[-2:])
    return side, side
