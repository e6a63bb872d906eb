"""From rows of the index to pixels in one pass: open shards, read ranges, decode, crop. Ray tasks run this.

It needs no torch (which would cost every reading process seconds to import) unless the views get their colours here
too, and every row gives an output row: a broken image is a row of zeros with a reason, so that batches keep their
places and nothing is lost in silence.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from time import perf_counter

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import fs

from isd_ray.data import views as v
from isd_ray.data.decode import MAX_BYTES, BrokenImage, Picture, Shrink, decode
from isd_ray.data.headers import BLOCK, EXTENDED_BYTES, has_key, stated_size
from isd_ray.data.packed import UnpackedFile, open_shard
from isd_ray.data.plan import WINDOW_BYTES, shard_codes
from isd_ray.data.store import StoredFile
from isd_ray.data.views import View
from isd_ray.errors import printable

GAP = (
    64 * 1024
)  # bytes between two images that are read rather than skipped: less than a second request costs
STAGES = ("read", "decode", "transform")  # what a reading task spends its time on
BEFORE = 4096  # bytes read before an image: its member's header, and long names or records before that
FAR_BEFORE = EXTENDED_BYTES + 4 * BLOCK  # what these may take at most
LOCAL_BYTES = (
    64 * 2**20
)  # encoded images that a task holds; from a store WINDOW_BYTES, for few and large requests
REMOTE_READS = 8  # requests under way in one task when the shards are not local

# A crop keeps at least so many times the pixels of the view on a side where a JPEG is decoded smaller: Pillow's own
# advice for `reducing_gap`, with which the view is hardly to be told from one of the whole image.
REDUCING_GAP = 2

Encoded = bytes | BrokenImage  # of one image, or why there are none
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Shape:
    """What a row looks like on the wire: uint8 [V, 3, size, size].

    size: (height, width); views: crops to make, one a view, with draws from (seed, epoch, position). None:
    the image as it is, which must have this size, or with `center` its centre view (height = width). finished: the
    views also get their colours, so that only normalisation is left for the training device.
    """

    size: tuple[int, int]
    views: tuple[View, ...] | None = None
    seed: int = 0
    epoch: int = 0
    center: bool = False
    finished: bool = False

    @property
    def array(self) -> tuple[int, int, int, int]:
        return (1 if self.views is None else len(self.views), 3, *self.size)


def read_rows(
    filesystem: fs.FileSystem,
    folder: str,
    table: pa.Table,
    rows: np.ndarray,
    position: np.ndarray,
    batch: int,
    shape: Shape,
) -> Iterator[dict[str, np.ndarray]]:
    """Read rows of the index, a bounded number of bytes at once, and yield them decoded and shaped,
    `batch` at a time.

    A block is {image uint8 [b, V, 3, S, S], row [b], position [b], reason [b], seconds float32 [b, 3]};
    `reason` is "" for a good image, a broken one is all zero and says why; `seconds` were spent on the row in
    each of STAGES.
    """
    data = encoded(filesystem, folder, table.take(pa.array(rows)))
    for start in range(0, len(rows), batch):
        part = slice(start, start + batch)
        image, reason, seconds = _decode(islice(data, batch), position[part], shape)
        yield {
            "image": image,
            "row": rows[part],
            "position": position[part],
            "reason": reason,
            "seconds": seconds,
        }


def _decode(
    data: Iterable[tuple[Encoded, float]], position: np.ndarray, shape: Shape
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    number = len(position)
    image = np.zeros((number, *shape.array), dtype=np.uint8)
    reason = np.full(number, "", dtype=object)
    seconds = np.zeros((number, len(STAGES)), dtype=np.float32)
    cutters = _cutters(position, shape)
    for i, (content, reading) in enumerate(data):
        seconds[i, 0], start = reading, perf_counter()
        try:
            if isinstance(content, BrokenImage):
                raise content
            picture = decode(content, _shrink(cutters, i))
            decoded = perf_counter()
            if cutters:
                rgb = Image.fromarray(picture.pixels)
                for cutter, out in zip(cutters, image[i], strict=True):
                    cutter.cut(picture, rgb, i, out)
            else:
                image[i, 0] = _whole(picture, shape).transpose(2, 0, 1)
            seconds[i, 1:] = decoded - start, perf_counter() - decoded
        except BrokenImage as error:
            image[i] = 0
            reason[i] = str(error)
    if shape.finished:
        seconds[:, 2] += _colour(image, position, shape) / max(number, 1)
    return image, reason, seconds


def _colour(image: np.ndarray, position: np.ndarray, shape: Shape) -> float:
    """Give the cropped views [b, V, 3, S, S] their colours, in place; returns the seconds that took."""
    from isd_ray.data.augment import colour_views  # torch

    start = perf_counter()
    assert shape.views is not None
    colour_views(image, shape.views, v.view_draws(shape.seed, shape.epoch, position, len(shape.views)))
    return perf_counter() - start


class Cutter:
    """Makes one view's crops of a batch, from draws at `position` [b]; `side` is the view's, in pixels."""

    def __init__(self, view: View, u: np.ndarray, side: int):
        self.side, self.filter = side, FILTERS[view.interpolation]
        self._share, self._ratio = v.crop_tries(view, u)
        self._mirrored, self._top_left = v.flipped(view, u), u[:, [v.TOP, v.LEFT]].tolist()

    def box(self, i: int, width: int, height: int) -> tuple[int, int, int, int]:
        """Return (top, left, h, w) of the crop of image i of the batch, which has this size [pixels]."""
        top, left = self._top_left[i]
        return v.crop_box(self._share[i], self._ratio[i], top, left, width, height)

    def cut(self, picture: Picture, rgb: Image.Image, i: int, out: np.ndarray) -> None:
        """Write the crop of `picture`, whose pixels are `rgb`, into out uint8 [3, S, S] with S >= side."""
        top, left, h, w = self.box(i, picture.width, picture.height)
        size = (self.side, self.side)
        if rgb.size == (picture.width, picture.height):
            part = rgb.crop((left, top, left + w, top + h)).resize(size, self.filter)
        else:  # decoded at a fraction: the box need not lie on its pixels
            x, y = rgb.width / picture.width, rgb.height / picture.height
            part = rgb.resize(size, self.filter, box=(left * x, top * y, (left + w) * x, (top + h) * y))
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self._mirrored[i] else part
        out[:, : self.side, : self.side] = np.asarray(part).transpose(2, 0, 1)


def _cutters(position: np.ndarray, shape: Shape) -> list[Cutter]:
    """Return what makes the crops of each view; none where images travel whole."""
    if shape.views is None:
        return []
    numbers = v.view_draws(shape.seed, shape.epoch, position, len(shape.views))
    return [Cutter(view, u, view.pixels(shape.size[0])) for view, u in zip(shape.views, numbers, strict=True)]


def _shrink(cutters: list[Cutter], i: int) -> Shrink | None:
    """Return by what factor image i of the batch may be decoded smaller: all its crops keep enough pixels."""
    if not cutters:
        return None

    def factor(width: int, height: int) -> int:
        room = min(min(c.box(i, width, height)[2:]) / c.side for c in cutters)
        return max(f for f in (1, 2, 4, 8) if f == 1 or f * REDUCING_GAP <= room)

    return factor


def _whole(picture: Picture, shape: Shape) -> np.ndarray:
    """Return the image as it is, or its centre view. Raises BrokenImage when its size is not the index's."""
    height, width = shape.size
    if shape.center and (picture.width, picture.height) != (width, height):
        new_width, new_height, left, top = v.center_geometry(picture.width, picture.height, width)
        resized = Image.fromarray(picture.pixels).resize((new_width, new_height), Image.Resampling.BILINEAR)
        return np.asarray(resized.crop((left, top, left + width, top + height)))
    if (picture.width, picture.height) != (width, height):
        raise BrokenImage(f"{picture.width} x {picture.height} pixels, but the index says {width} x {height}")
    return picture.pixels


def encoded(filesystem: fs.FileSystem, folder: str, table: pa.Table) -> Iterator[tuple[Encoded, float]]:
    """Yield every row's image as `read_bytes` gives it, and its share of the seconds that reading
    took.

    However many rows there are, LOCAL_BYTES of them are held, from a store WINDOW_BYTES, or one
    image where that is more.
    """
    local = isinstance(filesystem, fs.LocalFileSystem)
    sizes = table.column("size").to_numpy()
    for part in pieces(sizes, LOCAL_BYTES if local else WINDOW_BYTES):
        start = perf_counter()
        data = read_bytes(filesystem, folder, table.slice(part.start, part.stop - part.start))
        seconds = (perf_counter() - start) / len(data)
        data.reverse()
        while data:
            yield data.pop(), seconds


def pieces(sizes: np.ndarray, most: int) -> Iterator[slice]:
    """Cut rows of these sizes [bytes] into neighbours that have at most `most` bytes, or into
    single rows.
    """
    ends = np.cumsum(np.clip(sizes, 0, MAX_BYTES) + BLOCK)
    start = 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield slice(start, stop)
        start = stop


def read_bytes(filesystem: fs.FileSystem, folder: str, table: pa.Table) -> list[Encoded]:
    """Return the bytes of every row's image, neighbours in a shard read together, all at once.

    A shard that is not there, or a range where no file of this key and size begins, gives a
    BrokenImage instead of bytes. Whether the bytes are those that were indexed only decoding shows:
    an index is made of headers alone, so it holds no checksum of an image. Raises StoreError where
    a remote store does not answer.
    """
    names, shard = table.column("shard").unique().to_pylist(), shard_codes(table)
    offset, size = (table.column(name).to_numpy() for name in ("offset", "size"))
    key = np.array(table.column("key").to_pylist(), dtype=object)
    order = np.lexsort((offset, shard))
    groups = np.split(order, np.flatnonzero(np.diff(shard[order])) + 1)

    def read(group: np.ndarray) -> list[Encoded]:
        path = f"{folder}/{names[shard[group[0]]]}"
        return _read_shard(filesystem, path, key[group], offset[group], size[group])

    data: list[Encoded] = [b""] * table.num_rows
    with ThreadPoolExecutor(1 if isinstance(filesystem, fs.LocalFileSystem) else REMOTE_READS) as pool:
        for group, parts in zip(groups, pool.map(read, groups), strict=True):
            for row, part in zip(group, parts, strict=True):
                data[row] = part
    return data


def _read_shard(
    filesystem: fs.FileSystem, path: str, key: np.ndarray, offset: np.ndarray, size: np.ndarray
) -> list[Encoded]:
    """Return the bytes of ranges of one shard, which are sorted by offset."""
    parts: list[Encoded] = [
        BrokenImage(f"the index names no valid range: offset {a}, size {n}")
        for a, n in zip(offset.tolist(), size.tolist(), strict=True)
    ]
    valid = np.flatnonzero((offset >= BLOCK) & (offset < 2**62) & (size > 0) & (size <= MAX_BYTES))
    far = offset[valid][1:] - (offset + size)[valid][:-1] > GAP
    try:
        with open_shard(filesystem, path) as file:
            for run in np.split(valid, np.flatnonzero(far) + 1):
                for i, part in zip(run, _read_run(file, key[run], offset[run], size[run]), strict=True):
                    parts[i] = part
    except FileNotFoundError:
        return [BrokenImage("the shard is missing")] * len(offset)
    except (OSError, pa.ArrowInvalid) as error:  # the latter: a name that no file can have
        return [BrokenImage(f"the shard cannot be read: {printable(str(error))[:300]}")] * len(offset)
    return parts


def _read_run(
    file: StoredFile | UnpackedFile, key: np.ndarray, offset: np.ndarray, size: np.ndarray
) -> list[Encoded]:
    """Return the bytes of near ranges out of one read; the file may end before they do."""
    if not len(offset):
        return []
    first, stop = int(offset[0]), int((offset + size).max())
    start = max(0, first - BEFORE)
    data = file.read_at(stop - start, start)
    places = zip(key, (offset - start).tolist(), size.tolist(), strict=True)
    parts = [_cut(data, *place) for place in places]
    if start and isinstance(parts[0], OtherFile):  # the headers that name it may lie before what was read
        start = max(0, first - FAR_BEFORE)
        data = file.read_at(first + int(size[0]) - start, start)
        parts[0] = _cut(data, key[0], first - start, int(size[0]))
    return parts


class OtherFile(BrokenImage):
    """Where an image should begin, a file of its size but of another name does."""


def _cut(data: bytes, key: str, at: int, length: int) -> Encoded:
    """Return one image, if the tar's headers before it say that a file of this key and length
    begins here.
    """
    part = data[at : at + length]
    if len(part) < length:
        return BrokenImage(f"the shard ends {length - len(part)} bytes before the image does")
    if stated_size(data[at - BLOCK : at]) != length:
        return BrokenImage(
            f"the index does not fit the shard: no file of {length} bytes begins there; index it again"
        )
    if not has_key(data, at, key):
        return OtherFile(
            "the index does not fit the shard: a file of another name begins there; index it again"
        )
    return part
