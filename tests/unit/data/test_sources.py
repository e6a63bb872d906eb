"""Sources: every kind yields the same samples, whole or in slices, and says in one line what is wrong."""

import io
import pickle
import sys
import types

import broken as b
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from isd_ray.data import index, torchvision_sets
from isd_ray.data.shards import make_shards
from isd_ray.data.sources import open_source, png
from isd_ray.errors import UserError


def picture(seed=0, size=6):
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)
    return png(Image.fromarray(pixels))


IMAGES = [picture(i) for i in range(10)]
LABELS = [i % 3 for i in range(10)]
NAMES = ["ant", "bee", "cow"]


def samples(source):
    return [(s.image, s.label) for s in source]


EXPECTED = list(zip(IMAGES, LABELS, strict=True))


def as_folder(tmp_path):
    for i, (image, label) in enumerate(EXPECTED):
        place = tmp_path / NAMES[label] / "deep"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.v1.PNG").write_bytes(image)
    (tmp_path / "ant" / ".hidden.png").write_bytes(b"x")
    (tmp_path / "ant" / "notes.txt").write_text("x")
    return str(tmp_path)


def parquet(path, columns, metadata=None, rows=4):
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=rows)


def as_parquet(tmp_path):
    for name, part in (("a", slice(0, 7)), ("b", slice(7, 10))):
        columns = {
            "key": [f"train/{i}.png" for i in range(10)][part],
            "label": LABELS[part],
            "label_name": [NAMES[i] for i in LABELS][part],
            "image": IMAGES[part],
        }
        parquet(tmp_path / f"x_{name}.parquet", columns)
    return str(tmp_path / "x_*.parquet")


def as_hugging_face(tmp_path):
    info = b'{"info": {"features": {"label": {"names": ["ant", "bee", "cow"], "_type": "ClassLabel"}}}}'
    image = [{"bytes": b, "path": None} for b in IMAGES]
    parquet(tmp_path / "hf.parquet", {"image": image, "label": LABELS}, {b"huggingface": info})
    return str(tmp_path)


def as_named_labels(tmp_path):
    parquet(tmp_path / "n.parquet", {"image": IMAGES, "label": [NAMES[i] for i in LABELS]})
    return str(tmp_path / "n.parquet")


def as_tars(tmp_path):
    make_shards(as_parquet(tmp_path), str(tmp_path / "out"), shard_size=4, workers=0)
    return f"tars:{tmp_path / 'out' / 'train'}"


@pytest.mark.parametrize("make", [as_parquet, as_hugging_face, as_named_labels, as_tars])
def test_samples_and_slices(tmp_path, make):
    source = open_source(make(tmp_path))
    assert source.classes == NAMES
    assert len(source) == 10
    assert samples(source) == EXPECTED
    for start, stop in [(0, 3), (2, 9), (5, 8), (9, 10), (7, 20)]:
        part = pickle.loads(pickle.dumps(source.slice(start, stop)))
        assert samples(part) == EXPECTED[start:stop]
        assert part.names() == source.names()[start:stop]
        assert [s.key for s in part] == part.names()
        assert samples(part.slice(1, 2)) == EXPECTED[start:stop][1:2]


def test_folder_with_classes(tmp_path):
    source = open_source(as_folder(tmp_path))
    assert source.classes == NAMES
    assert sorted(samples(source)) == sorted(EXPECTED)
    assert source.names()[0] == "ant/deep/0.v1.PNG"
    assert samples(source.slice(3, 6)) == samples(source)[3:6]
    assert samples(open_source(f"file://{tmp_path}")) == samples(source)


def test_flat_folder_is_unlabelled(tmp_path):
    for i, image in enumerate(IMAGES):
        (tmp_path / f"{i}.png").write_bytes(image)
    source = open_source(f"folder:{tmp_path}")
    assert samples(source) == [(i, None) for i in IMAGES]
    assert source.classes == []


def test_unlabelled_parquet(tmp_path):
    parquet(tmp_path / "u.parquet", {"img": IMAGES})
    source = open_source(str(tmp_path / "u.parquet"), image_column="img", label_column="none")
    assert samples(source) == [(i, None) for i in IMAGES]


def test_null_and_negative_labels_are_none(tmp_path):
    parquet(tmp_path / "u.parquet", {"image": IMAGES[:3], "label": [None, -1, 2]})
    source = open_source(str(tmp_path / "u.parquet"))
    assert [s.label for s in source] == [None, None, 2]
    assert source.classes == ["0", "1", "2"]


def test_digits_are_split_and_enlarged():
    train, test = (open_source("sklearn:digits", split=s) for s in ("train", "test"))
    assert len(train) + len(test) == 1797
    first = next(iter(test))
    with Image.open(io.BytesIO(first.image)) as image:
        assert image.size == (32, 32)
    counts = np.bincount([s.label for s in test.slice(0, 360)])
    assert len(counts) == 10
    assert counts.min() > 20


def test_embedded_images_come_from_their_module(monkeypatch):
    module = types.ModuleType("isd_ray.data.embedded")
    module.CLASSES = ["a", "b"]
    module.make = lambda split, seed: (np.full((4, 8, 8, 3), seed, np.uint8), np.array([0, 1, 0, 1]))
    monkeypatch.setitem(sys.modules, "isd_ray.data.embedded", module)
    source = open_source("embedded:textures", split="bank", seed=77)
    assert source.classes == ["a", "b"]
    sample = next(iter(source.slice(1, 2)))
    assert (sample.key, sample.label) == ("bank/0000001", 1)
    assert np.asarray(Image.open(io.BytesIO(sample.image))).tolist() == np.full((8, 8, 3), 77).tolist()


def test_torchvision_arrays_become_png():
    pytest.importorskip("torchvision")
    data = torchvision_sets.build("FakeData", "test", None, download=False)
    source = open_source("torchvision:FakeData", split="test")
    assert len(source) == len(data) == 200
    assert source.classes == [str(i) for i in range(10)]
    for i, sample in zip(range(5, 8), source.slice(5, 8), strict=True):
        image, label = data[i]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample.image))), np.asarray(image))
        assert sample.label == int(label)


def test_torchvision_files_are_kept_as_they_are(tmp_path):
    as_folder(tmp_path / "eurosat" / "2750")
    (tmp_path / "eurosat" / "2750" / "ant" / ".hidden.png").unlink()  # torchvision would take it
    source = open_source("torchvision:EuroSAT", root=str(tmp_path))
    assert source.classes == NAMES
    assert sorted(samples(source)) == sorted(EXPECTED)


def nested(root, *paths):
    for i, path in enumerate(paths):
        place = root / f"{path}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(IMAGES[i])
    return str(root)


def test_classes_below_folders_that_group_them(tmp_path):
    """As iNaturalist 2018 is published: SUPERCATEGORY/CLASS/IMAGE."""
    where = nested(tmp_path / "outer" / "set", "Plants/7/a", "Plants/12/a", "Birds/3/b", "Birds/3/deep/c")
    source = open_source(f"folder:{where}/*")
    assert source.classes == ["12", "3", "7"]
    found = {name: source.classes[s.label] for name, s in zip(source.names(), source, strict=True)}
    assert found == {
        "Plants/7/a.png": "7", "Plants/12/a.png": "12", "Birds/3/b.png": "3", "Birds/3/deep/c.png": "3",
    }  # fmt: skip
    assert open_source("folder:./*", root=where).classes == source.classes
    assert open_source(f"folder:{tmp_path}/outer/*/*").classes == source.classes
    assert open_source(f"folder:{where}").classes == ["Birds", "Plants"]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["a/1", "b/2"], "no class folder in the folders of"),
        (["a/x/1", "b/2"], "holds both images and class folders, e.g. 'b/2.png'"),
        (["a/x/1", "b/x/2", "b/y/3"], "has 2 classes of the name 'x'"),
    ],
)
def test_what_is_wrong_with_nested_classes_is_said(tmp_path, paths, message):
    with pytest.raises(UserError, match=message):
        open_source(f"folder:{nested(tmp_path, *paths)}/*")


def test_inaturalist_of_torchvision_has_class_names_and_its_own_files(tmp_path):
    pytest.importorskip("torchvision")
    nested(tmp_path / "2018", "Birds/0/b", "Plants/1/a", "Plants/1/c")
    source = open_source("torchvision:INaturalist", split="2018", root=str(tmp_path))
    assert source.classes == ["Birds/0", "Plants/1"]
    assert sorted(samples(source), key=lambda s: IMAGES.index(s[0])) == [
        (IMAGES[0], 0),
        (IMAGES[1], 1),
        (IMAGES[2], 1),
    ]


def test_every_torchvision_set_of_the_table_exists():
    import inspect

    from torchvision import datasets

    for name, splits in torchvision_sets.SETS.items():
        known = inspect.signature(getattr(datasets, name)).parameters
        for arguments in splits.values():
            assert set(arguments) <= set(known) or "kwargs" in known, name


def test_torchvision_without_network_says_so(tmp_path, monkeypatch):
    from urllib.error import URLError

    from torchvision.datasets import cifar

    def refuse(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(cifar, "download_and_extract_archive", refuse)
    with pytest.raises(UserError, match=r"cannot download torchvision:CIFAR10 .*is there a network"):
        open_source("torchvision:CIFAR10", root=str(tmp_path), download=True)
    with pytest.raises(UserError, match=r"or allow the download \(--download\)"):
        open_source("torchvision:CIFAR10", root=str(tmp_path))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("torchvision:CIFAR1", {"root": "/x"}, "Did you mean 'CIFAR10'"),
        ("torchvision:CIFAR10", {}, "needs a root"),
        ("torchvision:EuroSAT", {"split": "test", "root": "/x"}, "no split 'test': there are train"),
        ("torchvison:CIFAR10", {}, "Did you mean 'torchvision'"),
        ("sklearn:digit", {}, "there are sklearn:digits"),
        ("sklearn:digits", {"split": "bank"}, "no split 'bank'"),
        ("/nothing/here", {}, "no data at '/nothing/here'"),
        ("/nothing/here*.parquet", {}, "no folder at '/nothing'"),
        ("tars:/nothing/a.tar", {}, "give the folder"),
    ],
)
def test_what_is_wrong_is_said(source, options, message):
    with pytest.raises(UserError, match=message):
        open_source(source, **options)


def test_missing_columns_list_those_there_are(tmp_path):
    parquet(tmp_path / "u.parquet", {"img": IMAGES, "y": LABELS})
    place = str(tmp_path / "u.parquet")
    with pytest.raises(UserError, match=r"no image column 'image' .* it has img, y"):
        open_source(place)
    with pytest.raises(
        UserError, match=r"no label column 'label' .*: it has img, y; name yours with --label-column"
    ):
        open_source(place, image_column="img")
    with pytest.raises(UserError, match="is int64, not image bytes"):
        open_source(place, image_column="y", label_column="y")
    (tmp_path / "u.parquet").write_bytes(b"text")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        open_source(place)


def test_folders_that_are_no_data(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image under"):
        open_source(str(tmp_path / "empty"))
    as_folder(tmp_path / "mixed")
    (tmp_path / "mixed" / "stray.png").write_bytes(IMAGES[0])
    with pytest.raises(UserError, match=r"both images and class folders, e.g. 'stray.png'"):
        open_source(str(tmp_path / "mixed"))


def test_tars_without_an_index_are_indexed(tmp_path, capsys):
    place = as_tars(tmp_path)
    (tmp_path / "out" / "train" / index.FILE_NAME).unlink()
    assert samples(open_source(place)) == EXPECTED
    assert "bad samples" not in capsys.readouterr().out


def test_bad_samples_of_tars_without_an_index_are_said_to_be_left_out(tmp_path, capsys):
    members = [m for i in range(150) for m in b.sample(f"{i:03d}")]
    (tmp_path / "s.tar").write_bytes(b.tar(*members, ("x\x1b.cls", b"1")))
    assert len(open_source(f"tars:{tmp_path}")) == 150
    said = capsys.readouterr().out
    assert r"1 bad samples left out, e.g. s.tar x\x1b: no image member" in said
    assert said.strip().isprintable()
