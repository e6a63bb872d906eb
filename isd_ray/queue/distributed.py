"""The queue of anchors: past teacher embeddings, shared by all ranks, equal to one first-in-first-out list.

Published queues (MoCo, ISD) copy all K anchors to every rank, clone them each step, demand `K % batch == 0`
and are lost when the number of workers changes. Here the queue is the newest K keys of the global stream
(step by step, inside a step in rank order), exactly, whatever the layout, the batch sizes and the number of
ranks:

- `replicated`: every rank holds all K; an enqueue is one all_gather of the keys.
- `sharded`: a rank holds only its own keys among the newest K; an enqueue communicates nothing. A lookup
  begins with one all_gather of a few integers (rows to look up, batch sizes enqueued since the last lookup).
  From the batch sizes every rank knows the place of its keys in the stream, hence which of them have left the
  queue. Then one all_gather brings the queries to all slices and one all_to_all takes the partial results
  home.

With shares of the batch that differ by at most one row a rank stores at most K/W anchors plus one a batch in
the queue plus its newest batch, and a sixteenth of slack; any other unevenness is held too, at the memory
that it takes.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from isd_ray.errors import UserError, nearest
from isd_ray.queue import attention
from isd_ray.queue.exchange import broadcast_rows, gather_numbers, gather_rows, return_rows
from isd_ray.queue.ring import Ring

LAYOUTS = ("replicated", "sharded")
Found = tuple[Tensor, Tensor, Tensor, Tensor]  # similarity, key, index, label
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class DistributedQueue:
    """The newest `size` keys of all ranks, with sample index and label; read as attention, never as a B x K
    matrix.

    >>> queue = DistributedQueue(size=65536, dim=128)
    >>> read, lse = queue.read(k, temperature=0.05)      # softmax-weighted mean anchor and log-sum-exp of k
    >>> queue.enqueue(k, index=index)                    # after the similarities (ISD, MoCo); before them in
    mean shift

    size: anchors K. dim: numbers per anchor D. layout: see the module. group: process group; the default
    group where torch.distributed is initialised, else a single rank. dtype: of the stored anchors; results
    are float64 for a float64 queue, else float32. It is no nn.Module, so DistributedDataParallel leaves it
    alone.

    Every method but `fill` and `labels` is collective: all ranks call it, in the same order and with the same
    temperature. Raises UserError for a size, dimension, layout or dtype that makes no sense.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        layout: str = "replicated",
        group: dist.ProcessGroup | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        _check(size, dim, layout, dtype)
        self.size, self.dim, self.layout, self.group = size, dim, layout, group
        self.dtype, self.device = dtype, torch.device(device)
        self.compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        joined = dist.is_available() and dist.is_initialized()
        self.world = dist.get_world_size(group) if joined else 1
        self.rank = dist.get_rank(group) if joined else 0
        self.sharded = layout == "sharded" and self.world > 1
        self.seen = 0  # keys ever enqueued by all ranks, as far as numbered
        self.begin = 0  # position of the first key that is known of; later than 0 where a state was loaded
        self.steps = 0  # calls of enqueue
        self._ring = self._new_ring()

    @property
    def fill(self) -> int:
        """Anchors in the whole queue, 0 ... size.

        Communicates nothing: the sharded layout counts a batch from the next lookup or state_dict on.
        """
        return min(self.seen - self.begin, self.size)

    @property
    def labels(self) -> Tensor:
        """Labels int64 of the anchors that this rank stores, oldest first; -1 where none was given."""
        return torch.cat([self._ring.label[:0], *(label for _, _, label in self._ring.segments())])

    @torch.no_grad()
    def anchors(self) -> Tensor:
        """All keys [fill, D] of all ranks, in no order; the sharded layout gathers them: for small queues only."""
        if self.sharded:
            self._settle(0)  # what has left the queue goes first
        keys = torch.cat([self._ring.keys[:0], *(keys for keys, _, _ in self._ring.segments())])
        if not self.sharded:
            return keys
        counts = [n for (n,) in gather_numbers([len(keys)], self.device, self.group)]
        return gather_rows([keys], counts, self.group)[0]

    @torch.no_grad()
    def enqueue(self, keys: Tensor, index: Tensor | None = None, label: Tensor | None = None) -> None:
        """Append this rank's keys [n, D], with sample index and label int64 [n] (-1: none); the oldest leave.

        Any n, also 0, another one on every rank, or more than the queue holds (the newest stay). Keys are
        stored as they are: normalise them before. Raises UserError for non-finite keys, before any of them
        enters, naming the step (earlier calls of enqueue) and the rank; in the replicated layout on all ranks, in
        the sharded layout on the rank that has them.
        """
        self._check_rows("keys", keys)
        keys = keys.detach().to(self.device, self.dtype)
        index, label = self._ids("index", index, len(keys)), self._ids("label", label, len(keys))
        counts = [len(keys)]
        if self.world > 1 and not self.sharded:
            counts = [n for (n,) in gather_numbers(counts, self.device, self.group)]
            keys, index, label = gather_rows([keys, index, label], counts, self.group)
        self._refuse_nonfinite(keys, counts)
        self.steps += 1
        if not self.sharded:
            self._ring.drop_before(self.seen + len(keys) - self.size)
        newest = slice(max(len(keys) - self.size, 0), None)
        self._ring.append(keys[newest], index[newest], label[newest], seen=len(keys))
        if not self.sharded:
            self._number([[len(keys)]])

    def lse(self, q: Tensor, temperature: float, exclude: Tensor | None = None) -> Tensor:
        """Return log sum_j exp(q.a_j / temperature) [B], differentiable in q [B, D]; -inf where no anchor
        takes part.

        exclude int64 [B]: the queries' own sample index; anchors that carry it take no part. The gradient is
        `read / temperature`, known in the forward pass: the backward pass communicates nothing.
        """
        return _LogSumExp.apply(q, self, temperature, exclude)

    @torch.no_grad()
    def read(self, k: Tensor, temperature: float, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return sum_j softmax_j(k.a_j / temperature) a_j [B, D] and the log-sum-exp [B]; no gradient.

        A query without any anchor has read 0 and lse -inf.
        """
        return self.attend([k], [temperature], exclude)[0]

    @torch.no_grad()
    def attend(
        self,
        queries: list[Tensor],
        temperatures: list[float],
        exclude: Tensor | None = None,
        along: Tensor | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """`read` of several queries [B, D], each at its own temperature, in one pass over the anchors and one
        exchange.

        With along = v [B, D] a read is [B, 2D]: behind it stands sum_j softmax_j (v.a_j) a_j, which the
        derivative of a read needs.
        """
        for query, temperature in zip(queries, temperatures, strict=True):
            self._check_rows("queries", query)
            _check_temperature(temperature)
        scaled = [
            q.detach().to(self.device, self.compute_dtype) / t
            for q, t in zip(queries, temperatures, strict=True)
        ]
        b, n = len(scaled[0]), len(scaled)
        x = torch.stack(scaled, dim=1)  # [B, n, D]: what belongs to one image travels together
        v = x[:, 0, :0] if along is None else along.detach().to(x)
        own, counts = self._ids("exclude", exclude, b), [b]
        if self.sharded:
            counts = self._settle(b)
            x, v, own = gather_rows([x, v, own], counts, self.group)
        read, lse = self._attend_ring(
            x.flatten(0, 1),
            None if exclude is None else own.repeat_interleave(n),
            None if along is None else v.repeat_interleave(n, dim=0),
        )
        if self.sharded:
            reads, lses = return_rows(
                [read.unflatten(0, (-1, n)), lse.unflatten(0, (-1, n))], counts, self.group
            )
            read, lse = attention.merge(reads.flatten(1, 2), lses.flatten(1, 2))
        read, lse = read.unflatten(0, (b, n)), lse.unflatten(0, (b, n))
        return list(zip(read.unbind(1), lse.unbind(1), strict=True))

    @torch.no_grad()
    def topk(self, x: Tensor, n: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the n anchors most similar to x [B, D]: similarity x.a [B, n], key [B, n, D], index and
        label [B, n].

        Where fewer than n anchors take part, the tail has similarity -inf, key 0, index -1 and label -1.
        """
        self._check_rows("queries", x)
        if n < 1:
            raise UserError(f"topk: n must be at least 1, got {n}")
        x, own = x.detach().to(self.device, self.compute_dtype), self._ids("exclude", exclude, len(x))
        counts = [len(x)]
        if self.sharded:
            counts = self._settle(len(x))
            x, own = gather_rows([x, own], counts, self.group)
        found = self._topk_ring(x, n, None if exclude is None else own)
        if self.sharded:
            returned = return_rows(list(found), counts, self.group)
            found = _best(list(zip(*(part.unbind(0) for part in returned), strict=True)), n)
        return found

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """Return the whole queue in age order, oldest first, on every rank and on the CPU; the same for any
        layout and W.

        keys [fill, D] in the stored type, index and label int64 [fill], seen and steps int64: keys and calls
        ever enqueued. Costs size x D on every rank; the ranks send their slices one after another.
        """
        counts = [self._ring.count]
        if self.sharded:
            self._settle(0)
            counts = [n for (n,) in gather_numbers([self._ring.count], self.device, self.group)]
        state = {
            "keys": torch.empty(self.fill, self.dim, dtype=self.dtype),
            "index": torch.empty(self.fill, dtype=torch.int64),
            "label": torch.empty(self.fill, dtype=torch.int64),
        }
        for owner, rows in enumerate(counts):
            parts = [*self._ring.oldest_first(), self._ring.positions().to(self.device)]
            if self.sharded:
                parts = broadcast_rows(parts, rows, owner, self.group)
            place = parts.pop().cpu() - (self.seen - self.fill)
            for store, part in zip(state.values(), parts, strict=True):
                store[place] = part.cpu()
        return state | {"seen": torch.tensor(self.seen), "steps": torch.tensor(self.steps)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Deal out a queue saved by any number of ranks in any layout and of any size (the newest stay).

        Communicates nothing: every rank is given the whole state. Raises UserError where a part is missing,
        has another shape or holds non-finite keys.
        """
        _check_state(state, self.dim)
        keys = state["keys"][-self.size :]
        self.seen, self.steps = int(state["seen"]), int(state["steps"])
        self.begin = self.seen - len(keys)
        mine = slice(self.rank, None, self.world) if self.sharded else slice(None)
        self._ring = self._new_ring()
        # A replicated ring holds position p in slot p % size. Kept so, a wrapped queue is read in the same two parts
        # as before it was saved, and sums round alike: a run that continues ends in the same bits.
        self._ring.start = self.begin % self._ring.capacity
        rows = [state[name][-self.size :][mine].to(self.device) for name in ("keys", "index", "label")]
        self._ring.append(rows[0].to(self.dtype), rows[1], rows[2], seen=len(rows[0]))
        self._ring.renumber(range(self.begin, self.seen)[mine])

    def _new_ring(self) -> Ring:
        return Ring(
            -(-self.size // self.world) if self.sharded else self.size, self.dim, self.dtype, self.device
        )

    def _settle(self, rows: int) -> list[int]:
        """Exchange sizes and number the batches since the last lookup; return every rank's rows to look up."""
        sizes = gather_numbers([rows, *(seen for seen, _ in self._ring.batches)], self.device, self.group)
        self._number([list(batch) for batch in zip(*(row[1:] for row in sizes), strict=True)])
        return [row[0] for row in sizes]

    def _number(self, batches: list[list[int]]) -> None:
        """Place the waiting batches in the stream, given every rank's rows of each; drop what left the queue."""
        positions = []
        for rows in batches:
            positions.append(self.seen + sum(rows[: self.rank] if self.sharded else []))
            self.seen += sum(rows)
        self._ring.number(positions)
        self._ring.drop_before(self.seen - self.size)

    def _attend_ring(self, x: Tensor, own: Tensor | None, along: Tensor | None) -> tuple[Tensor, Tensor]:
        """Read the anchors of this rank."""
        parts = [attention.attend(x, keys, own, index, along) for keys, index, _ in self._ring.segments()]
        if not parts:
            width = self.dim if along is None else 2 * self.dim
            return x.new_zeros(len(x), width), x.new_full((len(x),), -torch.inf)
        if len(parts) == 1:
            return parts[0]
        reads, lses = zip(*parts, strict=True)
        return attention.merge(torch.stack(reads), torch.stack(lses))

    def _topk_ring(self, x: Tensor, n: int, own: Tensor | None) -> Found:
        """The n best anchors of this rank."""
        parts = [_nothing(x, n, self.dtype)]
        for keys, index, label in self._ring.segments():
            similarity, slot = attention.topk(x, keys, n, own, index)
            missing = similarity == -torch.inf
            parts.append(
                (
                    similarity,
                    keys[slot].masked_fill(missing[..., None], 0),
                    index[slot].masked_fill(missing, -1),
                    label[slot].masked_fill(missing, -1),
                )
            )
        return _best(parts, n)

    def _check_rows(self, what: str, rows: Tensor) -> None:
        if rows.dim() != 2 or rows.shape[1] != self.dim:
            raise UserError(f"queue: {what} must have shape [rows, {self.dim}], got {list(rows.shape)}")

    def _ids(self, name: str, ids: Tensor | None, rows: int) -> Tensor:
        """Return ids as int64 [rows] on the queue's device; -1 everywhere where none are given."""
        if ids is None:
            return torch.full((rows,), -1, dtype=torch.int64, device=self.device)
        if ids.shape != (rows,):
            raise UserError(
                f"queue: {name} must have shape [{rows}], one for each row, got {list(ids.shape)}"
            )
        return ids.to(self.device, torch.int64)

    def _refuse_nonfinite(self, keys: Tensor, counts: list[int]) -> None:
        """Raise for non-finite keys; `counts` are the rows of every rank whose keys are given."""
        if bool(torch.isfinite(keys).all()):
            return
        bad = torch.isfinite(keys).all(dim=1).logical_not().split(counts)
        ranks = [self.rank] if len(counts) == 1 else [r for r, rows in enumerate(bad) if rows.any()]
        rows = sum(int(x.sum()) for x in bad)
        raise UserError(
            f"queue: {rows} of {len(keys)} keys are not finite "
            f"(step {self.steps}, rank {', '.join(map(str, ranks))}): "
            "training has diverged; go back to the last checkpoint and lower the learning rate"
        )


class _LogSumExp(torch.autograd.Function):
    """lse with its gradient, read / temperature."""

    @staticmethod
    def forward(ctx, q, queue, temperature, exclude):
        read, lse = queue.read(q, temperature, exclude)
        ctx.save_for_backward(read.to(q.dtype) / temperature)
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return grad[:, None].to(slope.dtype) * slope, None, None, None


def _best(parts: Sequence[Found], n: int) -> Found:
    """The n most similar of several lists of anchors."""
    joined = [torch.cat(columns, dim=1) for columns in zip(*parts, strict=True)]
    similarity, place = joined[0].topk(n, dim=1)
    rows = torch.arange(len(place), device=place.device)[:, None]
    return similarity, joined[1][rows, place], joined[2][rows, place], joined[3][rows, place]


def _nothing(x: Tensor, n: int, dtype: torch.dtype) -> Found:
    """What a search among no anchors finds."""
    none = torch.full((len(x), n), -1, dtype=torch.int64, device=x.device)
    return (
        x.new_full((len(x), n), -torch.inf),
        x.new_zeros(len(x), n, x.shape[1], dtype=dtype),
        none,
        none.clone(),
    )


def _check(size: int, dim: int, layout: str, dtype: torch.dtype) -> None:
    for name, value in (("size", size), ("dim", dim)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"queue.{name}: must be a whole number of at least 1, got {value!r}")
    if layout not in LAYOUTS:
        raise UserError(
            f"queue.layout: {layout!r} is not one of {', '.join(LAYOUTS)}.{nearest(str(layout), LAYOUTS)}"
        )
    if dtype not in DTYPES:
        raise UserError(f"queue.dtype: {dtype} is not one of {', '.join(map(str, DTYPES))}")


def _check_temperature(temperature: float) -> None:
    if not (isinstance(temperature, int | float) and 0 < temperature < float("inf")):
        raise UserError(f"temperature: must be a positive finite number, got {temperature!r}")


def _check_state(state: Mapping[str, Tensor], dim: int) -> None:
    missing = [name for name in ("keys", "index", "label", "seen", "steps") if name not in state]
    if missing:
        raise UserError(
            f"queue state: {', '.join(missing)} missing; it was not saved by DistributedQueue.state_dict"
        )
    keys, rows = state["keys"], state["keys"].shape[0]
    if keys.dim() != 2 or keys.shape[1] != dim:
        raise UserError(
            f"queue state: keys have shape {list(keys.shape)}, this queue's anchors have {dim} numbers"
        )
    if state["index"].shape != (rows,) or state["label"].shape != (rows,):
        raise UserError(f"queue state: index and label must have {rows} rows, one for each anchor")
    if not bool(torch.isfinite(keys).all()):
        raise UserError("queue state: some anchors are not finite; take an earlier checkpoint")
