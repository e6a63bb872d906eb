"""Embeddings in parts, in this process: order, resume, broken images, what a folder refuses; and the bank in parts."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from isd_ray.data import blocks
from isd_ray.errors import UserError
from isd_ray.evaluate.knn import neighbours
from isd_ray.train import embedding
from isd_ray.train.embedding import CentreView, Compute, embed, read_labels, read_vectors
from isd_ray.train.neighbours import search_parts

VIEW = CentreView(8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
COMPUTE = Compute(batch=4)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(blocks.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(embedding, "PART_ROWS", 8)


class Net(nn.Module):
    """A backbone of one layer."""

    def __init__(self, dim: int, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.norm = nn.Linear(3 * 8 * 8, dim), nn.BatchNorm1d(dim)
        self.arch, self.stem_kind, self.dim = "net", "own", dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(x.flatten(1)))


def make_set(folder: Path, sizes: list[int], broken: tuple[int, ...] = (), labelled: bool = True) -> pa.Table:
    """One tar of random images of these sizes."""
    rows, generator = [], np.random.default_rng(0)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i, side in enumerate(sizes):
            buffer = io.BytesIO()
            pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            content = b"no image" if i in broken else buffer.getvalue()
            member = tarfile.TarInfo(f"k{i}.png")
            member.size = len(content)
            rows.append(
                ("0.tar", f"k{i}", tar.offset + 512, member.size, i % 3 if labelled else None, side, side)
            )
            tar.addfile(member, io.BytesIO(content))
    names = ("shard", "key", "offset", "size", "label", "width", "height")
    table = pa.table(dict(zip(names, zip(*rows, strict=True), strict=True)))
    table = table.set_column(4, "label", table["label"].cast(pa.int32()))
    metadata = {"isd_ray": json.dumps({"format": 1, "root": str(folder), "classes": ["a", "b", "c"]})}
    return table.replace_schema_metadata(metadata)


def plain(folder: Path, sizes: list[int], net: Net) -> torch.Tensor:
    """The features, one image at a time."""
    generator, rows = np.random.default_rng(0), []
    for side in sizes:
        image = torch.from_numpy(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).permute(2, 0, 1)
        with torch.no_grad():
            rows.append(net.eval()(VIEW(image[None])))
    return torch.cat(rows)


def test_parts_hold_keys_labels_and_the_features_of_every_network(tmp_path) -> None:
    table, nets = make_set(tmp_path, [8] * 21), {"student": Net(5), "teacher": Net(3, seed=1)}
    nets["student"].norm.running_mean += 1  # in eval mode this counts
    assert embed(table, nets, VIEW, str(tmp_path / "out"), COMPUTE) == []
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert files == ["embeddings.json", *(f"part-{i:06d}.parquet" for i in range(3))]
    part = pq.read_table(tmp_path / "out" / files[2])
    assert part.column_names == ["shard", "key", "label", "student", "teacher"]
    assert part["key"].to_pylist() == [f"k{i}" for i in range(8, 16)]
    assert part["label"].to_pylist() == [i % 3 for i in range(8, 16)]
    assert part.schema.field("student").type == pa.list_(pa.float32(), 5)
    for name, net in nets.items():
        torch.testing.assert_close(read_vectors(str(tmp_path / "out"), name), plain(tmp_path, [8] * 21, net))
    assert read_labels(str(tmp_path / "out")).tolist() == [i % 3 for i in range(21)]


def test_parts_that_are_there_are_kept_and_only_the_others_are_read(tmp_path, monkeypatch) -> None:
    table, nets, out = make_set(tmp_path, [8, 9] * 10), {"embedding": Net(5)}, tmp_path / "out"
    embed(table, nets, VIEW, str(out), COMPUTE)
    whole = read_vectors(str(out), "embedding")
    times = {p.name: p.stat().st_mtime_ns for p in out.glob("*.parquet")}
    (out / "part-000001.parquet").unlink()
    with pytest.raises(UserError, match="lacks 1 of 3 parts"):
        read_vectors(str(out), "embedding")
    rows, read = [], blocks.Blocks.read
    monkeypatch.setattr(
        blocks.Blocks, "read", lambda self, r, *rest, **o: rows.extend(r) or read(self, r, *rest, **o)
    )
    embed(table, nets, VIEW, str(out), COMPUTE)
    assert rows == list(range(8, 16))
    assert torch.equal(read_vectors(str(out), "embedding"), whole)
    kept = {p.name: p.stat().st_mtime_ns for p in out.glob("*.parquet")}
    assert {n for n in kept if kept[n] == times[n]} == {"part-000000.parquet", "part-000002.parquet"}


def test_a_kill_between_parts_leaves_whole_parts_only(tmp_path, monkeypatch) -> None:
    table, nets, out = make_set(tmp_path, [8] * 20), {"embedding": Net(5)}, tmp_path / "out"
    write = pq.write_table

    def die_at_the_second(content, path) -> None:
        write(content, path)
        if content["key"][0].as_py() == "k8":
            raise KeyboardInterrupt

    monkeypatch.setattr(embedding.pq, "write_table", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        embed(table, nets, VIEW, str(out), COMPUTE)
    monkeypatch.setattr(embedding.pq, "write_table", write)
    assert [p.name for p in out.glob("*.parquet")] == ["part-000000.parquet"]
    embed(table, nets, VIEW, str(out), COMPUTE)
    torch.testing.assert_close(
        read_vectors(str(out), "embedding"), plain(tmp_path, [8] * 20, nets["embedding"])
    )


def test_other_images_networks_views_or_types_are_refused(tmp_path) -> None:
    table, nets, out = make_set(tmp_path, [8] * 10), {"embedding": Net(5)}, str(tmp_path / "out")
    embed(table, nets, VIEW, out, COMPUTE)
    for words, changed in {
        "networks": (table, {"embedding": Net(5, seed=2)}, VIEW, "float32"),
        "images, images_sha256": (table.slice(0, 9), nets, VIEW, "float32"),
        "view": (table, nets, CentreView(9, VIEW.mean, VIEW.std), "float32"),
        "dtype": (table, nets, VIEW, "float16"),
    }.items():
        with pytest.raises(UserError, match=f"differ in {words}: give another folder") as error:
            embed(*changed[:3], out, COMPUTE, dtype=changed[3])
        assert "\n" not in str(error.value)


def test_broken_images_are_left_out_and_named(tmp_path) -> None:
    table, nets, out = (
        make_set(tmp_path, [8] * 20, broken=(0, 9)),
        {"embedding": Net(5)},
        str(tmp_path / "out"),
    )
    bad = embed(table, nets, VIEW, out, COMPUTE, max_bad=0.2)
    assert [b["key"] for b in bad] == ["k0", "k9"]
    good = [i for i in range(20) if i not in (0, 9)]
    torch.testing.assert_close(
        read_vectors(out, "embedding"), plain(tmp_path, [8] * 20, nets["embedding"])[good]
    )
    with pytest.raises(UserError, match="max_bad"):
        embed(table, nets, VIEW, str(tmp_path / "other"), COMPUTE, max_bad=0.01)


def test_half_precision_and_images_without_labels(tmp_path) -> None:
    table, net, out = make_set(tmp_path, [8] * 9, labelled=False), Net(4), str(tmp_path / "out")
    embed(table, {"embedding": net}, VIEW, out, COMPUTE, dtype="float16")
    part = pq.read_table(f"{out}/part-000000.parquet")
    assert part.schema.field("embedding").type == pa.list_(pa.float16(), 4)
    assert part["label"].null_count == 8
    assert read_labels(out).tolist() == [-1] * 9
    expected = plain(tmp_path, [8] * 9, net)
    torch.testing.assert_close(read_vectors(out, "embedding"), expected, atol=2e-3, rtol=2e-3)


def test_embeddings_that_are_no_numbers_are_not_kept(tmp_path) -> None:
    table, net, out = make_set(tmp_path, [8] * 9), Net(4), str(tmp_path / "out")
    nn.init.constant_(net.layer.bias, 1e6)
    with pytest.raises(UserError, match="too much for float16: use float32"):
        embed(table, {"embedding": net}, VIEW, out, COMPUTE, dtype="float16")
    nn.init.constant_(net.layer.bias, float("nan"))
    with pytest.raises(UserError, match="8 of 8 embeddings of 'embedding' are not finite"):
        embed(table, {"embedding": net}, VIEW, str(tmp_path / "other"), COMPUTE)
    assert not list(tmp_path.glob("o*/*.parquet"))


@pytest.mark.parametrize("k", [1, 7, 20])
def test_a_bank_in_parts_has_the_neighbours_of_the_whole(tmp_path, k) -> None:
    table, out = make_set(tmp_path, [8] * 21, broken=(3,)), str(tmp_path / "out")
    embed(table, {"student": Net(6)}, VIEW, out, COMPUTE, max_bad=0.2)
    queries = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    similarity, row = search_parts(out, "student", 20, queries, k, workers=0)
    expected = neighbours(read_vectors(out, "student"), queries, k)
    assert torch.equal(row, expected[1])
    torch.testing.assert_close(similarity, expected[0])
    with pytest.raises(UserError, match="between 1 and 20"):
        search_parts(out, "student", 20, queries, 21, workers=0)


# -- folders that are damaged, or somebody else's ------------------------------------------------------------


@pytest.fixture
def made(tmp_path) -> tuple[pa.Table, dict[str, nn.Module], Path]:
    """A folder of three parts, and what it was made of."""
    table, nets, out = make_set(tmp_path, [8] * 20), {"embedding": Net(5)}, tmp_path / "out"
    embed(table, nets, VIEW, str(out), COMPUTE)
    return table, nets, out


@pytest.mark.parametrize("name", ["x.txt", "part-000000.parquet", "index.parquet", ".hidden", "folder/x"])
def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path, name) -> None:
    table, out = make_set(tmp_path, [8] * 4), tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    with pytest.raises(UserError, match=r"is not empty .* give another folder"):
        embed(table, {"embedding": Net(5)}, VIEW, str(out), COMPUTE)
    assert [(p, p.read_text()) for p in out.rglob("*") if p.is_file()] == [(out / name, "mine")]


def test_a_start_that_was_killed_leaves_the_folder_free(tmp_path) -> None:
    table, out = make_set(tmp_path, [8] * 4), tmp_path / "out"
    out.mkdir()
    (out / ".embeddings.json.0123abcd.part").write_text("{")
    embed(table, {"embedding": Net(5)}, VIEW, str(out), COMPUTE)
    assert len(read_labels(str(out))) == 4


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 3000,
        "{}",
        '{"images": -1, "part_rows": 8}',
        '{"images": 8, "part_rows": 0}',
    ],
)
def test_a_damaged_description_is_one_line(made, text) -> None:
    table, nets, out = made
    (out / "embeddings.json").write_text(text)
    for call in (lambda: embed(table, nets, VIEW, str(out), COMPUTE), lambda: read_labels(str(out))):
        with pytest.raises(UserError, match=r"embeddings\.json' is damaged"):
            call()


def test_a_description_of_endless_parts_lists_none(made) -> None:
    *_, out = made
    (out / "embeddings.json").write_text(json.dumps({"images": 2**50, "part_rows": 1}))
    with pytest.raises(UserError, match="lacks"):
        read_labels(str(out))


def without(name: str):
    return lambda part: part.drop_columns(name)


def changed(name: str, array: pa.Array):
    return lambda part: part.set_column(part.column_names.index(name), name, array)


VECTORS = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(24, np.float32)), 3)
DAMAGE = {
    "no vectors": without("embedding"),
    "no labels": without("label"),
    "numbers": changed("embedding", pa.array([0.5] * 8)),
    "texts": changed("embedding", pa.array(["x"] * 8)),
    "lists": changed("embedding", pa.array([[0.5]] * 8)),
    "another width": changed("embedding", VECTORS),
    "holes": changed("embedding", pa.array([None] * 8, pa.list_(pa.float32(), 5))),
    "labels in words": changed("label", pa.array(["x"] * 8)),
    "too many rows": lambda part: pa.concat_tables([part, part]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_part_is_one_line(made, damage) -> None:
    *_, out = made
    place = out / "part-000000.parquet"
    pq.write_table(DAMAGE[damage](pq.read_table(place)), place)
    with pytest.raises(UserError, match=r"is damaged|parts of several widths"):
        read_labels(str(out)), read_vectors(str(out), "embedding")


@pytest.mark.parametrize("keep", [0, 4, 100, -8, -1])
def test_a_cut_part_is_one_line_also_where_it_would_be_kept(made, keep) -> None:
    table, nets, out = made
    place = out / "part-000000.parquet"
    place.write_bytes(place.read_bytes()[:keep])
    for call in (lambda: embed(table, nets, VIEW, str(out), COMPUTE), lambda: read_labels(str(out))):
        with pytest.raises(UserError, match=r"part-000000\.parquet' is damaged .*: remove that file"):
            call()
    place.unlink()
    embed(table, nets, VIEW, str(out), COMPUTE)
    assert len(read_labels(str(out))) == 20
