"""Lists of files: published ones are read as they are; a missing file is never another one."""

import numpy as np
import pytest
from published_lists import TOTALS, sizes, stems, text, write
from test_imbalance import keys, make

from isd_ray.data import index
from isd_ray.data.imbalance import published_classes, subset
from isd_ray.errors import UserError


def imagenet(name: str, prefix: str = ""):
    """An index of the listed images of D1..D10 and 20 others of each class."""
    listed = stems(name)
    stored = {c: [*files, *(f"{c}/{c}_{i}" for i in range(20_000, 20_020))] for c, files in listed.items()}
    counts = [len(files) for files in stored.values()]
    names = [prefix + stem for files in stored.values() for stem in files]
    return make(counts, list(stored), shuffle=False, keys=names)


@pytest.mark.parametrize("name", TOTALS)
def test_d1_to_d10_are_read_as_they_are_published(tmp_path, name):
    table = imagenet(name)
    chosen = subset(table, "list", files=write(tmp_path, name))
    assert len(chosen) == TOTALS[name]
    assert dict(zip(index.classes(chosen), index.class_counts(chosen).tolist(), strict=True)) == sizes(name)
    assert keys(chosen) == {stem for files in stems(name).values() for stem in files}
    assert (np.diff(chosen["offset"].to_numpy()) > 0).all()


def test_the_written_lists_have_the_published_form():
    lines = text("D1").splitlines()
    assert lines[0] == "class names : "
    assert lines[39] == "Train Images: "
    assert len(lines) == 13_400 + 40
    large = [f"n{w}" for w in published_classes()["D1"]["large"].split()]
    assert lines[1:9] == large, "the large classes are the first by WordNet id"
    assert lines[40].startswith("/train/n01498041/n01498041_")
    assert lines[40].endswith(".JPEG")


@pytest.mark.parametrize("prefix", ["train/", "data/in/", "images/train/"])
def test_a_published_list_matches_by_class_folder_and_file(tmp_path, prefix):
    table = imagenet("D1", prefix)
    chosen = subset(table, "list", files=write(tmp_path, "D1", count=3))
    assert keys(chosen) == {prefix + stem for files in stems("D1").values() for stem in files[:3]}


@pytest.mark.parametrize("name", ["D1", "D7"])
def test_an_image_that_is_not_there_is_refused_or_skipped(tmp_path, name):
    table = imagenet(name)
    gone = stems(name)["n02033041"][5]
    whole = table["key"].to_pylist()
    table = table.take([i for i, key in enumerate(whole) if key != gone])
    files = write(tmp_path, name)
    with pytest.raises(UserError, match=rf"^1 of {TOTALS[name]} listed files .* e\.g\. '.*{gone}'$"):
        subset(table, "list", files=files)
    assert len(subset(table, "list", files=files, missing="skip")) == TOTALS[name] - 1


LINES = text("D1", count=2).splitlines()
HEADED = {  # what is no heading of the published form is a file, or the list is refused
    "another heading": (["Class Names :", *LINES[1:]], "'Class Names :'"),
    "a heading in the middle": ([*LINES[:50], "Val Images: ", *LINES[50:]], "e.g. 'Val Images:'"),
    "a heading twice": ([*LINES, LINES[0]], "e.g. 'class names :'"),
    "a class among the files": ([*LINES, "n01498041"], "e.g. 'n01498041'"),
    "classes without their heading": (LINES[1:39] + LINES[40:], "38 of 114 listed files"),
    "no heading above the files": (LINES[:39] + LINES[40:], "has no line 'Train Images:'"),
    "a file among the classes": (
        [*LINES[:5], LINES[45], *LINES[5:]],
        "stands among the class names, before 'Train Images:'",
    ),
    "cut in its heading": (LINES[:20], "has no line 'Train Images:'"),
    "cut in its files": (LINES[:100], "has no file of class 'n0.*', which its heading names; is it cut?"),
    "no file at all": (LINES[:40], "has no file of class 'n01498041'"),
    "prose": (["Please download", *LINES], "e.g. 'Please download'"),
}


@pytest.mark.parametrize("case", HEADED)
def test_headings_are_those_two_and_no_others(tmp_path, case):
    lines, words = HEADED[case]
    (tmp_path / "D1.txt").write_text("\n".join(lines))
    with pytest.raises(UserError, match=words) as error:
        subset(imagenet("D1"), "list", files=str(tmp_path / "D1.txt"))
    assert str(error.value).isprintable()


def test_a_label_behind_the_name_is_left_out(tmp_path):
    (tmp_path / "lt.txt").write_text("# of SDCLR\ntrain/a/a_7.JPEG 0\n\ntrain/b/b_1.JPEG 17\n")
    table = make([2, 1], ["a", "b"], shuffle=False, keys=["a/a_7", "a/a_8", "b/b_1"])
    assert keys(subset(table, "list", files=str(tmp_path / "lt.txt"))) == {"a/a_7", "b/b_1"}


def test_a_list_by_base_name_refuses_what_is_missing_or_ambiguous():
    table = make([2, 1], ["x", "y"], shuffle=False, keys=["a/1", "b/1", "b/2"])
    assert subset(table, "list", files=["2.png", "a/1"])["key"].to_pylist() == ["a/1", "b/2"]
    with pytest.raises(UserError, match="1 of 2 listed files are not in the index"):
        subset(table, "list", files=["1.png", "2.png"])
    assert len(subset(table, "list", files=["9.png", "2.png"], missing="skip")) == 1


def test_a_file_of_one_folder_never_stands_for_that_of_another():
    table = make([1, 1], ["ant", "bee"], shuffle=False, keys=["ant/1", "bee/3"])
    with pytest.raises(UserError, match=r"1 of 2 listed files .* 'ant/3'"):
        subset(table, "list", files=["ant/1.png", "ant/3.png"])
    flat = make([2], ["ant"], shuffle=False, keys=["1", "3"])
    assert len(subset(flat, "list", files=["ant/1.png", "ant/3.png"])) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n # x\n\n", "is empty"),
        (b"\xff\xfe\x00a", "no text in UTF-8"),
        (None, "no file at"),
    ],
)
def test_a_file_that_is_no_list_is_said(tmp_path, content, words):
    if content is not None:
        (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UserError, match=words):
        subset(make([2]), "list", files=str(tmp_path / "list.txt"))
