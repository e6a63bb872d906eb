"""The bank: a row for every image of the training set, dealt over the ranks by sample index.

A queue forgets; methods that contrast images with all images (NPID, PIRL, invariance propagation) or cluster them
(DeepCluster) need the last embedding of each. Image i lives on rank i % W in slot i // W, so that every rank knows
where a row is and holds N / W of them, and a bank saved by any number of ranks is dealt out to any other.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from isd_ray.errors import UserError
from isd_ray.queue import attention
from isd_ray.queue.exchange import broadcast_rows, gather_numbers, gather_rows, return_rows

BLOCK = 1 << 16  # rows that are drawn at a time
Attended = tuple[Tensor, Tensor]


class Bank:
    """`size` embeddings of `dim` numbers and as many rows of `ids` integers, one each for every image.

    Embeddings start uniform in +-1/sqrt(dim/3), about on the unit sphere (NPID, Wu et al. 2018), the same for any
    number of ranks; ids start at -1. group, dtype, device: as of DistributedQueue. Every method is collective: all
    ranks call it, in the same order. It is no nn.Module, so DistributedDataParallel leaves it alone.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        ids: int = 0,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if size < 1 or dim < 1:
            raise UserError(f"a bank needs at least one row and one column, not {size} x {dim}")
        self.size, self.dim, self.seed, self.group, self.device = size, dim, seed, group, torch.device(device)
        joined = dist.is_available() and dist.is_initialized()
        self.world = dist.get_world_size(group) if joined else 1
        self.rank = dist.get_rank(group) if joined else 0
        self.index = torch.arange(self.rank, size, self.world, device=self.device)  # images of this rank
        self.keys = self._initial(dtype)
        self.ids = torch.full((len(self.index), ids), -1, device=self.device)
        self.written = torch.zeros(len(self.index), dtype=torch.bool, device=self.device)
        self.draws = 0

    def draw(self, n: int) -> Tensor:
        """n images int64 [n], uniform with repetition: the same on all ranks, others at each call."""
        self.draws += 1
        return torch.from_numpy(self._random(self.draws).integers(self.size, size=n)).to(self.device)

    def draw_distinct(self, n: int) -> Tensor:
        """n images int64 [n], no two alike (but for a bank of fewer): the same on all ranks, others at each call."""
        self.draws += 1
        drawn = self._random(self.draws).choice(self.size, n, replace=n > self.size)
        return torch.from_numpy(drawn).to(self.device)

    @torch.no_grad()
    def shared(self, index: Tensor) -> Tensor:
        """Embeddings [n, D] of images int64 [n] that all ranks ask for alike."""
        return self._shared(index, self.keys)

    @torch.no_grad()
    def read(self, index: Tensor) -> Tensor:
        """Embeddings [n, D] of images int64 [n], each rank its own."""
        return self._own(index, self.keys)

    @torch.no_grad()
    def read_ids(self, index: Tensor) -> Tensor:
        """Integers [n, ids] of images int64 [n], each rank its own."""
        return self._own(index, self.ids)

    @torch.no_grad()
    def write(self, index: Tensor, keys: Tensor, ids: Tensor | None = None) -> None:
        """Replace the rows of images int64 [n]: embeddings [n, D] and, where given, integers [n, ids].

        Each rank gives its own images, any number of them. Of an image that is given twice either row stays. Raises
        UserError for embeddings that are not finite, before any row is replaced.
        """
        if not torch.isfinite(keys).all():
            raise UserError(
                f"the embeddings for the bank are not finite (rank {self.rank}); lower --train.lr"
            )
        parts = [index.to(self.device), keys.detach().to(self.keys), *([] if ids is None else [ids])]
        if self.world > 1:
            parts = gather_rows(parts, self._counts(len(index)), self.group)
        mine = parts[0] % self.world == self.rank
        slot = parts[0][mine] // self.world
        self.written[slot] = True
        for store, rows in zip((self.keys, self.ids), parts[1:], strict=False):
            store[slot] = rows[mine]

    @torch.no_grad()
    def mix(self, index: Tensor, keys: Tensor, momentum: float) -> None:
        """Move rows towards keys [n, D], then back to length 1: `n(momentum * row + (1 - momentum) * key)`."""
        rows = self.read(index).lerp(keys.detach().to(self.keys), 1 - momentum)
        self.write(index, torch.nn.functional.normalize(rows, dim=1))

    def lse(
        self, z: Tensor, temperature: float, exclude: Tensor | None = None, floor: Tensor | None = None
    ) -> Tensor:
        """Return log sum_j exp(z.m_j / temperature) [b] over all rows m_j, differentiable in z [b, D].

        exclude int64 [b]: an image whose row takes no part. floor [b]: only rows with z.m_j above it do. -inf where
        none does. The gradient is known in the forward pass; the backward pass communicates nothing.
        """
        return _LogSumExp.apply(z, self, temperature, exclude, floor)

    @torch.no_grad()
    def attend(
        self, z: Tensor, temperature: float, exclude: Tensor | None = None, floor: Tensor | None = None
    ) -> Attended:
        """Softmax-weighted mean row [b, D] and log-sum-exp [b] of z [b, D]; arguments as of `lse`."""
        x = z.detach().to(self.keys) / temperature
        own = torch.full((len(x),), -1, device=self.device) if exclude is None else exclude
        above = x.new_full((len(x),), -torch.inf) if floor is None else floor.to(x) / temperature
        counts = self._counts(len(x))
        if self.world > 1:
            x, own, above = gather_rows([x, own, above], counts, self.group)
        if floor is None:
            read, lse = attention.attend(x, self.keys, own, self.index)
        else:
            read, lse = self._attend_above(x, own, above)
        if self.world > 1:
            reads, lses = return_rows([read, lse], counts, self.group)
            read, lse = attention.merge(reads, lses)
        return read, lse

    @torch.no_grad()
    def nearest(self, z: Tensor, n: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Similarity z.m_j and image int64 [b, min(n, size)] of the rows most similar to z [b, D], best first.

        exclude int64 [b]: as of `lse`; where fewer rows take part, the tail has similarity -inf and image -1.
        """
        x, n, counts = z.detach().to(self.keys), min(n, self.size), self._counts(len(z))
        own = torch.full((len(x),), -1, device=self.device) if exclude is None else exclude
        if self.world > 1:
            x, own = gather_rows([x, own], counts, self.group)
        similarity = x.new_full((len(x), n), -torch.inf)
        image = torch.full((len(x), n), -1, device=self.device)
        stored = min(n, len(self.index))
        if stored:
            similarity[:, :stored], slot = attention.topk(x, self.keys, stored, own, self.index)
            image[:, :stored] = self.index[slot].masked_fill(similarity[:, :stored] == -torch.inf, -1)
        if self.world == 1:
            return similarity, image
        found = [
            part.transpose(0, 1).flatten(1) for part in return_rows([similarity, image], counts, self.group)
        ]
        best, place = found[0].topk(n, dim=1)
        return best, found[1].gather(1, place)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The whole bank in the order of the images, on every rank and on the CPU; the same for any W."""
        columns = {"keys": self.keys, "ids": self.ids, "written": self.written.to(torch.uint8)}
        state = {name: torch.empty(self.size, *c.shape[1:], dtype=c.dtype) for name, c in columns.items()}
        for owner in range(self.world):
            place = slice(owner, None, self.world)
            rows = len(range(owner, self.size, self.world))
            parts = list(columns.values())
            if self.world > 1:
                parts = broadcast_rows(parts, rows, owner, self.group)
            for store, part in zip(state.values(), parts, strict=True):
                store[place] = part.cpu()
        return state | {"draws": torch.tensor(self.draws)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Deal out a bank saved by any number of ranks; raises UserError for one of another shape."""
        shape, wanted = tuple(state["keys"].shape), (self.size, self.dim)
        if shape != wanted or state["ids"].shape[1] != self.ids.shape[1]:
            raise UserError(
                f"the checkpoint's bank is {shape}, the run needs {wanted}: take the run's own data"
            )
        mine = slice(self.rank, None, self.world)
        self.keys.copy_(state["keys"][mine])
        self.ids.copy_(state["ids"][mine])
        self.written.copy_(state["written"][mine])
        self.draws = int(state["draws"])

    def _random(self, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, stream))))

    def _initial(self, dtype: torch.dtype) -> Tensor:
        keys = torch.empty(len(self.index), self.dim, dtype=dtype, device=self.device)
        random, bound, filled = self._random(0), 1 / math.sqrt(self.dim / 3), 0
        for start in range(0, self.size, BLOCK):
            stop = min(start + BLOCK, self.size)
            block = torch.from_numpy(
                random.uniform(-bound, bound, (stop - start, self.dim)).astype(np.float32)
            )
            mine = block[(self.rank - start) % self.world :: self.world]
            keys[filled : filled + len(mine)] = mine.to(keys)
            filled += len(mine)
        return keys

    def _counts(self, rows: int) -> list[int]:
        """Every rank's number of rows."""
        if self.world == 1:
            return [rows]
        return [n for (n,) in gather_numbers([rows], self.device, self.group)]

    def _shared(self, index: Tensor, column: Tensor) -> Tensor:
        index = index.to(self.device)
        if self.world == 1:
            return column[index]
        owner = index % self.world
        order = owner.argsort(stable=True)
        counts = torch.bincount(owner, minlength=self.world).tolist()
        mine = index[owner == self.rank] // self.world
        rows = gather_rows([column[mine]], counts, self.group)[0]
        return torch.empty_like(rows).index_copy_(0, order, rows)

    def _own(self, index: Tensor, column: Tensor) -> Tensor:
        if self.world == 1:
            return self._shared(index, column)
        counts = self._counts(len(index))
        every = gather_rows([index.to(self.device)], counts, self.group)[0]
        return self._shared(every, column).split(counts)[self.rank]

    def _attend_above(self, x: Tensor, own: Tensor, floor: Tensor) -> Attended:
        """This rank's part of `attend` for scaled queries x and floors; holds the scores [b, rows] at once."""
        scores = x @ self.keys.T
        out = (scores <= floor[:, None]) | (own[:, None] == self.index)
        scores = scores.masked_fill(out, -torch.inf)
        lse = scores.logsumexp(dim=1)
        weights = torch.exp(scores - lse.clamp_min(torch.finfo(lse.dtype).min)[:, None])
        return weights @ self.keys, lse


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, bank, temperature, exclude, floor):
        read, lse = bank.attend(z, temperature, exclude, floor)
        ctx.save_for_backward(read.to(z.dtype))
        ctx.temperature = temperature
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (read,) = ctx.saved_tensors
        return grad[:, None] * read / ctx.temperature, None, None, None, None
