"""One process for all cases (tests/conftest.py sees to it): the good input is made once, nothing starts Ray.

The cases are counted.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from doors import REPORT, counts
from fuzzing import SEED
from sandbox import Sandbox
from stage import set_stage
from world import World, load_job

from isd_ray.study import report as study_report
from isd_ray.study import work
from isd_ray.sweep import report as sweep_report
from isd_ray.train import trainer

JOBS = ("pretrain", "evaluate", "embed", "make_shards", "sweep", "compare")


@pytest.fixture(scope="module", autouse=True)
def stage() -> Iterator[None]:
    """No case starts Ray; the tests that come after these in this process may."""
    with pytest.MonkeyPatch.context() as patch:
        set_stage(patch)
        yield


@pytest.fixture(scope="session")
def place() -> Iterator[Path]:
    """A folder in memory where there is one: the cases write some thousand files."""
    memory = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="isd_ray_fuzz_", dir=memory if memory.is_dir() else None)
    yield Path(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def world(place) -> World:
    """Good input of every kind."""
    made = World(place / "world")
    made.root.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        set_stage(patch)
        made.make()
    return made


@pytest.fixture(scope="session")
def sandbox(place) -> Sandbox:
    """Where the cases run."""
    return Sandbox(place / "sandbox")


@pytest.fixture(scope="session")
def jobs() -> dict:
    """The main functions of the jobs."""
    return {name: load_job(name).main for name in JOBS}


@pytest.fixture(scope="module")
def untrained(world) -> Iterator[None]:
    """Runs that end where training would begin, with the result of another one."""
    result = json.loads((world.run / "result.json").read_text())

    def ended(config, folder, *_) -> dict:
        folder.write_json("result.json", result)
        return result

    with pytest.MonkeyPatch.context() as patch:
        for module in (trainer, work):
            patch.setattr(module, "run_prepared", ended)
        yield


@pytest.fixture(scope="module")
def light() -> Iterator[None]:
    """Reports whose figures are made, but not drawn."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (study_report, sweep_report):
            patch.setattr(module, "png", lambda figure: b"")
        yield


def pytest_terminal_summary(terminalreporter) -> None:
    """Say how many cases there were."""
    if not counts:
        return
    terminalreporter.section("fuzz")
    if REPORT is not None:
        with open(REPORT, "a") as file:
            file.write(json.dumps({"counts": counts}) + "\n")
    for door, number in sorted(counts.items()):
        terminalreporter.write_line(f"{number:6,}  {door}")
    terminalreporter.write_line(
        f"{counts.total():6,}  cases at {len(counts)} doors with seed {SEED} (ISD_RAY_FUZZ_SEED chooses another)"
    )
