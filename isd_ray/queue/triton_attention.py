"""The read of the queue as one GPU kernel: scores never leave the chip, tensor cores do the products.

FlashAttention (Dao 2023) with the anchors as both keys and values, so that every anchor is loaded once for score and
read, and with the anchors split over programs (Flash-Decoding) so that a small batch fills the chip too. Products
take bf16 or fp16 and accumulate in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_DIM = 512  # the float32 sums of 32 rows of this length still fit into a program's registers


@triton.jit
def _kernel(
    x_ptr, keys_ptr, own_ptr, index_ptr, read_ptr, lse_ptr, rows, anchors, per_split,
    DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, EXCLUDE: tl.constexpr,
):  # fmt: skip
    """One program reads the anchors of split `program_id(1)` for ROWS queries."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    d = tl.arange(0, PADDED)
    in_row = row < rows
    inside = in_row[:, None] & (d[None, :] < DIM)
    x = tl.load(x_ptr + row[:, None].to(tl.int64) * DIM + d[None, :], mask=inside, other=0.0)
    x = x.to(keys_ptr.dtype.element_ty)
    own = tl.load(own_ptr + row, mask=in_row, other=-1) if EXCLUDE else row
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, PADDED), tl.float32)
    begin = split * per_split
    end = tl.minimum(begin + per_split, anchors)
    for first in range(begin, end, COLS):
        column = first + tl.arange(0, COLS)
        valid = column < end
        at = column[:, None].to(tl.int64) * DIM + d[None, :]
        part = tl.load(keys_ptr + at, mask=valid[:, None] & (d[None, :] < DIM), other=0.0)
        takes_part = valid[None, :]
        if EXCLUDE:
            index = tl.load(index_ptr + column, mask=valid, other=-1)
            takes_part = takes_part & ((own[:, None] != index[None, :]) | (index[None, :] < 0))
        scores = tl.where(takes_part, tl.dot(x, tl.trans(part)) * 1.4426950408889634, float("-inf"))
        new = tl.maximum(top, tl.max(scores, axis=1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        decay = tl.exp2(top - shift)
        weights = tl.exp2(scores - shift[:, None])
        total = total * decay + tl.sum(weights, axis=1)
        sums = tl.dot(weights.to(part.dtype), part, acc=sums * decay[:, None])
        top = new
    empty = total == 0.0
    read = sums / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) / 1.4426950408889634)
    out = split.to(tl.int64) * rows + row
    tl.store(read_ptr + out[:, None] * DIM + d[None, :], read, mask=inside)
    tl.store(lse_ptr + out, lse, mask=in_row)


def supports(x: Tensor, keys: Tensor) -> bool:
    """Whether the kernel can take these queries and anchors."""
    return x.is_cuda and keys.dtype in (torch.bfloat16, torch.float16) and keys.shape[1] <= MAX_DIM


def attend_splits(
    x: Tensor, keys: Tensor, own: Tensor | None, index: Tensor | None, splits: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return partial read [P, M, D] and lse [P, M], float32, of x [M, D] over keys [K, D], to be merged.

    own and index as in `attention.attend`. splits: P; by default twice as many programs as the GPU has processors.
    """
    (rows, dim), anchors = x.shape, len(keys)
    block_rows, block_cols, warps = _blocks(dim)
    row_blocks = triton.cdiv(rows, block_rows)
    wanted = splits or max(1, min(_programs(x.device) // row_blocks, anchors // (8 * block_cols)))
    per_split = triton.cdiv(triton.cdiv(anchors, wanted), block_cols) * block_cols
    parts = triton.cdiv(anchors, per_split)
    read = torch.empty(parts, rows, dim, dtype=torch.float32, device=x.device)
    lse = torch.empty(parts, rows, dtype=torch.float32, device=x.device)
    exclude = own is not None and index is not None
    _kernel[(row_blocks, parts)](
        x.contiguous(), keys, own if exclude else x, index if exclude else x, read, lse, rows, anchors, per_split,
        DIM=dim, PADDED=max(16, triton.next_power_of_2(dim)), ROWS=block_rows, COLS=block_cols, EXCLUDE=exclude,
        num_warps=warps, num_stages=2,
    )  # fmt: skip
    return read, lse


def _blocks(dim: int) -> tuple[int, int, int]:
    """Rows and anchors of a program's tile, and its warps: sums [rows, dim] stay in registers."""
    if dim <= 128:
        return 128, 64, 8
    return (64, 64, 8) if dim <= 256 else (32, 32, 8)


def _programs(device: torch.device) -> int:
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
