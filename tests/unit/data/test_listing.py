"""Every file under a folder is listed once, whatever links there are; what is left out is said."""

import os
from collections import Counter

import broken as b
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isd_ray.data import files, listing
from isd_ray.data.files import list_files
from isd_ray.data.shards import make_shards
from isd_ray.data.sources import open_source
from isd_ray.errors import UserError

LATIN = b"caf\xe9"  # a name that is no UTF-8


@pytest.fixture
def images(tmp_path):
    """Two class folders of two images each."""
    for name in ("ant", "bee"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "set" / name / f"{i}.png").write_bytes(b.file(b.pixels(i)))
    return tmp_path / "set"


def one_line(error) -> bool:
    return str(error.value).isprintable()


def test_links_to_files_and_folders_elsewhere_are_followed(images, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.png").write_bytes(b.file())
    (images / "cow").symlink_to(tmp_path / "elsewhere")
    (images / "ant" / "linked.png").symlink_to(images / "bee" / "0.png")
    assert open_source(str(images)).names() == [
        "ant/0.png", "ant/1.png", "ant/linked.png", "bee/0.png", "bee/1.png", "cow/x.png"
    ]  # fmt: skip
    (tmp_path / "link").symlink_to(images)
    assert len(open_source(str(tmp_path / "link"))) == 6


@pytest.mark.parametrize(
    ("place", "target", "named"),
    [
        ("ant/up", "..", "'ant/up' and '.'"),
        ("ant/self", ".", "'ant/self' and 'ant'"),
        ("bee/other", "../ant", "'bee/other' and 'ant'"),
        ("aaa", "bee", "'.*aaa'"),
    ],
)
def test_a_folder_that_is_reached_twice_is_refused(images, place, target, named):
    (images / place).symlink_to(target)
    with pytest.raises(UserError, match=f"{named}.* are one folder by a link: .*; remove the link") as error:
        open_source(str(images))
    assert one_line(error)
    assert len(list_files(str(images), [""])) == 0  # not looked into


def test_two_links_to_a_parent_end_at_once(images):
    for name in ("up", "again"):
        (images / "ant" / name).symlink_to(images)
    with pytest.raises(UserError, match="are one folder by a link"):
        open_source(str(images))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=4),
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=8),
)
def test_no_tree_of_links_gives_a_file_twice_or_never_ends(tmp_path_factory, links, members):
    """Folders a .. f, some inside each other, links between them, and files and links to files in them."""
    root = tmp_path_factory.mktemp("tree")
    folders = [root / "a", root / "b", root / "a" / "c", root / "a" / "c" / "d", root / "e", root / "e" / "f"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for i, (at, hidden) in enumerate(members):
        (folders[at] / f"{'.' * hidden}{i}.png").write_bytes(b"x")
    for i, (at, to) in enumerate(links):
        (folders[at] / f"link{i}").symlink_to(folders[to])
    refused, names = "", []
    try:
        names = list_files(str(root), [".png"], recursive=True)
    except UserError as error:
        refused = str(error)
    places = Counter(os.path.realpath(root / name) for name in names)
    assert set(places.values()) <= {1}
    assert len(names) == sum(not hidden for _, hidden in members) or "are one folder by a link" in refused
    assert not refused or links


def test_broken_links_and_what_is_no_file_are_left_out_and_counted(images, capsys):
    (images / "ant" / "gone.png").symlink_to("nothing.png")
    (images / "ant" / "me.png").symlink_to("me.png")
    os.mkfifo(images / "ant" / "pipe.png")
    assert len(open_source(str(images))) == 4
    assert "3 files left out (2 broken links, 1 pipes, sockets or devices)" in capsys.readouterr().out


def test_files_of_other_kinds_are_left_out_with_one_line(images, capsys):
    for name in ("a.svg", "b.svg", "c.heic", "notes", "x.PDF"):
        (images / "ant" / name).write_bytes(b"x")
    (images / "ant" / ".hidden.svg").write_bytes(b"x")
    (images / "ant" / "\x1b[2J.\x1b").write_bytes(b"x")
    assert len(open_source(str(images))) == 4
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert said.strip().isprintable()
    assert "6 files left out (2 .svg, 1 " in said
    for part in ("1 .heic", "1 without a suffix", "1 .pdf", "1 .\\x1b"):
        assert part in said
    for name in ("a.svg", "b.svg", "c.heic", "notes", "x.PDF", "\x1b[2J.\x1b"):
        (images / "ant" / name).unlink()
    open_source(str(images))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", [LATIN + b".png", LATIN + b"/x.png"])
def test_names_that_are_no_utf8_are_refused_in_one_line(images, name):
    place = os.path.join(os.fsencode(images), name)
    os.makedirs(os.path.dirname(place), exist_ok=True)
    with open(place, "wb") as file:
        file.write(b.file())
    with pytest.raises(UserError, match=r"1 files .* no UTF-8, e.g. 'caf\\xe9.*': rename them") as error:
        open_source(f"folder:{images}")
    assert one_line(error)


def test_names_that_are_no_utf8_elsewhere_do_no_harm(images, tmp_path, capsys):
    for name in (LATIN, LATIN + b".txt"):
        with open(os.path.join(os.fsencode(images), name), "wb") as file:
            file.write(b"x")
    assert len(open_source(f"folder:{images}")) == 4
    assert "2 files left out" in capsys.readouterr().out
    assert list_files(str(images), [".tar"]) == []
    with pytest.raises(UserError, match="cannot open") as error:
        open_source(f"folder:{tmp_path}/{os.fsdecode(LATIN)}")
    assert one_line(error)


def test_too_many_files_and_too_deep_folders_are_refused(images, monkeypatch):
    deep = images.joinpath(*["d"] * (listing.DEPTH + 1))
    deep.mkdir(parents=True)
    with pytest.raises(UserError, match=f"more than {listing.DEPTH} folders deep") as error:
        open_source(str(images))
    assert one_line(error)
    monkeypatch.setattr(listing, "DEPTH", 10**6)
    assert len(open_source(str(images))) == 4
    monkeypatch.setattr(listing, "FILES", 3)
    with pytest.raises(UserError, match="more than 3 files under"):
        open_source(str(images))


def test_a_folder_without_permission_is_named(images, monkeypatch):
    scandir = os.scandir

    def refuse(place):
        if str(place).endswith("ant"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(listing.os, "scandir", refuse)
    with pytest.raises(UserError, match=r"Permission denied .*no permission") as error:
        open_source(str(images))
    assert one_line(error)


def test_an_image_larger_than_any_is_left_out_and_not_held(images, tmp_path, monkeypatch):
    with open(images / "ant" / "huge.png", "wb") as file:
        file.write(b.file())
        file.truncate(2**21)
    monkeypatch.setattr("isd_ray.data.sources.MAX_BYTES", 2**20)
    monkeypatch.setattr("isd_ray.data.shards.MAX_BYTES", 2**20)
    sizes = []
    read = files.read_bytes
    monkeypatch.setattr("isd_ray.data.sources.read_bytes", lambda *a: sizes.append(len(x := read(*a))) or x)
    table = make_shards(str(images), str(tmp_path / "out"), workers=0, max_bad=0.5)
    assert len(table) == 4
    assert max(sizes) == 2**20 + 1
    assert "more than 1048576 bytes" in (tmp_path / "out" / "train" / "bad_samples.jsonl").read_text()
