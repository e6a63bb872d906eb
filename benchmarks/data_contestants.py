"""The ways from shards to batches that `benchmarks.data` compares, each as an iterator over one epoch.

Every function takes a Case and returns `epoch(number) -> iterator of batches`, one batch being what a training step
takes: uint8 [b, 3, H, W] where the case has no views, else a list of float32 [b, 3, S, S], one a view. Peers are
written as their own documentation would have it: one decode per sample with Pillow, two worker processes.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import v2

from isd_ray.data.index import read_index
from isd_ray.data.stream import Stream

# Processes that read and decode, for all contestants alike; forked, which starts them fastest.
WORKERS: dict[str, Any] = {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": "fork"}
EACH = 512  # images of a task that only decodes
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Epoch = Callable[[int], Iterator[Any]]


@dataclass(frozen=True)
class Case:
    """One data set: folder with train/ (shards and index) and files/; views: names, none for whole images."""

    name: str
    folder: str
    batch: int
    size: int
    views: tuple[str, ...] = ()

    @property
    def shards(self) -> list[str]:
        return sorted(str(path) for path in Path(self.folder, "train").glob("*.tar"))


# ---------------------------------------------------------------- ours


def ours(case: Case, cache: str = "none", finish: bool | None = None) -> Epoch:
    """The stream of the training loop. finish: tasks make the views, else this process; None: the loop's default."""
    from isd_ray.data.augment import make_views
    from isd_ray.session import start_ray

    start_ray()
    views = case.views or ("weak",)
    table = read_index(f"{case.folder}/train")
    stream = Stream(
        table,
        seed=0,
        global_batch=case.batch,
        size=case.size,
        views=views,
        cache=cache,
        finish=bool(case.views) if finish is None else finish,
    )

    def epoch(number: int) -> Iterator[Any]:
        for batch in stream.epoch(number):
            yield make_views(batch, views, case.size, MEAN, STD) if case.views else batch.image[:, 0]

    return epoch


def decode_only(case: Case) -> Epoch:
    """Tasks on every core that read as the stream's do and decode; the pixels are dropped."""
    import ray

    from isd_ray.data.blocks import Blocks
    from isd_ray.data.decode import decode
    from isd_ray.data.read import read_bytes
    from isd_ray.session import start_ray

    start_ray()
    blocks = Blocks(read_index(f"{case.folder}/train"))
    rows = np.random.default_rng(0).permutation(blocks.table.num_rows)

    @ray.remote(num_cpus=1)
    def count(start: int, table: Any, rows: np.ndarray) -> int:
        part = read_bytes(blocks.filesystem, blocks.folder, table.take(rows[start : start + EACH]))
        return len([decode(data).width for data in part if isinstance(data, bytes)])

    columns, shared = ray.put(blocks.table.select(["shard", "key", "offset", "size"])), ray.put(rows)

    def epoch(_: int) -> Iterator[Any]:
        waiting = [count.remote(start, columns, shared) for start in range(0, len(rows), EACH)]
        while waiting:
            done, waiting = ray.wait(waiting)
            yield torch.zeros(ray.get(done[0]), 1, 1, 1)

    return epoch


# ---------------------------------------------------------------- peers


def decode_pillow(data: bytes) -> Image.Image:
    """What ImageFolder and webdataset's "pil" do."""
    return Image.open(io.BytesIO(data)).convert("RGB")


class PillowBlur:
    """MoCo v2's Gaussian blur, on a Pillow image: several times as fast as torchvision's convolution."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(0.1, 2.0))))


def strong_view(size: int) -> v2.Compose:
    """MoCo v2's view, sample by sample, as published: on Pillow images, to a normalised tensor at the end."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0)),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([PillowBlur()], p=0.5),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


class Transform:
    """One file's bytes to what the case wants of one sample: a uint8 array, or its views."""

    def __init__(self, case: Case) -> None:
        self.views = [strong_view(case.size) for _ in case.views]

    def __call__(self, data: bytes) -> Any:
        image = decode_pillow(data)
        if self.views:
            return [view(image) for view in self.views]
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


class Files(torch.utils.data.Dataset):
    """A folder of image files by number."""

    def __init__(self, case: Case) -> None:
        self.paths = sorted(str(path) for path in Path(case.folder, "files").iterdir())
        self.transform = Transform(case)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Any:
        return self.transform(Path(self.paths[row]).read_bytes())


def files_loader(case: Case) -> Epoch:
    """torch's DataLoader over a shuffled folder of files."""
    loader = torch.utils.data.DataLoader(Files(case), case.batch, shuffle=True, drop_last=True, **WORKERS)
    return lambda _: iter(loader)


def image_member(sample: dict[str, Any], transform: Transform) -> Any:
    """Transform the one member of a WebDataset sample that is an image."""
    return transform(next(sample[name] for name in ("jpg", "webp", "png") if name in sample))


def webdataset_loader(case: Case) -> Epoch:
    """The webdataset package behind torch's DataLoader: shuffled shards, a buffer of 1,000 samples."""
    import webdataset as wds

    data = (
        wds.WebDataset(case.shards, shardshuffle=len(case.shards), nodesplitter=None, seed=0)
        .shuffle(1000)
        .map(partial(image_member, transform=Transform(case)))
        .batched(case.batch, collation_fn=torch.utils.data.default_collate, partial=False)
    )
    loader = torch.utils.data.DataLoader(data, batch_size=None, **WORKERS)
    return lambda _: iter(loader)


def transform_block(block: dict[str, Any], transform: Transform) -> dict[str, np.ndarray]:
    """Decode and transform one block of Ray Data."""
    member = next(name for name in ("jpg", "webp", "png") if name in block)
    samples = [transform(data) for data in block[member]]
    if isinstance(samples[0], list):
        return {
            f"view{i}": torch.stack(list(views)).numpy() for i, views in enumerate(zip(*samples, strict=True))
        }
    return {"image": torch.stack(samples).numpy()}


def ray_webdataset(case: Case) -> Epoch:
    """Ray Data as documented: read_webdataset (bytes; faster than its own decoder), map_batches, iter_batches."""
    import ray

    from isd_ray.session import start_ray

    start_ray()
    ray.data.DataContext.get_current().enable_progress_bars = False
    data = ray.data.read_webdataset(case.shards, decoder=None)
    data = data.map_batches(partial(transform_block, transform=Transform(case)), batch_size=case.batch)

    def epoch(_: int) -> Iterator[Any]:
        for block in data.iter_batches(batch_size=case.batch, drop_last=True, prefetch_batches=2):
            tensors: list[Tensor] = [torch.from_numpy(array) for array in block.values()]
            yield tensors if case.views else tensors[0]

    return epoch


CONTESTANTS: dict[str, Callable[[Case], Epoch]] = {
    "ours, streamed": ours,
    "ours, views in this process": partial(ours, finish=False),
    "ours, in memory": partial(ours, cache="memory"),
    "ours, decoding alone": decode_only,
    "read_webdataset + map_batches": ray_webdataset,
    "webdataset + DataLoader": webdataset_loader,
    "DataLoader over files": files_loader,
}


def contestants(case: Case) -> list[str]:
    """Return who takes part: only photographs have views, and only images of one size are kept, or counted whole."""
    left_out = {True: ("ours, in memory", "ours, decoding alone"), False: ("ours, views in this process",)}
    return [name for name in CONTESTANTS if name not in left_out[bool(case.views)]]
