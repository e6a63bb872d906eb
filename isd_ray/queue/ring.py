"""First in, first out storage of one rank's anchors, without a gap, a divisibility rule or random fillers.

Every anchor has a *position*: its place in the stream of all keys that all ranks ever enqueued (step by step,
inside a step in rank order). The queue of size K is the newest K positions, so a rank that knows the
positions of its own anchors knows which of them have left the queue, whatever the other ranks hold. Positions
are kept as `range` objects on the host, one per batch: dropping anchors needs no look at the device.
"""

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor


class Ring:
    """A circular buffer of anchors with their sample index and label, oldest first; it grows where it must.

    `keys` [capacity, D], `index` and `label` int64 [capacity]; the anchors lie in slots `start ... start +
    count`, modulo the capacity. Published queues assert `K % batch == 0` instead of wrapping (MoCo, He et al.
    2020).
    """

    def __init__(self, capacity: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.empty(capacity, dim, dtype=dtype, device=device)
        self.index = torch.empty(capacity, dtype=torch.int64, device=device)
        self.label = torch.empty(capacity, dtype=torch.int64, device=device)
        self.start = 0
        self.count = 0
        self.runs: deque[range] = deque()  # positions of the numbered anchors, oldest first
        self.batches: list[
            tuple[int, int]
        ] = []  # (rows seen, rows stored) of batches without positions as yet

    @property
    def capacity(self) -> int:
        return self.keys.shape[0]

    def append(self, keys: Tensor, index: Tensor, label: Tensor, seen: int) -> None:
        """Store a batch's rows [n, D] as the newest; `seen` also counts rows of it that were dropped."""
        rows = keys.shape[0]
        if self.count + rows > self.capacity:
            self._grow(self.count + rows)
        if not self.count and rows:
            self.start = (self.start + seen - rows) % self.capacity  # as if the dropped rows had been there
        first = (self.start + self.count) % self.capacity if rows else 0
        head = min(rows, self.capacity - first)
        for store, new in ((self.keys, keys), (self.index, index), (self.label, label)):
            store[first : first + head] = new[:head]
            store[: rows - head] = new[head:]
        self.count += rows
        self.batches.append((seen, rows))

    def number(self, positions: list[int]) -> None:
        """Give the waiting batches their place: `positions[i]` is that of the first row of the i-th batch."""
        for first, (seen, rows) in zip(positions, self.batches, strict=True):
            if rows:
                self.runs.append(range(first + seen - rows, first + seen))
        self.batches = []

    def drop_before(self, position: int) -> None:
        """Drop the anchors older than `position`."""
        while self.runs and self.runs[0][0] < position:
            run = self.runs.popleft()
            gone = len(range(run.start, min(run.stop, position), run.step))
            self.start = (self.start + gone) % self.capacity
            self.count -= gone
            if gone < len(run):
                self.runs.appendleft(run[gone:])

    def segments(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Views (keys, index, label) of the anchors, oldest first: none, one, or two where the ring wraps."""
        end = self.start + self.count
        for a, b in ((self.start, min(end, self.capacity)), (0, end - self.capacity)):
            if a < b:
                yield self.keys[a:b], self.index[a:b], self.label[a:b]

    def renumber(self, positions: range) -> None:
        """Give all anchors that are stored these positions."""
        self.runs, self.batches = deque([positions] if len(positions) else []), []

    def oldest_first(self) -> list[Tensor]:
        """Copies of keys [count, D], index and label [count]."""
        parts = [(self.keys[:0], self.index[:0], self.label[:0]), *self.segments()]
        return [torch.cat(columns) for columns in zip(*parts, strict=True)]

    def positions(self) -> Tensor:
        """int64 [numbered anchors], ascending."""
        return torch.cat(
            [torch.tensor([], dtype=torch.int64), *(torch.arange(r.start, r.stop, r.step) for r in self.runs)]
        )

    def _grow(self, rows: int) -> None:
        """Make room for `rows` anchors and a sixteenth more, so that growth stays rare."""
        bigger = Ring(rows + rows // 16, self.keys.shape[1], self.keys.dtype, self.keys.device)
        for keys, index, label in self.segments():
            bigger.append(keys, index, label, len(keys))
        self.keys, self.index, self.label, self.start = bigger.keys, bigger.index, bigger.label, 0
