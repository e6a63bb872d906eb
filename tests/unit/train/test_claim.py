"""A folder belongs to what made it, and to one process at a time."""

import json
import subprocess
import sys

import pytest

from isd_ray.errors import UserError
from isd_ray.train import claim
from isd_ray.train.claim import KINDS, MARK, claimed, refuse_foreign
from isd_ray.train.folder import RunFolder


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path, kind):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "precious.txt").write_text("x")
    with pytest.raises(UserError, match="holds ray"), claimed(RunFolder(str(tmp_path)), kind):
        pass
    assert [p.name for p in tmp_path.rglob("*")] == ["ray", "precious.txt"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_another_kind_is_refused(tmp_path, kind):
    other = next(k for k in KINDS if k != kind)
    with claimed(RunFolder(str(tmp_path / "marked")), other):
        pass
    (tmp_path / "old").mkdir()
    for name in KINDS[other]:
        (tmp_path / "old" / name).write_text("")
    for name in ("marked", "old"):
        with pytest.raises(UserError, match=f"holds a {other}"):
            refuse_foreign(RunFolder(str(tmp_path / name)), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_somebody_with_the_name_of_ours_makes_no_folder_ours(tmp_path, kind):
    file, _ = KINDS[kind]
    (tmp_path / file).write_text("mine")
    with pytest.raises(UserError, match=f"holds {file}"), claimed(RunFolder(str(tmp_path)), kind):
        pass
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(file, "mine")]


def test_a_start_that_was_killed_at_once_leaves_the_folder_free(tmp_path):
    (tmp_path / MARK).write_text("")
    with claimed(RunFolder(str(tmp_path)), "run"):
        pass
    (tmp_path / MARK).write_text("mine")
    with pytest.raises(UserError, match="is no run of ours"), claimed(RunFolder(str(tmp_path)), "run"):
        pass


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(UserError, match="is a file"), claimed(RunFolder(str(tmp_path / "run")), "run"):
        pass


def test_one_process_at_a_time_and_again_when_it_has_ended(tmp_path):
    folder = RunFolder(str(tmp_path / "run"))
    with claimed(folder, "run"), pytest.raises(UserError, match="another process"), claimed(folder, "run"):
        pass
    with claimed(folder, "run"):
        pass


def test_a_killed_process_leaves_the_folder_free(tmp_path):
    code = (
        "import os, sys; from isd_ray.train.claim import claimed; from isd_ray.train.folder import RunFolder\n"
        "with claimed(RunFolder(sys.argv[1]), 'run'): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        folder = RunFolder(str(tmp_path / "run"))
        with pytest.raises(UserError, match=f"number {process.pid}"), claimed(folder, "run"):
            pass
        process.kill()
    with claimed(folder, "run"):
        pass


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A folder that is treated as a store: no locks of the operating system."""
    monkeypatch.setattr(claim, "RENEW", 0.05)
    monkeypatch.setattr(claim, "SILENT", 0.6)
    folder = RunFolder(str(tmp_path / "run"))
    folder.local = False
    return folder


def test_in_a_store_a_living_process_keeps_the_folder(store):
    with claimed(store, "run"), pytest.raises(UserError, match="another process"), claimed(store, "run"):
        pass
    assert json.loads(store.read(MARK)) == {"kind": "run"}


def test_in_a_store_a_silent_process_is_followed(store, capsys):
    store.write(MARK, json.dumps({"kind": "run", "host": "gone", "pid": 1, "token": "x"}).encode())
    with claimed(store, "run"):
        assert json.loads(store.read(MARK))["token"] != "x"
    assert "waiting up to" in capsys.readouterr().err
