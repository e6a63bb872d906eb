"""Embeddings by an actor, and the search of a bank in parts by tasks, give what this process gives."""

from pathlib import Path

import numpy as np
import pytest
import torch

from isd_ray.data.index import read_index
from isd_ray.data.shards import make_shards
from isd_ray.evaluate.knn import neighbours
from isd_ray.models.backbones import build_backbone
from isd_ray.train import embedding
from isd_ray.train.embedding import CentreView, Compute, embed, read_vectors
from isd_ray.train.neighbours import search_parts

VIEW = CentreView(16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """The test images of the embedded set as shards, 1000 of them."""
    folder = tmp_path_factory.mktemp("embedded")
    make_shards("embedded:textures", str(folder), split="test", shard_size=300, workers=0)
    return folder / "test"


def test_actors_and_tasks_give_what_this_process_gives(ray_session, monkeypatch, shards, tmp_path) -> None:
    monkeypatch.setattr(embedding, "PART_ROWS", 384)
    table = read_index(str(shards))
    nets = {name: build_backbone("resnet8", "stride2", 16) for name in ("student", "teacher")}
    for name, workers in (("here", 0), ("actors", 1)):
        embed(table, nets, VIEW, str(tmp_path / name), Compute("cpu", workers, batch=128))
    for net in nets:
        here, actors = (read_vectors(str(tmp_path / name), net) for name in ("here", "actors"))
        assert here.shape == (1000, 64)
        torch.testing.assert_close(actors, here, atol=1e-5, rtol=1e-4)
    queries = torch.from_numpy(np.random.default_rng(0).normal(size=(20, 64)).astype(np.float32)) + here.mean(
        0
    )
    similarity, row = search_parts(str(tmp_path / "here"), "teacher", 1000, queries, 30, workers=2)
    expected = neighbours(here, queries, 30)
    torch.testing.assert_close(similarity, expected[0], atol=1e-6, rtol=0)
    assert (row == expected[1]).float().mean() > 0.99  # what is equal to the last bit may change places
