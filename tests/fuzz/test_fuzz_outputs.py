"""Places where something lies already: folders of embeddings and shards that are damaged, or somebody else's."""

import itertools
import shutil

import pytest
from damage import damaged, json_files, parquet_files
from doors import knock
from fuzzing import fuzz
from hypothesis import strategies as st
from sandbox import PRECIOUS, put
from world import World


@pytest.mark.parametrize("name", ["embeddings.json", "part-000000.parquet"])
def test_embeddings_again(name, world: World, sandbox, jobs) -> None:
    content = (world.root / "embeddings" / name).read_bytes()
    changed = json_files(content) if name.endswith("json") else parquet_files(content)

    @fuzz(50, content=changed)
    def case(content: bytes) -> None:
        sandbox.fresh()
        out = put(world.root / "embeddings", sandbox.out / "run")
        (out / name).write_bytes(content)
        given = [f"--run={world.run}", f"--shards={world.shards / 'train'}", f"--out={out}"]
        knock(f"embed again, {name}", jobs["embed"], given, sandbox, writes=[out], about=content[:1500])

    case()


SHARDED = ("make_shards.json", "test-000000.tar", "index.parquet", "bad_samples.jsonl")


@pytest.mark.parametrize("name", SHARDED)
def test_shards_again(name, world: World, sandbox, jobs) -> None:
    place = world.shards / "test" / name
    content = place.read_bytes() if place.exists() else b"{}\n"
    kinds = {".json": json_files, ".parquet": parquet_files}
    changed = kinds.get(place.suffix, damaged)(content)
    source = world.root / "test.parquet"

    @fuzz(40, content=changed)
    def case(content: bytes) -> None:
        sandbox.fresh()
        out = put(world.shards, sandbox.out / "run")
        (out / "test" / name).write_bytes(content)
        given = [f"--source={source}", f"--out={out}", "--split=test", "--shard-size=15"]
        knock(f"shards again, {name}", jobs["make_shards"], given, sandbox, writes=[out], about=content[:600])

    case()


THEIRS = (
    "space.yaml", "study.yaml",
    "embeddings.json", "part-000000.parquet", "train-000000.tar", "train-000001.tar",
    "index.parquet", "x.txt", "bad_samples.jsonl", "make_shards.json", "config.yaml",
    "checkpoints", "ray", "train", "cells", "trials", ".isd_ray.json", "x.tar", ".hidden",
    "features", "results.parquet", "report",
)  # fmt: skip
DOORS = ("pretrain", "embed", "make_shards", "sweep", "compare")


@pytest.mark.parametrize("door", DOORS)
def test_what_lies_there_is_left_alone(door, world: World, sandbox, jobs, untrained, light) -> None:
    """A folder with somebody's own file or folder in it: a job makes nothing of it, or lets it be."""
    for name, folder in itertools.product(THEIRS, (False, True)):
        sandbox.fresh()
        out = sandbox.out / "run"
        theirs = (out / "train" if door == "make_shards" else out) / name
        file = theirs / "precious.txt" if folder else theirs
        file.parent.mkdir(parents=True)
        file.write_text(PRECIOUS)
        given = world.command(door, sandbox.out)
        knock(f"theirs, {door}", jobs[door], given, sandbox, writes=[out], keeps=[file], about=(name, folder))


@pytest.mark.parametrize("door", ["pretrain", "evaluate", "sweep", "compare"])
def test_links_are_not_followed_to_be_removed(door, world: World, sandbox, jobs, untrained, light) -> None:
    """Folders of notes that a job makes and removes by their names, when somebody's link has such a name."""
    links = st.lists(
        st.sampled_from((".ray-00000000", ".ray-0123abcd", ".features-00000000")), min_size=1, unique=True
    )

    @fuzz(8, links=links)
    def case(links: list[str]) -> None:
        sandbox.fresh()
        made = {"pretrain": world.run, "evaluate": world.run, "sweep": world.root / "sweeps" / "sweep",
                "compare": world.root / "studies" / "study"}[door]  # fmt: skip
        out = put(made, sandbox.out / "run")
        for link in links:
            (out / link).symlink_to(sandbox.elsewhere)
        if door == "pretrain":
            shutil.rmtree(out / "checkpoints")
        given = world.command(door, sandbox.out)
        knock(f"links, {door}", jobs[door], given, sandbox, writes=[out], about=links)

    case()
