"""Memory is that of a batch of views, whatever the camera, and of few encoded images, whatever their files."""

import subprocess
import sys
import tracemalloc
from pathlib import Path

import broken as b
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import fs as pafs

from isd_ray.data import index, read
from isd_ray.data.read import Shape, pieces, read_rows

NUMBER, SIDE = 24, 1500  # images, and their pixels on a side

PEAK = """
import io, resource, sys, tempfile
import pyarrow.parquet as pq
import torch
from isd_ray.config import resolve
from isd_ray.data.index import read_index
from isd_ray.models.backbones import build_backbone
from isd_ray.train.embedding import CentreView, Compute, embed
from isd_ray.train.folder import RunFolder
from isd_ray.train.loop import train
from isd_ray.train.state import Worker

def embed_all(table, place):
    net = build_backbone("resnet8", "stride2", 32)
    view = CentreView(32, (0.5,) * 3, (0.25,) * 3)
    embed(table, {"x": net}, view, place + "/embeddings", Compute(batch=12))

def train_once(table, place):
    options = {"data.image_size": 32, "model.backbone": "resnet8", "model.stem": "stride2", "queue.size": 24}
    options |= {"train.epochs": 1, "train.batch_size": 12, "output": place, "name": "run"}
    pq.write_table(table, selection := io.BytesIO())
    run = RunFolder(place + "/run")
    run.write("selection.parquet", selection.getvalue())
    train(resolve(options), run, Worker(0, 1, torch.device("cpu"), sys.stderr))

torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
several, one = map(read_index, sys.argv[1:])
for use in (embed_all, train_once):
    with tempfile.TemporaryDirectory() as place:
        use(several, place + "/several")
        before = peak()
        use(one, place + "/one")
        print(peak() - before)
"""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> list[str]:
    """Folders of large JPEGs of few bytes: the sides of the first differ by a pixel, those of the second do not."""
    folders = []
    for name, odd in (("several", 1), ("one", 0)):
        folder = tmp_path_factory.mktemp(name)
        samples: list[b.Member] = []
        for i in range(NUMBER):
            picture = b.pixels(i).resize((SIDE - i % 2 * odd, SIDE), Image.Resampling.BICUBIC)
            samples += b.sample(f"{i:02d}", i % 3, "jpg", b.file(picture, "JPEG"))
        (folder / "0.tar").write_bytes(b.tar(*samples))
        index.write_index(index.index_shards(str(folder), workers=0)[0], str(folder))
        folders.append(str(folder))
    return folders


def test_large_images_of_one_size_take_no_more_memory_than_those_of_several(photographs):
    command = [sys.executable, "-c", PEAK, *photographs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    batch = 12 * 3 * SIDE**2 / 2**20  # MiB of one batch of whole images, before any arithmetic
    assert max(map(int, done.stdout.split())) < batch / 2


@pytest.mark.parametrize("local", [True, False])
def test_a_task_holds_a_bounded_part_of_its_encoded_images(tmp_path, monkeypatch, local):
    """A hundred files of 1 MiB of noise, read in one range."""
    noise = np.random.default_rng(0).integers(0, 256, (512, 683, 3), np.uint8)
    content = b.file(Image.fromarray(noise), "BMP")
    (tmp_path / "s.tar").write_bytes(b.tar(*((f"{i:03d}.bmp", content) for i in range(100))))
    table, _ = index.index_shards(str(tmp_path), workers=0)
    monkeypatch.setattr(read, "LOCAL_BYTES" if local else "WINDOW_BYTES", 8 * 2**20)
    disk = pafs.LocalFileSystem()
    place, folder = (disk, str(tmp_path)) if local else (pafs.SubTreeFileSystem(str(tmp_path), disk), "")
    rows = np.arange(100)
    tracemalloc.start()
    for block in read_rows(place, folder, table, rows, rows, 100, Shape((8, 8), center=True)):
        assert (block["reason"] == "").all()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 8 * 2**20


@given(st.lists(st.integers(-(2**62), 2**62), max_size=30), st.integers(1, 2**40))
def test_pieces_cover_all_rows_once_and_are_small_or_single(sizes, most):
    cut = list(pieces(np.array(sizes, np.int64), most))
    assert [i for part in cut for i in range(part.start, part.stop)] == list(range(len(sizes)))
    for part in cut:
        held = sum(min(max(n, 0), read.MAX_BYTES) for n in sizes[part])
        assert held <= most or part.stop - part.start == 1
