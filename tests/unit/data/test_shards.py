"""Shards: bytes are kept, the same bytes come out every time, a stopped run continues, parameters are not mixed."""

import hashlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from isd_ray import ending
from isd_ray.data import index, shards
from isd_ray.data.shards import make_shards, unique_keys
from isd_ray.errors import MachineError, UserError

JOB = Path(__file__).parents[3] / "jobs" / "make_shards.py"


def write_images(folder, n=23, classes=("ant", "bee")):
    rng = np.random.default_rng(0)
    for i in range(n):
        place = folder / classes[i % len(classes)]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (5, 4, 3), np.uint8)).save(place / f"x.{i:03d}.png")
    return str(folder)


def content(folder):
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in Path(folder).iterdir()
        if p.suffix == ".tar"
    }


def make(source, out, **options):
    return make_shards(source, str(out), shard_size=5, workers=0, **options)


def test_shards_hold_the_source_byte_for_byte(tmp_path):
    source = write_images(tmp_path / "in")
    table = make(source, tmp_path / "out")
    assert table.equals(index.read_index(str(tmp_path / "out" / "train")), check_metadata=True)
    assert table["shard"].unique().to_pylist() == [f"train-{i:06d}.tar" for i in range(5)]
    assert index.classes(table) == ["ant", "bee"]
    assert index.class_counts(table).tolist() == [12, 11]
    originals = {p.read_bytes() for p in Path(source).rglob("*.png")}
    pattern = str(tmp_path / "out" / "train" / "train-{000000..000004}.tar")
    read = list(webdataset.WebDataset(pattern, shardshuffle=False))
    assert {s["png"] for s in read} == originals
    assert [s["__key__"] for s in read] == table["key"].to_pylist()
    assert [int(s["cls"]) for s in read] == index.labels(table).tolist()


def test_the_same_arguments_write_the_same_bytes(tmp_path):
    source = write_images(tmp_path / "in")
    make(source, tmp_path / "a")
    make(source, tmp_path / "b")
    assert content(tmp_path / "a" / "train") == content(tmp_path / "b" / "train")


def test_a_stopped_run_continues_and_keeps_what_is_whole(tmp_path, monkeypatch):
    source = write_images(tmp_path / "in")
    whole = make(source, tmp_path / "whole")
    write = shards._write

    def stop(part, keys, path, shard):
        if shard == "train-000003.tar":
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        return write(part, keys, path, shard)

    monkeypatch.setattr(shards, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        make(source, tmp_path / "out")
    folder = tmp_path / "out" / "train"
    assert sorted(p.name for p in folder.iterdir()) == [
        "make_shards.json",
        *(f"train-{i:06d}.tar" for i in range(3)),
    ]
    cut = folder / "train-000001.tar"
    cut.write_bytes(cut.read_bytes()[:3000])
    written = []
    monkeypatch.setattr(shards, "_write", lambda *a: written.append(a[3]) or write(*a))
    again = make(source, tmp_path / "out")
    assert written == ["train-000001.tar", "train-000003.tar", "train-000004.tar"]
    assert again.equals(whole)
    assert content(folder) == content(tmp_path / "whole" / "train")


@pytest.mark.parametrize("change", ["size", "source", "name"])
def test_other_parameters_are_refused(tmp_path, change):
    source = write_images(tmp_path / "in")
    make(source, tmp_path / "out")
    before = content(tmp_path / "out" / "train")
    options = {"name": "other"} if change == "name" else {}
    if change == "source":
        write_images(tmp_path / "in", n=30)
    with pytest.raises(UserError, match="made with other parameters") as error:
        make_shards(
            source, str(tmp_path / "out"), shard_size=6 if change == "size" else 5, workers=0, **options
        )
    assert "\n" not in str(error.value)
    assert content(tmp_path / "out" / "train") == before


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 10**5, "\x1b[2J"])
def test_a_damaged_description_is_refused_in_one_line(tmp_path, content):
    source = write_images(tmp_path / "in")
    make(source, tmp_path / "out")
    (tmp_path / "out" / "train" / "make_shards.json").write_text(content)
    with pytest.raises(UserError, match=r"make_shards.json' is damaged: give another --out") as error:
        make(source, tmp_path / "out")
    assert str(error.value).isprintable()


def test_a_shard_that_cannot_be_read_back_is_the_disks_fault(tmp_path, monkeypatch):
    entry = {"shard": "x", "key": None, "reason": "truncated", "rows": 0}
    monkeypatch.setattr(index, "index_shard", lambda *_: (index.SCHEMA.empty_table(), [entry]))
    with pytest.raises(MachineError, match=r"cannot be read back \(truncated\): check the disk, start again"):
        make(write_images(tmp_path / "in"), tmp_path / "out")


def test_labels_and_names_that_no_shard_can_hold_cost_their_image_alone(tmp_path, monkeypatch):
    write_images(tmp_path / "in")
    images = [p.read_bytes() for p in sorted((tmp_path / "in").rglob("*.png"))[:4]]
    labels, keys = [0, 1, 3, 1], ["a", "b", "c", "d" * 10**6]
    pq.write_table(pa.table({"image": images, "label": labels, "key": keys}), tmp_path / "x.parquet")
    monkeypatch.setattr(shards.scan, "LABELS", 3)
    table = make(str(tmp_path / "x.parquet"), tmp_path / "out", max_bad=0.5)
    assert table["key"].to_pylist() == ["a", "b", "d" * 4096]
    (line,) = (tmp_path / "out" / "train" / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "label 3 is larger than 2"


def test_foreign_tars_are_not_mixed_in(tmp_path):
    source = write_images(tmp_path / "in")
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "x.tar").write_bytes(b"")
    with pytest.raises(UserError, match="make_shards did not write"):
        make(source, tmp_path / "out")


def test_bad_images_are_listed_and_limited(tmp_path):
    source = write_images(tmp_path / "in")
    (tmp_path / "in" / "ant" / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"about 1 of 24 samples .*limit of 1.0%.*not an image"):
        make(source, tmp_path / "out")
    table = make(source, tmp_path / "out", max_bad=0.1)
    assert len(table) == 23
    listed = [
        json.loads(line)
        for line in (tmp_path / "out" / "train" / "bad_samples.jsonl").read_text().splitlines()
    ]
    assert [(b["key"], b["reason"]) for b in listed] == [("ant/broken", "not an image (8 bytes)")]
    assert len(make(source, tmp_path / "out", max_bad=0.1)) == 23


def test_resharding_keeps_the_images(tmp_path):
    first = make(write_images(tmp_path / "in"), tmp_path / "a")
    second = make_shards(f"tars:{tmp_path / 'a' / 'train'}", str(tmp_path / "b"), shard_size=8, workers=0)
    assert second["key"].equals(first["key"])
    assert second["label"].equals(first["label"])
    assert second["size"].equals(first["size"])
    assert len(content(tmp_path / "b" / "train")) == 3


@given(st.lists(st.text(alphabet="ab./\\ é\n_", max_size=8).map(lambda t: t + ".png"), max_size=20))
def test_keys_are_unique_and_safe(names):
    keys = unique_keys(names)
    assert len(set(keys)) == len(keys) == len(names)
    for key in keys:
        assert key
        assert key.isascii()
        assert not key.startswith("/")
        assert "." not in key.rsplit("/", 1)[-1]
        assert not set(key.split("/")) & {"", ".", ".."}
        assert not key.rsplit("/", 1)[-1].startswith("__")


def test_keys_stay_readable_where_nothing_collides():
    assert unique_keys(["train/n01/n01_7.JPEG", "../../etc/x.png", "a b.v2.jpg"]) == [
        "train/n01/n01_7", "etc/x", "a_b_v2",
    ]  # fmt: skip
    assert unique_keys(["a.png", "a.jpg", "b"]) == ["a~0", "a~1", "b"]


@pytest.mark.parametrize(
    ("options", "message"), [({"shard_size": 0}, "at least 1"), ({"split": "../x"}, "may hold letters")]
)
def test_refused_options(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        make_shards(write_images(tmp_path / "in"), str(tmp_path / "out"), workers=0, **options)


def test_real_images_are_kept_byte_for_byte(tmp_path, real_data):
    place = real_data / "imagenette224_part_val.parquet"
    if not place.exists():
        pytest.skip(f"no {place.name}")
    table = make_shards(str(place), str(tmp_path), split="val", shard_size=150, workers=0)
    original = pq.read_table(place, columns=["image", "label", "label_name"])
    assert index.labels(table).tolist() == original["label"].to_pylist()
    names = [index.classes(table)[i] for i in index.labels(table)]
    assert names == original["label_name"].to_pylist()
    for row in (0, 149, 150, 399):
        r = table.slice(row, 1).to_pylist()[0]
        tar = (tmp_path / "val" / r["shard"]).read_bytes()
        assert tar[r["offset"] : r["offset"] + r["size"]] == original["image"][row].as_py()
        assert max(r["width"], r["height"]) >= 160


def test_the_job_from_another_folder(tmp_path):
    write_images(tmp_path / "in")
    command = [sys.executable, str(JOB), "--source", "in", "--out", "out", "--workers", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "23 images of 2 classes" in done.stdout


def run_job(monkeypatch, *arguments):
    """Run the job in this process; return its exit code."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    return ending.run_job(runpy.run_path(str(JOB))["main"], list(map(str, arguments)))


def test_the_job_indexes_existing_tars(tmp_path, monkeypatch, capsys):
    make(write_images(tmp_path / "in"), tmp_path / "out")
    folder = tmp_path / "out" / "train"
    before = index.read_index(str(folder))
    (folder / "index.parquet").unlink()
    (tmp_path / "names.txt").write_text("A\nB\n")
    assert (
        run_job(monkeypatch, "--index-only", folder, "--workers", 0, "--classes", tmp_path / "names.txt") == 0
    )
    assert f"23 images of 2 classes: {folder}/index.parquet" in capsys.readouterr().out
    assert index.read_index(str(folder)).equals(before)
    assert index.classes(index.read_index(str(folder))) == ["A", "B"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--source", "/nothing", "--out", "x"],
        ["--index-only", "/nothing"],
        ["--source", "/nothing"],
        ["--index-only", ".", "--classes", "/nothing"],
        ["--source", "sklearn:digits", "--out", "x", "--shard-size", "0"],
    ],
)
def test_the_job_says_mistakes_in_one_line_with_code_2(monkeypatch, capsys, arguments):
    assert run_job(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("name", ["index.parquet", "bad_samples.jsonl", "train-000000.tar", "other.tar"])
def test_files_that_lie_where_shards_are_written_are_left_alone(tmp_path, name):
    source = write_images(tmp_path / "in")
    folder = tmp_path / "out" / "train"
    folder.mkdir(parents=True)
    (folder / name).write_text("mine")
    with pytest.raises(UserError, match=f"holds {name}, which make_shards did not write"):
        make(source, tmp_path / "out")
    assert [(p.name, p.read_text()) for p in folder.iterdir()] == [(name, "mine")]


def test_a_tar_of_other_samples_among_ours_is_left_alone(tmp_path):
    source, other = write_images(tmp_path / "in"), tmp_path / "other"
    make(source, tmp_path / "out")
    (other / "dog").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(other / "dog" / "theirs.png")
    make(str(other), tmp_path / "more")
    theirs = (tmp_path / "more" / "train" / "train-000000.tar").read_bytes()
    place = tmp_path / "out" / "train" / "train-000001.tar"
    for content in (theirs, b"mine"):
        place.write_bytes(content)
        with pytest.raises(UserError, match=r"train-000001\.tar' is no tar that make_shards wrote"):
            make(source, tmp_path / "out")
        assert place.read_bytes() == content


@pytest.mark.parametrize("content", [b"", bytes(4096)])
def test_a_shard_that_a_power_cut_has_emptied_is_made_anew(tmp_path, content):
    source = write_images(tmp_path / "in")
    whole = make(source, tmp_path / "out")
    (tmp_path / "out" / "train" / "train-000001.tar").write_bytes(content)
    assert make(source, tmp_path / "out").equals(whole)
