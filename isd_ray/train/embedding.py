"""Embeddings of a whole image set: computed once, in index order, and kept as parts that survive a kill.

Images are read as in training; on a GPU, or with `workers`, through Ray Data, where a pool of actors follows the
reading operator, each with its own copy of the networks. All networks see an image that was decoded once.
A folder of embeddings holds `part-000000.parquet`, ... (rows [i * PART_ROWS, (i + 1) * PART_ROWS) of the index, less
broken images) and `embeddings.json`, which says what they are of; a part appears when it is whole.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import pyarrow.parquet as pq
import ray
import torch
from torch import Tensor, nn

from isd_ray.data import files
from isd_ray.data.augment import center_view
from isd_ray.data.blocks import BadImages, Block, Blocks
from isd_ray.data.cache import ordered_ranges
from isd_ray.data.dataset import read_through
from isd_ray.data.parallel import Progress
from isd_ray.data.plan import require_side
from isd_ray.data.store import StoredFile
from isd_ray.data.stream import centre_shape, good_images
from isd_ray.ending import broken
from isd_ray.errors import UserError, harmless
from isd_ray.models.frozen import fingerprint
from isd_ray.train.folder import RunFolder, is_count

PART_ROWS = 8192
MANIFEST = "embeddings.json"
OF_IMAGES = ["shard", "key", "label"]  # columns of a part besides those of networks
DTYPES = {"float32": np.float32, "float16": np.float16}


@dataclass(frozen=True)
class CentreView:
    """The view of evaluation: uint8 [b, C, H, W] -> float32 [b, C, size, size].

    Raises UserError for a size below 1.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        require_side(self.size)

    def __call__(self, images: Tensor) -> Tensor:
        return center_view(images, self.size, self.mean, self.std)


@dataclass(frozen=True)
class Compute:
    """Where networks run.

    workers: actors; 0: this process. gpus: of each actor on CUDA. batch: images a forward pass. threads: torch threads
    of a CPU actor.
    """

    device: str = "cpu"
    workers: int = 0
    gpus: float = 1.0
    batch: int = 256
    threads: int = 1


class Embedder:
    """The networks on their device: a block of images in, one column of features a network out."""

    def __init__(self, networks: Mapping[str, nn.Module], view: CentreView, compute: Compute):
        if compute.workers and compute.device == "cpu":
            torch.set_num_threads(compute.threads)
        self.view, self.compute, self.device = view, compute, torch.device(compute.device)
        self.networks = {name: network.to(self.device).eval() for name, network in networks.items()}

    @torch.no_grad()
    def __call__(self, block: Block) -> Block:
        """Replace `image` uint8 [b, 1, C, H, W] by float32 [b, d] of each network; other columns stay."""
        images = good_images(block, np.ones(len(block["row"]), dtype=bool))[:, 0]
        found: dict[str, list[np.ndarray]] = {name: [] for name in self.networks}
        for batch in images.split(self.compute.batch):
            x = self.view(batch.to(self.device)).contiguous(memory_format=torch.channels_last)
            for name, network in self.networks.items():
                found[name].append(network(x).flatten(1).float().cpu().numpy())
        return {"row": block["row"], "reason": block["reason"]} | {
            n: np.concatenate(f) for n, f in found.items()
        }


def embed(
    table: pa.Table,
    networks: Mapping[str, nn.Module],
    view: CentreView,
    uri: str,
    compute: Compute,
    *,
    dtype: str = "float32",
    max_bad: float = 0.01,
    quiet: bool = True,
) -> list[dict[str, Any]]:
    """Fill the folder `uri` with the embeddings of every image of `table`, a column a network; return broken images.

    Parts that are there are kept. Networks that do not run in this process must pickle. Raises UserError where the
    folder holds embeddings of something else, where one is not finite, and past `max_bad`.
    """
    bad = BadImages(table, max_bad)
    claim(uri, describe(table, networks, view, dtype))
    parts = range(math.ceil(table.num_rows / PART_ROWS))
    there = [i for i in parts if files.exists(files.join(uri, part_name(i)))]
    for i in there:
        check_part(files.join(uri, part_name(i)), [*OF_IMAGES, *networks])
    missing = sorted(set(parts) - set(there))
    rows = np.concatenate([np.empty(0, np.int64), *(part_rows(i, table) for i in missing)])
    with Progress("images", len(rows), quiet) as progress:
        blocks = (progress.add(b, _rows_of) for b in _blocks(table, rows, networks, view, compute))
        for part, columns in zip(missing, _by_part(blocks, missing, table), strict=True):
            good = bad.note(columns)
            content = _part(table, {n: c[good] for n, c in columns.items()}, list(networks), dtype)
            files.write_whole(files.join(uri, part_name(part)), partial(pq.write_table, content))
    return bad.entries


def _rows_of(block: Block) -> int:
    return len(block["row"])


def _blocks(
    table: pa.Table, rows: np.ndarray, networks: Mapping[str, nn.Module], view: CentreView, compute: Compute
) -> Iterator[Block]:
    shape = centre_shape(table, view.size)
    ranges = ordered_ranges(len(rows), compute.batch, shape)
    reader = Blocks(table)
    if not compute.workers:
        embedder = Embedder(networks, view, compute)
        yield from map(embedder, reader.read(rows, rows, ranges, compute.batch, shape))
        return
    cuda = compute.device == "cuda"
    shared = ray.put(dict(networks))

    def then(images: ray.data.Dataset) -> ray.data.Dataset:
        return images.map_batches(
            RemoteEmbedder,
            fn_constructor_args=([shared], view, compute),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=min(compute.workers, len(ranges))),
            num_cpus=0,
            num_gpus=compute.gpus if cuda else 0,
        )

    yield from read_through(reader, rows, ranges, compute.batch, shape, then)


class RemoteEmbedder(Embedder):
    """An embedder in an actor of its own, which fetches the networks from the object store."""

    def __init__(self, networks: list[ray.ObjectRef], view: CentreView, compute: Compute):
        super().__init__(ray.get(networks[0]), view, compute)


def _by_part(blocks: Iterator[Block], parts: list[int], table: pa.Table) -> Iterator[Block]:
    """Put blocks of rows in order together to whole parts."""
    waiting: list[Block] = []
    for part in parts:
        size, have = len(part_rows(part, table)), sum(len(b["row"]) for b in waiting)
        while have < size:
            waiting.append(next(blocks))
            have += len(waiting[-1]["row"])
        whole = {name: np.concatenate([b[name] for b in waiting]) for name in waiting[0]}
        yield {name: column[:size] for name, column in whole.items()}
        waiting = [{name: column[size:] for name, column in whole.items()}] if have > size else []


def _part(table: pa.Table, columns: Block, names: list[str], dtype: str) -> pa.Table:
    part = table.select(OF_IMAGES).take(pa.array(columns["row"])).replace_schema_metadata(None)
    for name in names:
        with np.errstate(over="ignore"):
            x = columns[name].astype(DTYPES[dtype])
        _require_finite(columns[name], x, name, dtype)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
        part = part.append_column(name, vectors)
    return part


def _require_finite(computed: np.ndarray, stored: np.ndarray, name: str, dtype: str) -> None:
    broken = int((~np.isfinite(computed).all(axis=1)).sum())
    if broken:
        raise UserError(
            f"{broken} of {len(computed)} embeddings of '{name}' are not finite: the model diverged; use an earlier "
            "checkpoint"
        )
    if not np.isfinite(stored).all():
        raise UserError(
            f"embeddings of '{name}' reach {np.abs(computed).max():.3g}, too much for {dtype}: use float32"
        )


def part_name(part: int) -> str:
    """Return the file name of a part."""
    return f"part-{part:06d}.parquet"


def part_rows(part: int, table: pa.Table) -> np.ndarray:
    """Return the rows of the index that a part is of."""
    return np.arange(part * PART_ROWS, min((part + 1) * PART_ROWS, table.num_rows))


# -- what a folder holds -------------------------------------------------------------------------------------


def describe(
    table: pa.Table, networks: Mapping[str, nn.Module], view: CentreView, dtype: str
) -> dict[str, Any]:
    """Return what embeddings are of: images, networks and view. Equal descriptions mean equal embeddings."""
    return {
        "format": 1,
        "images": table.num_rows,
        "images_sha256": rows_digest(table),
        "networks": {
            name: fingerprint(network).numpy().tobytes().hex() for name, network in networks.items()
        },
        "view": json.loads(json.dumps(asdict(view))),
        "dtype": dtype,
        "part_rows": PART_ROWS,
    }


def rows_digest(table: pa.Table) -> str:
    """Return a hash of the rows of an index, which does not depend on where the shards lie."""
    digest = hashlib.sha256()
    for name in ("shard", "key", "offset", "label"):
        digest.update("\n".join(map(str, table[name].to_pylist())).encode() + b"\0")
    return digest.hexdigest()


def claim(uri: str, description: dict[str, Any]) -> None:
    """Say in the folder what its parts are of; raises UserError where it holds something else, or other files."""
    folder = RunFolder(uri)
    if folder.type() == pa.fs.FileType.File:
        raise UserError(f"'{uri}' is a file: give a folder")
    if folder.exists(MANIFEST):
        there = read_manifest(uri)
        differing = [key for key in description if there.get(key) != description[key]]
        if differing:
            raise UserError(
                f"'{uri}' holds embeddings that differ in {', '.join(differing)}: give another folder or delete it"
            )
    else:
        others = [name for name in folder.names(files=False) if not files.OURS.fullmatch(name)]
        if others:
            raise UserError(
                f"'{uri}' is not empty ({harmless(', '.join(others))}) and holds no embeddings: give another folder"
            )
        files.write_text(files.join(uri, MANIFEST), json.dumps(description, indent=1) + "\n")
    files.remove_stale_parts(uri)


def read_manifest(uri: str) -> dict[str, Any]:
    """Return what a folder says that its parts are of; raises UserError where it does not, or is damaged."""
    place = files.join(uri, MANIFEST)
    try:
        there = json.loads(files.read_bytes(place))
    except (ValueError, RecursionError):
        there = None
    sizes = [there.get(name) for name in ("images", "part_rows")] if isinstance(there, dict) else [None]
    if not all(map(is_count, sizes)) or not sizes[-1]:
        raise UserError(f"'{place}' is damaged: delete that folder, and the same command makes it anew")
    return there


# -- reading -------------------------------------------------------------------------------------------------


def part_uris(uri: str) -> list[str]:
    """Return the parts of a folder of embeddings in order; raises UserError where some are missing."""
    description = read_manifest(uri)
    number = math.ceil(description["images"] / description["part_rows"])
    numbers = (re.fullmatch(r"part-(\d{6,})\.parquet", name) for name in files.list_files(uri, [".parquet"]))
    there = {int(found[1]) for found in numbers if found}
    missing = number - sum(i < number for i in there)
    if missing:
        raise UserError(f"'{uri}' lacks {missing} of {number} parts: compute the embeddings to the end")
    return [files.join(uri, part_name(i)) for i in range(number)]


@contextmanager
def _opened(uri: str) -> Iterator[pq.ParquetFile]:
    """Open a part; what is wrong with it is a UserError that says what to do."""
    filesystem, path = files.open_filesystem(uri)
    try:
        with StoredFile(filesystem, path) as file:
            part = pq.ParquetFile(file)
            if part.metadata.num_rows > PART_ROWS:
                raise ValueError(f"it claims {part.metadata.num_rows} rows, a part has {PART_ROWS} at most")
            yield part
    except (pa.ArrowException, OSError, LookupError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # Arrow's own, of damaged bytes, have none
            raise broken(uri, error) from None
        reason = harmless(str(error) or type(error).__name__, 200)
        raise UserError(
            f"'{uri}' is damaged ({reason}): remove that file, and the same command makes it anew"
        ) from None


def check_part(uri: str, columns: list[str]) -> None:
    """Look at the names of a part's columns, not at its numbers; raises UserError as `read_part` does."""
    with _opened(uri) as part:
        missing = [name for name in columns if name not in part.schema_arrow.names]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")


def read_part(uri: str, columns: list[str]) -> pa.Table:
    """Read columns of one part: `label`, int, and networks; raises UserError where the file is damaged."""
    with _opened(uri) as part:
        table = part.read(columns)
        table.validate(full=True)
        for name in columns:
            _require_type(name, table[name])
    return table


def _require_type(name: str, column: pa.ChunkedArray) -> None:
    """Raise ValueError where a column is not of its kind: labels, or vectors of one length."""
    kind = column.type
    if name == "label":
        good = pa.types.is_integer(kind)
    else:
        good = pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type)
        good = (
            good and kind.list_size > 0 and not column.null_count and not pc.list_flatten(column).null_count
        )
    if not good:
        raise ValueError(f"the column '{name}' is {kind}")


def vectors(column: pa.ChunkedArray) -> Tensor:
    """Return a column of vectors as float32 [n, d]."""
    flat = column.combine_chunks().flatten().to_numpy()
    return torch.from_numpy(flat.astype(np.float32).reshape(len(column), column.type.list_size))


def read_labels(uri: str) -> Tensor:
    """Return the label of every embedded image, int64 [n]; -1 where there is none."""
    parts = [read_part(part, ["label"])["label"].fill_null(-1).to_numpy() for part in part_uris(uri)]
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def read_vectors(uri: str, name: str) -> Tensor:
    """Return the embeddings of one network, float32 [n, d], in index order."""
    parts = [vectors(read_part(part, [name])[name]) for part in part_uris(uri)]
    if len({part.shape[1] for part in parts}) != 1:
        raise UserError(
            f"'{uri}' has no parts, or parts of several widths: delete that folder, and start again"
        )
    return torch.cat(parts)
