"""Folders of sweeps and studies of which a file was damaged: the same command goes on, or says what is wrong."""

import io
from pathlib import Path

import numpy as np
import pytest
from damage import as_json, json_files
from doors import knock
from fuzzing import fuzz
from hypothesis import strategies as st
from sandbox import put
from test_fuzz_runs import changed
from world import World

SWEEP = {
    "space.yaml": 50, "journal.jsonl": 60, "trials/*/*/validation.jsonl": 30,
    "trials/*/*/config.yaml": 15, "trials/*/*/failure.json": 25,
    "trials/*/*/selection.parquet": 10,
}  # fmt: skip
FAILED = b'{\n  "reason": "it broke",\n  "traceback": "none"\n}\n'


def parts_of(root: Path, pattern: str) -> list[Path]:
    """Return the files that a pattern names; a failure is there only where there is one."""
    if pattern.endswith("failure.json"):
        return sorted(
            p.parent / "failure.json" for p in root.glob(pattern.replace("failure.json", "config.yaml"))
        )
    return sorted(root.glob(pattern))


def damage(data: st.DataObject, root: Path, out: Path, pattern: str) -> str:
    """Copy a folder with one damaged file; returns the case in words."""
    put(root, out)
    place = data.draw(st.sampled_from(parts_of(root, pattern)))
    content = data.draw(changed(place) if place.exists() else changed_failure())
    chosen = place.relative_to(root)
    how = data.draw(st.sampled_from(("file",) * 12 + ("folder", "gone")))
    (out / chosen).unlink(missing_ok=True)
    if how == "folder":
        (out / chosen).mkdir()
    elif how == "file":
        (out / chosen).write_bytes(content)
    return f"{chosen} {how}: {content[:1500]!r}"


def changed_failure() -> st.SearchStrategy[bytes]:
    """Return what may stand in failure.json."""
    return st.one_of(st.just(FAILED), json_files(FAILED))


@pytest.mark.parametrize("pattern", SWEEP)
def test_sweep_again(pattern, world: World, sandbox, jobs, light) -> None:
    @fuzz(SWEEP[pattern], data=st.data(), more=st.booleans())
    def case(data: st.DataObject, more: bool) -> None:
        sandbox.fresh()
        out = sandbox.out / "run"
        about = damage(data, world.root / "sweeps" / "sweep", out, pattern)
        given = [*world.command("sweep", sandbox.out), *["--trials=4"] * more]
        knock(
            f"sweep again, {pattern.rpartition('/')[2]}",
            jobs["sweep"],
            given,
            sandbox,
            writes=[out],
            about=about,
        )

    case()


STUDY = {
    "study.yaml": 10, "cells/*/config.yaml": 40, "cells/*/result.json": 90,
    "cells/*/metrics.jsonl": 60, "cells/*/failure.json": 30, "cells/*/pictures.npz": 20,
    "cells/*/validation.jsonl": 25,
}  # fmt: skip


@pytest.mark.parametrize("pattern", STUDY)
def test_study_again(pattern, world: World, sandbox, jobs, untrained, light, place) -> None:
    study = world.root / "studies" / "study"
    rows = [{"step": 1, "epoch": 1, "student.knn1": 50.0}, {"step": 3, "epoch": 2, "student.knn1": 60.0}]
    measured = b"".join(as_json(row) + b"\n" for row in rows)
    made = {"pictures.npz": pictures(), "validation.jsonl": measured}
    name = pattern.rpartition("/")[2]
    source = put(study, place / "study-with-more")
    for cell in (source / "cells").iterdir():
        for extra, content in made.items():
            (cell / extra).write_bytes(content)

    @fuzz(STUDY[pattern], data=st.data(), report_only=st.booleans())
    def case(data: st.DataObject, report_only: bool) -> None:
        sandbox.fresh()
        out = sandbox.out / "run"
        about = damage(data, source, out, pattern)
        given = [*world.command("compare", sandbox.out), *["--report-only"] * report_only]
        knock(
            f"study again, {name}",
            jobs["compare"],
            given,
            sandbox,
            writes=[out],
            codes=(0, 1, 2),
            about=about,
        )

    case()


def pictures() -> bytes:
    """Return an archive of arrays such as is kept beside a cell."""
    np.savez(buffer := io.BytesIO(), wanted=np.array("{}"), map_place=np.zeros((3, 2)))
    return buffer.getvalue()
