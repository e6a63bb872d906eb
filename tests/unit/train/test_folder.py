"""A run folder holds complete files only, and reads nothing that could run code."""

import os

import pytest
import torch

from isd_ray.errors import UserError
from isd_ray.train.folder import RunFolder, checkpoint_names, load_checkpoint, save_checkpoint


@pytest.fixture
def folder(tmp_path):
    return RunFolder(str(tmp_path / "run"))


def test_files_come_back(folder):
    folder.write("a/b.bin", b"one")
    folder.write("a/b.bin", b"two")
    folder.write_json("c.json", {"x": [1, 2]})
    assert folder.read("a/b.bin") == b"two"
    assert folder.read_json("c.json") == {"x": [1, 2]}
    assert folder.names("a") == ["b.bin"]
    assert not folder.exists("d")


def test_uri_and_path_are_the_same_place(tmp_path):
    RunFolder(f"file://{tmp_path}/run").write("x", b"1")
    assert RunFolder(str(tmp_path / "run")).read("x") == b"1"


def test_unknown_file_system_is_named():
    with pytest.raises(UserError, match="ftp://nowhere"):
        RunFolder("ftp://nowhere/runs")


def test_newest_checkpoint_is_loaded_and_old_ones_go(folder):
    assert load_checkpoint(folder) is None
    for step in (5, 50, 500):
        save_checkpoint(folder, {"step": step, "weight": torch.full((2,), float(step))}, keep=2)
    assert checkpoint_names(folder) == ["step-00000050.pt", "step-00000500.pt"]
    assert load_checkpoint(folder)["weight"].tolist() == [500.0, 500.0]
    assert load_checkpoint(folder, "step-00000050.pt")["step"] == 50
    with pytest.raises(UserError, match="step-00000050"):
        load_checkpoint(folder, "step-00000005.pt")


def test_half_written_checkpoint_is_not_seen(folder):
    save_checkpoint(folder, {"step": 1}, keep=2)
    folder.write("checkpoints/step-00000002.pt.part", b"half")
    assert load_checkpoint(folder)["step"] == 1


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_checkpoint_never_runs_code(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    save_checkpoint(folder, {"step": 1, "bomb": Bomb()}, keep=1)
    with pytest.raises(UserError, match=r"step-00000001\.pt"):
        load_checkpoint(folder)
    assert not (tmp_path / "exploded").exists()
