"""Who comes in which batch: the epoch as a pure function, so that order needs no state and no shuffle buffer.

Four integers (seed, epoch, step, global batch) fix every batch. The number of workers, the cache and the
machine do not enter: ranks take columns of the same plan, and a run resumes at any step by looking at that
row of it.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from isd_ray.errors import UserError

MEMORY_LIMIT = 2 * 2**30  # bytes of decoded images up to which a set of one image size is held in memory
READ_BYTES = 2**20  # a read of about 1 MiB hides the latency of an object store
WINDOW_BYTES = 512 * 2**20  # encoded images that one window of `chunk` global batches may hold
WHOLE_VIEWS = 4  # views of whose pixels an image that travels whole may have as many
WHOLE_PIXELS = 128 * 128  # or so many pixels, whatever the view: a batch of them is small all the same


def plan(shards: np.ndarray, seed: int, epoch: int, global_batch: int, chunk: int = 1) -> np.ndarray:
    """Return the rows of every global batch of an epoch: int64 [steps, global_batch].

    `shards` [N] is the shard of every row, in index order (numbers or codes; only changes matter). Runs of up
    to `chunk` neighbouring rows of one shard are permuted over the set and laid end to end; the stream is cut
    into `global_batch` columns, and each column is permuted within windows of `chunk` steps. So a batch mixes
    far-apart places, and a column reads whole runs in sequence. `chunk=1` is a uniform random permutation.
    Each row comes at most once; the last N mod global_batch rows of the stream are left out, other ones each
    epoch.

    Raises UserError when there are fewer rows than one global batch.
    """
    steps = len(shards) // global_batch
    if steps == 0:
        raise UserError(
            f"The data has {len(shards)} images, fewer than one global batch of {global_batch}: "
            "lower the batch size or use more data."
        )
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch))))
    stream = _stream(np.asarray(shards), chunk, rng)
    columns = stream[: steps * global_batch].reshape(global_batch, steps).T
    return np.ascontiguousarray(columns if chunk == 1 else _mix_windows(columns, chunk, rng))


def _stream(shards: np.ndarray, chunk: int, rng: np.random.Generator) -> np.ndarray:
    """Lay the chunks end to end in random order: a permutation of all rows, [N]."""
    rows = len(shards)
    shard_start = np.flatnonzero(np.r_[True, shards[1:] != shards[:-1]])
    shard_length = np.diff(np.r_[shard_start, rows])
    offset = np.arange(rows) - np.repeat(shard_start, shard_length)  # place of a row in its run of one shard
    start = np.flatnonzero(offset % chunk == 0)
    length = np.diff(np.r_[start, rows])
    order = rng.permutation(len(start))
    start, length = start[order], length[order]
    first = np.repeat(np.cumsum(length) - length, length)  # place in the stream where a row's chunk begins
    return np.repeat(start, length) + np.arange(rows) - first


def _mix_windows(columns: np.ndarray, window: int, rng: np.random.Generator) -> np.ndarray:
    """Permute every column within windows of steps: neighbours in a shard need not follow each other."""
    key = rng.random(columns.shape) + (np.arange(len(columns)) // window)[:, None]
    return np.take_along_axis(columns, np.argsort(key, axis=0), axis=0)


def rank_columns(global_batch: int, rank: int, world: int) -> slice:
    """Return the columns of the plan that `rank` of `world` takes, split as np.array_split does."""
    even, extra = divmod(global_batch, world)
    start = rank * even + min(rank, extra)
    return slice(start, start + even + (rank < extra))


def shard_codes(table: pa.Table) -> np.ndarray:
    """Return the shard of every row as a number, int32 [N]."""
    column = table.column("shard").combine_chunks()
    encoded = column if pa.types.is_dictionary(column.type) else pc.dictionary_encode(column)
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    return encoded.indices.to_numpy(zero_copy_only=False)


def one_size(table: pa.Table) -> tuple[int, int] | None:
    """Return (width, height) when every image of the index has this size, else None."""
    width, height = (pc.min_max(table.column(name)).as_py() for name in ("width", "height"))
    known = width["min"] is not None and height["min"] is not None
    if not known or width["min"] != width["max"] or height["min"] != height["max"] or width["min"] <= 0:
        return None
    return width["min"], height["min"]


def require_side(side: int) -> None:
    """Refuse a view without a pixel."""
    if side < 1:
        raise UserError(f"a view of {side} pixels: --image-size is at least 1")


def whole_size(table: pa.Table, side: int) -> tuple[int, int] | None:
    """Return (width, height) of images that travel whole to where views of `side` pixels are made,
    else None.

    Images do so where all have one size of at most WHOLE_VIEWS times the pixels of a view (or
    WHOLE_PIXELS). All others are cropped where they are read, so that a batch takes the memory of
    its views, whatever the camera.

    Raises UserError for a view without a pixel.
    """
    require_side(side)
    size = one_size(table)
    most = max(WHOLE_VIEWS * side**2, WHOLE_PIXELS)
    return size if size and size[0] * size[1] <= most else None


def fits_memory(table: pa.Table, limit: int = MEMORY_LIMIT) -> bool:
    """Say whether the images have one size and take at most `limit` bytes as uint8."""
    size = one_size(table)
    return size is not None and table.num_rows * size[0] * size[1] * 3 <= limit


def chunk_for(table: pa.Table, global_batch: int) -> int:
    """Choose `chunk` for a table: 1 when it fits in memory, else reads of about 1 MiB.

    Bounded so that a column has at least 8 chunks (mixing) and that `chunk` global batches of encoded images
    stay under 512 MiB (a task holds its part of them). It looks at the table and the global batch only: the
    plan is the same on every machine.
    """
    if fits_memory(table):
        return 1
    mean_size = max(1.0, pc.mean(table.column("size")).as_py())
    bounds = (
        READ_BYTES / mean_size,
        table.num_rows / (8 * global_batch),
        WINDOW_BYTES / (global_batch * mean_size),
    )
    return max(1, int(min(bounds)))
