"""A sweep's folder that is damaged, full or of another space: one line says so, and nothing is lost."""

import errno
import json
import os

import pytest
from test_sweep_search import GOALS, SPACE, play, rows_of, search_in, state_of

from isd_ray.ending import run_job
from isd_ray.errors import UserError
from isd_ray.room import local_cpus
from isd_ray.sweep import run
from isd_ray.sweep.check import check
from isd_ray.sweep.journal import FILE, FolderJournal
from isd_ray.sweep.results import collect
from isd_ray.sweep.space import Space
from isd_ray.train.folder import RunFolder
from jobs.sweep import main


def test_a_journal_that_lost_a_line_in_its_middle_is_named(tmp_path):
    search = search_in(tmp_path, budget={"trials": 3, "epochs": 8})
    play(search)
    lines = (tmp_path / FILE).read_text().splitlines(keepends=True)
    for changed, number in ((lines[1:], 1), ([*lines[:5], *lines[6:]], 6), (['["x"]\n'], 1)):
        (tmp_path / FILE).write_text("".join(changed))
        with pytest.raises(UserError, match=rf"journal.jsonl: line {number} is damaged or one before it"):
            search_in(tmp_path, budget={"trials": 3, "epochs": 8})
    (tmp_path / FILE).write_text("".join([*lines[:-1], '[{"op_code":99}]\n']))
    with pytest.raises(UserError, match=r"journal.jsonl: its lines do not fit together"):
        search_in(tmp_path, budget={"trials": 3, "epochs": 8})


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    """What was written before is read again, and what comes after the disk has room again is whole."""
    journal = FolderJournal(RunFolder(str(tmp_path)))
    journal.append_logs([{"a": 1}])
    real = os.fsync

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        journal.append_logs([{"b": 2}])
    monkeypatch.setattr(os, "fsync", real)
    assert (tmp_path / FILE).read_text() == '[{"a":1,"line":1}]\n'
    FolderJournal(RunFolder(str(tmp_path))).append_logs([{"c": 3}])
    assert FolderJournal(RunFolder(str(tmp_path))).entries == [{"a": 1, "line": 1}, {"c": 3, "line": 2}]


def test_a_goal_that_is_never_measured_fails_the_trial_and_not_the_sweep(tmp_path):
    search = search_in(tmp_path, budget={"trials": 2, "epochs": 8}, goals=["teacher.knn20"])
    while not isinstance(job := search.next(), str):
        assert job is not None
        assert search.heard(job, rows_of(job, GOALS)[0]), "a trial without its goal need not go on"
        search.ended(job, None)
    with pytest.raises(UserError, match=r"no trial got to its end \(teacher.knn20 was not measured\)"):
        collect(search)


def test_the_job_says_in_one_line_what_is_wrong_and_exits_with_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run.session, "is_local", lambda _: True)
    space, many = tmp_path / "space.yaml", (os.cpu_count() or 1) + 1
    content = {"space": {"train.lr": {"uniform": [0.01, 0.1]}}, "resources": {"cpus": many}}
    space.write_text(json.dumps(content))
    (tmp_path / "file").write_text("")
    for arguments, said in (
        (
            ["--output", str(tmp_path)],
            f"resources: a trial takes {many} CPUs and this machine has {many - 1}; lower",
        ),
        (["--output", str(tmp_path / "file")], f"{tmp_path}/file/sweep-space: "),
        (["--output", str(tmp_path), "--trials", "0"], "--trials 0: give 1 or more"),
    ):
        assert run_job(main, ["--space", str(space), *arguments]) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"error: {said}")
        assert line.count("\n") == 1


def test_a_trial_of_several_workers_is_measured_against_the_machine(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(run.session, "is_local", lambda _: True)

    def cpus(workers: int, *, cpus: int, concurrent: int | None = None) -> int:
        return local_cpus("trial", cpus, concurrent, workers, None)

    assert cpus(2, cpus=3, concurrent=1) == 6
    assert cpus(0, cpus=2, concurrent=4) == 8
    assert cpus(0, cpus=2, concurrent=10**9) == 8, "a local Ray must not count CPUs without end"
    with pytest.raises(UserError, match="takes 9 CPUs and this machine has 8"):
        cpus(3, cpus=3)


def test_a_folder_whose_space_is_damaged_or_gone_is_not_continued(tmp_path):
    plan, folder = check(Space(**SPACE)), RunFolder(str(tmp_path))
    run.check_same(plan, folder)
    for content in ("", "a: [", "config: 3\n", "[]"):
        (tmp_path / "space.yaml").write_text(content)
        with pytest.raises(UserError, match=r"space.yaml is damaged"):
            run.check_same(plan, folder)
    (tmp_path / "space.yaml").unlink()
    search = search_in(tmp_path)
    before = state_of(search)
    with pytest.raises(UserError, match=r"space.yaml is gone"):
        run.check_same(plan, folder)
    assert state_of(search_in(tmp_path)) == before
