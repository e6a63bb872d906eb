"""What is run, run again and left alone; the cells themselves are played."""

import io
from collections import Counter, deque
from typing import Any

import numpy as np
import pytest
import yaml
from made_up import NAMES, made_up, picture_arrays, write_cell

from isd_ray.errors import UserError
from isd_ray.study import pictures, work
from isd_ray.study.check import Plan
from isd_ray.study.work import cell_folder, check_cells, jobs, shown
from isd_ray.train.failure import FAILURE, read_failure
from isd_ray.train.folder import RunFolder

ENDS = {
    "fine": (None, False),
    "raises": ("ValueError: it broke", False),
    "dies": ("its process ended: SIGKILL", True),
}


class Play:
    """Stands in for Ray: every start of a cell takes the next of its ends; at most as many live as are allowed."""

    def __init__(
        self, monkeypatch, plan: Plan, folder: RunFolder, ends: dict[str, list[str]], concurrent: int = 2
    ):
        self.ends, self.starts, self.live, self.most = ends, Counter[str](), deque[str](), 0
        self.told: list[tuple[str, str | None]] = []
        monkeypatch.setattr(work, "_start", self.start)
        monkeypatch.setattr(work, "_outcome", self.outcome)
        monkeypatch.setattr(work, "release_orphans", lambda: None)
        monkeypatch.setattr(work.ray, "wait", lambda live, timeout: ([live[0]], live[1:]))
        work.run(plan, folder, concurrent, 0.0, self.notify)

    def start(self, plan: Plan, folder: RunFolder, job: work.Job, gpus: float, open_once: Any) -> str:
        name = job.cell.name
        self.starts[name] += 1
        end = self.ends.get(name, ["fine"])[self.starts[name] - 1]
        if end == "refused":
            raise UserError("it cannot work")
        self.live.append(name)
        self.most = max(self.most, len(self.live))
        return f"{name} {end}"

    def outcome(self, ended: str) -> tuple[str | None, bool]:
        name, end = ended.split()
        self.live.remove(name)
        return ENDS[end]

    def notify(self, event: str, cell: Any, failure: str | None) -> None:
        if event == "ended":
            self.told.append((cell.name, failure))


def small(**change: Any) -> Plan:
    return made_up(**{"imbalances": {"exp25": {"scheme": "exponential"}}, "seeds": [0]} | change)


def test_every_cell_runs_once_and_failures_end_nothing(monkeypatch, tmp_path):
    plan, folder = small(), RunFolder(str(tmp_path))
    a, b, c = (cell.name for cell in plan.cells)
    play = Play(monkeypatch, plan, folder, {a: ["raises"], b: ["dies"], c: ["refused"]})
    assert play.starts == {a: 1, b: 1, c: 1}
    assert dict(play.told) == {
        a: "ValueError: it broke",
        b: "its process ended: SIGKILL",
        c: "it cannot work",
    }
    reasons = [cell_folder(folder, cell).read_json("failure.json")["reason"] for cell in plan.cells]
    assert reasons == ["ValueError: it broke", "its process ended: SIGKILL", "it cannot work"]
    assert play.most == 2


def test_a_cell_whose_process_died_is_started_again_as_often_as_the_file_says(monkeypatch, tmp_path):
    plan, folder = small(resources={"retries": 1}), RunFolder(str(tmp_path))
    a, b, c = (cell.name for cell in plan.cells)
    play = Play(
        monkeypatch, plan, folder, {a: ["dies", "fine"], b: ["dies", "dies", "fine"], c: ["raises", "fine"]}
    )
    assert play.starts == {a: 2, b: 2, c: 1}  # what raises would raise again
    assert dict(play.told) == {a: None, b: "its process ended: SIGKILL", c: "ValueError: it broke"}


def test_finished_cells_are_left_alone_but_for_pictures(monkeypatch, tmp_path):
    plan, folder = small(), RunFolder(str(tmp_path))
    first, second, third = plan.cells
    write_cell(plan, folder, first, pictures=True)
    write_cell(plan, folder, second)
    assert [(job.cell, job.pictures) for job in jobs(plan, folder)] == [(second, True), (third, True)]
    others = small(pictures={"queries": 3})
    assert [job.cell for job in jobs(others, folder)] == [
        first,
        second,
        third,
    ]  # other pictures than there are
    without = small(pictures={"enabled": False})
    assert [job.cell for job in jobs(without, folder)] == [third]
    assert Play(monkeypatch, without, folder, {}).starts == {third.name: 1}


def test_pictures_are_of_the_first_seed_and_split_of_unbalanced_sets():
    plan = made_up(imbalances={"exp25": {"scheme": "exponential", "control": True, "splits": [4, 5]}})
    assert [(c.method, c.seed, c.subset.split, c.setting.control) for c in shown(plan)] == [
        ("moco_v2", 0, 4, False), ("isd", 0, 4, False), ("simclr", 0, 4, False),
    ]  # fmt: skip


def test_other_options_than_a_cell_was_started_with_are_refused(tmp_path):
    plan, folder = small(), RunFolder(str(tmp_path))
    for cell in plan.cells:
        write_cell(plan, folder, cell)
    check_cells(plan, folder)
    check_cells(small(seeds=[0, 1], resources={"cpus": 3}), folder)  # a study may grow, and run elsewhere
    with pytest.raises(UserError) as error:
        check_cells(small(config={"train.epochs": 5}, metrics=["student.fewshot5"]), folder)
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 3
    assert all("train.epochs was 4, now 5" in line for line in lines)
    with pytest.raises(UserError, match=r"evaluate\.protocols was .*remove its result\.json to measure anew"):
        check_cells(small(metrics=["student.fewshot5"]), folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"reason": 1}', "[" * 3000])
def test_a_damaged_failure_is_told_as_one(tmp_path, text):
    folder = RunFolder(str(tmp_path))
    assert read_failure(folder) is None
    folder.write(FAILURE, text.encode())
    assert FAILURE in str(read_failure(folder))


def arrays_of(plan: Plan) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(picture_arrays(plan, plan.cells[1]))) as file:
        return dict(file)


BROKEN_PICTURES = {
    "no labels": lambda a: a.pop("map_label"),
    "fewer labels": lambda a: a.update(query_label=a["query_label"][:1]),
    "an unknown class": lambda a: a.update(map_label=a["map_label"] + 99),
    "words": lambda a: a.update(map_label=a["map_label"].astype(str)),
    "another width": lambda a: a.update(near_image=a["near_image"][..., :3]),
    "no number": lambda a: a.update(map_place=a["map_place"] * np.nan),
    "of other queries": lambda a: a.update(wanted=np.array("{}")),
    "half of the anchors": lambda a: a.pop("anchor_label"),
}


@pytest.mark.parametrize("damage", BROKEN_PICTURES)
def test_pictures_that_are_damaged_are_made_anew(tmp_path, damage):
    plan, folder = made_up(), RunFolder(str(tmp_path))
    arrays = arrays_of(plan)
    np.savez(buffer := io.BytesIO(), **arrays)
    folder.write(pictures.FILE, buffer.getvalue())
    assert pictures.read_pictures(folder, plan.study.pictures, len(NAMES)) is not None
    BROKEN_PICTURES[damage](arrays)
    np.savez(buffer := io.BytesIO(), **arrays)
    for content in (buffer.getvalue(), buffer.getvalue()[:200], b"", b"x"):
        folder.write(pictures.FILE, content)
        assert pictures.read_pictures(folder, plan.study.pictures, len(NAMES)) is None


def test_cells_that_an_older_version_measured_stay_measured(tmp_path):
    """Their options say `linear: false` beside the protocols, and nothing of what did not exist then."""
    plan, folder = (
        small(metrics=["student.knn20"], config={"evaluate.linear": False}),
        RunFolder(str(tmp_path)),
    )
    cell = plan.cells[0]
    write_cell(plan, folder, cell)
    run = cell_folder(folder, cell)
    saved = yaml.safe_load(run.read("config.yaml"))
    del saved["evaluate"]["along"]
    saved["evaluate"] |= {"linear": False, "protocols": [*saved["evaluate"]["protocols"], "linear"]}
    run.write("config.yaml", yaml.safe_dump(saved).encode())
    check_cells(plan, folder)
    saved["evaluate"]["linear"] = True
    run.write("config.yaml", yaml.safe_dump(saved).encode())
    with pytest.raises(UserError, match=r"evaluate\.protocols was .*'linear'.*, now"):
        check_cells(plan, folder)
