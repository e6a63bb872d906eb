"""Run folders of which a file was damaged: every job that reads one says so, or goes on."""

from pathlib import Path

import pytest
import yaml
from damage import damaged, json_files, json_lines, parquet_files, yaml_files
from doors import knock
from fuzzing import fuzz
from hypothesis import strategies as st
from sandbox import Sandbox, put
from world import World, as_arguments

ENDS = ("result.json", "backbone.safetensors")  # what a finished run has besides
FEATURES = "features/*/bank-*"


def changed(path: Path) -> st.SearchStrategy[bytes]:
    """Return what may have become of a file of a run."""
    content = path.read_bytes()
    if path.suffix == ".json":
        return json_files(content)
    if path.suffix == ".jsonl":
        return json_lines(content)
    if path.suffix == ".parquet":
        return parquet_files(content)
    if path.suffix == ".yaml":
        return yaml_files(yaml.safe_load(content))
    return damaged(content)


def damage(
    data: st.DataObject, world: World, sandbox: Sandbox, pattern: str, removed: tuple[str, ...] = ()
) -> str:
    """Lay out a run with one damaged file, and without others; returns the case in words."""
    sandbox.fresh()
    run = put(world.run, sandbox.out / "run")
    for name in removed:
        (run / name).unlink()
    chosen = data.draw(st.sampled_from(sorted(world.run.glob(pattern)))).relative_to(world.run)
    content = data.draw(changed(world.run / chosen))
    how = data.draw(st.sampled_from(("file",) * 12 + ("folder", "gone")))
    (run / chosen).unlink(missing_ok=True)
    if how == "folder":
        (run / chosen).mkdir()
    elif how == "file":
        (run / chosen).write_bytes(content)
    return f"{chosen} {how}: {content[:1500]!r}"


READ_BY_PRETRAIN = {
    "config.yaml": 60, "result.json": 60, ".isd_ray.json": 10, "selection.parquet": 40,
    "bank.parquet": 20, "validation.parquet": 20, "watched.json": 25, "validation.jsonl": 40,
    "metrics.jsonl": 50, "checkpoints/*": 20,
}  # fmt: skip


@pytest.mark.parametrize("name", READ_BY_PRETRAIN)
def test_pretrain_again(name, world, sandbox, jobs) -> None:
    removed = ENDS if name not in ("config.yaml", "result.json") else ()

    @fuzz(READ_BY_PRETRAIN[name], data=st.data())
    def case(data: st.DataObject) -> None:
        about = damage(data, world, sandbox, name, removed)
        given = [*world.arguments(), f"--output={sandbox.out}", "--name=run"]
        knock(
            f"pretrain again, {name}",
            jobs["pretrain"],
            given,
            sandbox,
            writes=[sandbox.out / "run"],
            about=about,
        )

    case()


@pytest.mark.parametrize(
    "name", ["selection.parquet", "bank.parquet", "watched.json", "metrics.jsonl", "validation.jsonl"]
)
def test_pretrain_goes_on_in_the_middle(name, world, sandbox, jobs) -> None:
    """From the first of two checkpoints, so that a step is trained on what is there."""

    @fuzz(20, data=st.data())
    def case(data: st.DataObject) -> None:
        about = damage(data, world, sandbox, name, ENDS)
        newest = sorted((sandbox.out / "run" / "checkpoints").iterdir())[-1]
        newest.unlink()
        given = [*world.arguments(), f"--output={sandbox.out}", "--name=run"]
        knock(
            f"pretrain goes on, {name}",
            jobs["pretrain"],
            given,
            sandbox,
            writes=[sandbox.out / "run"],
            about=about,
        )

    case()


READ_BY_EVALUATE = {
    "config.yaml": 60, "metrics.jsonl": 30, "checkpoints/*": 20, f"{FEATURES}/embeddings.json": 40,
    f"{FEATURES}/*.parquet": 40,
}  # fmt: skip


@pytest.mark.parametrize("name", READ_BY_EVALUATE)
def test_evaluate(name, world, sandbox, jobs) -> None:
    @fuzz(READ_BY_EVALUATE[name], data=st.data())
    def case(data: st.DataObject) -> None:
        about = damage(data, world, sandbox, name)
        given = [str(sandbox.out / "run"), "--protocols", "knn1"]
        knock(
            f"evaluate, {name}", jobs["evaluate"], given, sandbox, writes=[sandbox.out / "run"], about=about
        )

    case()


@pytest.mark.parametrize("name", ["config.yaml", "checkpoints/*"])
def test_embed(name, world, sandbox, jobs) -> None:
    @fuzz(40, data=st.data(), network=st.sampled_from(("student", "teacher")))
    def case(data: st.DataObject, network: str) -> None:
        about = damage(data, world, sandbox, name)
        out = sandbox.out / "embeddings"
        given = [f"--run={sandbox.out / 'run'}", f"--network={network}", f"--out={out}"]
        given += [f"--shards={world.shards / 'test'}"] if data.draw(st.booleans()) else ["--split=test"]
        knock(f"embed, {name}", jobs["embed"], given, sandbox, writes=[out], about=about)

    case()


@pytest.mark.parametrize("name", ["config.yaml", "checkpoints/*"])
def test_teacher(name, world, sandbox, jobs, untrained) -> None:
    """The run that a frozen teacher comes from."""

    @fuzz(30, data=st.data())
    def case(data: st.DataObject) -> None:
        about = damage(data, world, sandbox, name)
        options = world.options(**{"method.name": "seed", "method.teacher": str(sandbox.out / "run")})
        options |= {"output": str(sandbox.out), "name": "seed", "queue.size": 4}
        knock(f"teacher, {name}", jobs["pretrain"], as_arguments(options), sandbox, writes=[sandbox.out / "seed"],
              about=about)  # fmt: skip

    case()
