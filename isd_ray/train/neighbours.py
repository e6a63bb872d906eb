"""Neighbours in a bank that no process holds whole: Ray tasks search parts of it, their answers are merged."""

from collections.abc import Sequence

import ray
import torch
from torch import Tensor

from isd_ray.data.parallel import run_tasks
from isd_ray.evaluate.knn import check_k, merge, neighbours
from isd_ray.train.embedding import part_uris, read_part, vectors


def search_parts(
    uri: str, name: str, images: int, queries: Tensor, k: int, workers: int
) -> tuple[Tensor, Tensor]:
    """Return similarity and bank row [Q, k] as `neighbours` does, for the bank in the folder `uri`.

    name: column of the embeddings; images: how many there are; workers: tasks, each with an equal share of the parts,
    of which it holds one at a time; 0: this process. Raises UserError where k exceeds the bank.
    """
    check_k(k, images)
    parts = part_uris(uri)
    sizes = [read_part(part, ["label"]).num_rows for part in parts]
    starts = [sum(sizes[:i]) for i in range(len(parts))]
    tasks = min(max(workers, 1), len(parts))
    groups = [list(zip(parts, starts, strict=True))[i::tasks] for i in range(tasks)]
    shared = ray.put(queries) if workers else queries
    found = run_tasks(search_group, [(group, name, shared, k) for group in groups], workers=workers)
    return merge(found, k)


def search_group(
    group: Sequence[tuple[str, int]], name: str, queries: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Search some parts, given with the bank row of their first image; returns at most k neighbours of each query."""
    similarity, row = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for uri, start in group:
        bank = vectors(read_part(uri, [name])[name])
        if len(bank):
            near, index = neighbours(bank, queries, min(k, len(bank)))
            parts = [(similarity, row), (near, index + start)]
            similarity, row = merge(parts, min(k, row.shape[1] + index.shape[1]))
    return similarity, row
