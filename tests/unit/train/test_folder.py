"""A run folder holds complete files only, and reads nothing that could run code."""

import errno
import io
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from isd_ray.config import Config
from isd_ray.data.index import root, with_metadata
from isd_ray.data.scan import SCHEMA
from isd_ray.errors import MachineError, UserError
from isd_ray.train.folder import (
    RunFolder,
    checkpoint_names,
    load_checkpoint,
    read_lines,
    read_saved,
    read_table,
    save_checkpoint,
    saved_config,
)


def state(step, **more):
    """What a checkpoint holds, but for what the test is about."""
    return {"step": step, "method": {}, "optimizer": {}, "queue": None, "bank": None} | more


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
        save_checkpoint(folder, state(step, weight=torch.full((2,), float(step))), keep=2)
    assert checkpoint_names(folder) == ["step-00000050.pt", "step-00000500.pt"]
    assert load_checkpoint(folder)["weight"].tolist() == [500.0, 500.0]
    assert load_checkpoint(folder, "step-00000050.pt")["step"] == 50
    with pytest.raises(UserError, match="step-00000050"):
        load_checkpoint(folder, "step-00000005.pt")


def test_half_written_checkpoint_is_not_seen(folder):
    save_checkpoint(folder, state(1), keep=2)
    folder.write("checkpoints/step-00000002.pt.part", b"half")
    assert load_checkpoint(folder)["step"] == 1


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_checkpoint_never_runs_code(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    save_checkpoint(folder, state(1, bomb=Bomb()), keep=1)
    with pytest.raises(UserError, match=r"step-00000001\.pt"):
        load_checkpoint(folder)
    assert not (tmp_path / "exploded").exists()


def test_a_checkpoint_with_a_changed_byte_is_refused(folder):
    name = save_checkpoint(folder, state(1, weight=torch.arange(4096.0)), keep=1)
    good = folder.read(f"checkpoints/{name}")
    middle = good.index(torch.arange(1000.0, 1010.0).numpy().tobytes())
    folder.write(f"checkpoints/{name}", good[:middle] + b"\x55" + good[middle + 1 :])
    with pytest.raises(UserError, match="bytes have changed"):
        load_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04" + bytes(60)])
def test_a_damaged_checkpoint_is_one_line_with_the_remedy(folder, content):
    folder.write("checkpoints/step-00000001.pt", content)
    with pytest.raises(UserError, match=r"step-00000001\.pt cannot be read .* remove that file") as error:
        load_checkpoint(folder)
    assert len(str(error.value).splitlines()) == 1
    assert "weights_only" not in str(error.value)


def test_a_checkpoint_of_something_else_is_refused(folder):
    save_checkpoint(folder, {"step": 1, "weights": torch.zeros(1)}, keep=1)
    with pytest.raises(UserError, match="no checkpoint of a run"):
        load_checkpoint(folder)


def test_a_folder_under_parameters_keeps_them_at_the_end():
    folder = RunFolder("s3://bucket/runs?endpoint_override=127.0.0.1:1&scheme=http").sub("a", "b")
    assert folder.uri == "s3://bucket/runs/a/b?endpoint_override=127.0.0.1:1&scheme=http"
    assert folder.name == "b"
    assert folder.path == "bucket/runs/a/b"


def test_a_full_disk_is_a_failure_of_the_machine_and_leaves_the_file_as_it_was(folder, monkeypatch):
    folder.write("x", b"old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match="the disk is full; free some space"):
        folder.write("x", b"new")
    assert folder.read("x") == b"old"
    assert folder.names() == ["x"]


def test_a_file_in_the_way_is_a_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file") as error:
        RunFolder(str(tmp_path / "file" / "run")).write("x", b"1")
    assert error.value.exit_code == 2


def test_a_torn_line_is_left_out(folder):
    folder.write("rows.jsonl", b'{"step": 1, "a": 0.5}\n[2]\n{"step": 3, "a": null}\n{"step"')
    assert read_lines(folder, "rows.jsonl") == [{"step": 1, "a": 0.5}, {"step": 3, "a": None}]
    assert read_lines(folder, "none.jsonl") == []


@pytest.mark.parametrize(
    "row", [{"a": 1}, {"step": "1"}, {"step": -1}, {"step": True}, {"step": 1, "a": "b"}, {"step": 1, "a": 1e300},
            {"step": 1, "a": float("nan")}, {"step": 1, "a": [1]}, {"step": 10**20}, 1, None],
)  # fmt: skip
def test_a_line_that_is_no_row_of_numbers_is_left_out(folder, row):
    folder.write("rows.jsonl", f'{json.dumps(row)}\n{{"step": 2}}\n'.encode())
    assert read_lines(folder, "rows.jsonl") == [{"step": 2}]


BROKEN = ["", "a: [", "x", "\0", "- 1\n", "[" * 3000, "data: 1\n", "a: &a {b: *a}", "data: {}\n1: 2\n"]


@pytest.mark.parametrize("text", BROKEN)
def test_damaged_options_are_one_line(folder, text):
    folder.write("config.yaml", text.encode())
    for read in (read_saved, saved_config):
        with pytest.raises(UserError, match=r"config\.yaml is damaged") as error:
            read(folder)
        assert str(error.value).count("config.yaml") == 1


def test_options_that_no_run_can_have_are_damage(folder):
    values = Config().model_dump() | {"train": {"epochs": "many"}}
    folder.write("config.yaml", yaml.safe_dump(values).encode())
    assert read_saved(folder)["train"] == {"epochs": "many"}
    with pytest.raises(UserError, match=r"config\.yaml is damaged \(--train\.epochs 'many'"):
        saved_config(folder)


def test_a_folder_where_a_file_should_be_is_a_mistake(folder):
    folder.make("config.yaml")
    with pytest.raises(UserError, match="that is a folder") as error:
        read_saved(folder)
    assert error.value.exit_code == 2


INDEX = pa.table(
    {
        "shard": ["a.tar"],
        "key": ["k"],
        "offset": [512],
        "size": [9],
        "label": [0],
        "width": [8],
        "height": [8],
    }
).cast(SCHEMA)


@pytest.mark.parametrize(
    "damage",
    [
        lambda table: table.drop_columns("label"),
        lambda table: table.replace_schema_metadata(None),
        lambda table: table.set_column(4, "label", [["x"]]),
        lambda table: with_metadata(table, "/x", []),  # a label without a name
        lambda table: table.set_column(0, "shard", [["../x.tar"]]),
    ],
)
def test_a_damaged_table_of_images_is_one_line(folder, damage):
    whole = with_metadata(INDEX, "/somewhere", ["cat"])
    pq.write_table(whole, sink := io.BytesIO())
    folder.write("selection.parquet", sink.getvalue())
    assert root(read_table(folder, "selection.parquet")) == "/somewhere"
    pq.write_table(damage(whole), sink := io.BytesIO())
    for content in (sink.getvalue(), sink.getvalue()[:-20], b""):
        folder.write("selection.parquet", content)
        with pytest.raises(UserError, match=r"selection\.parquet .*; put it back as it was"):
            read_table(folder, "selection.parquet")
    folder.remove("selection.parquet")
    with pytest.raises(UserError, match="is gone"):
        read_table(folder, "selection.parquet")
