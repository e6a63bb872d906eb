"""A file of weights by anybody is loaded or refused in one line, and executes nothing."""

import argparse
import io
import pickle
import zipfile

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from isd_ray.config import MethodConfig
from isd_ray.errors import UserError
from isd_ray.interop import describe, load_backbone, load_encoder, load_isd_checkpoint
from isd_ray.methods import build_method
from isd_ray.queue.distributed import DistributedQueue
from isd_ray.train.teacher import find_in_file
from isd_ray.weight_files import read_checkpoint, read_safetensors

ROWS, DIM = 6, 4


class Tiny(nn.Module):
    """A backbone of few bytes, so that a random one of them is often a telling one."""

    dim, arch, stem_kind = DIM, "tiny", "own"

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, DIM), nn.BatchNorm1d(DIM))


def method():
    return build_method("isd", Tiny(), DistributedQueue(ROWS, DIM))


def published() -> dict:
    """The keys of the published ISD code, for a tiny backbone."""
    state = {f"encoder_q.{key}": value for key, value in Tiny().state_dict().items()}
    state |= {key.replace("encoder_q", "encoder_k"): value for key, value in state.items()}
    state |= {f"predict_q.{key}": value for key, value in method().predictor.state_dict().items()}
    return state | {"queue": torch.randn(ROWS, DIM), "queue_ptr": torch.tensor([2])}


def saved(content, zipped: bool = True) -> bytes:
    torch.save(content, buffer := io.BytesIO(), _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


CHECKPOINT = {"state_dict": published(), "opt": argparse.Namespace(lr=0.01), "epoch": 200}
GOOD = {
    "new.pth": saved(CHECKPOINT),
    "old.pth": saved(CHECKPOINT, zipped=False),  # as MoCo's are
    "good.safetensors": save(
        Tiny().state_dict(),
        {"arch": "tiny", "stem": "own", "dim": "4", "image_size": "32", "mean": "[0, 0, 0]", "std": "[1, 1, 1]"},
    ),
}  # fmt: skip


def read_every_way(path) -> list[str]:
    """Read a file by all that read weights; returns what was said, each in one printable line."""
    options = {"teacher": str(path), "teacher_backbone": "resnet18"}
    tries = [
        lambda: load_isd_checkpoint(path, method()),
        lambda: load_encoder(path, Tiny()),
        lambda: load_encoder(path, Tiny(), "encoder_k", allow_unmatched=True),
        lambda: load_backbone(Tiny(), path),
        lambda: describe(path),
        lambda: find_in_file(MethodConfig(**options)),
        lambda: find_in_file(MethodConfig(**options, teacher_encoder="teacher")),
    ]
    said = []
    for attempt in tries:
        try:
            attempt()
        except UserError as error:
            said.append(str(error))
    assert all(text.isprintable() and len(text) < 2000 for text in said), said
    return said


def test_the_good_files_are_good(tmp_path):
    for name, content in GOOD.items():
        (tmp_path / name).write_bytes(content)
    for name in ("new.pth", "old.pth"):
        assert load_isd_checkpoint(tmp_path / name, method()) == []
    load_backbone(Tiny(), tmp_path / "good.safetensors")
    assert describe(tmp_path / "good.safetensors").arch == "tiny"


damage = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(GOOD)), damage, st.none() | st.floats(0, 1))
@example("new.pth", [], 0.0)
@example("old.pth", [], 0.5)
@example("good.safetensors", [], 0.9)
def test_changed_bytes_and_cut_files_are_loaded_or_refused(tmp_path_factory, name, changes, cut):
    content = bytearray(GOOD[name])
    for place, value in changes:
        content[int(place * len(content))] = value
    content = content[: None if cut is None else int(cut * len(content))]
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(content)
    read_every_way(path)


class Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def with_pickle(replacement: bytes) -> bytes:
    """A zip archive of torch.save with another pickle in it, its checksums right."""
    source, target = zipfile.ZipFile(io.BytesIO(GOOD["new.pth"])), io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            archive.writestr(name, replacement if name.endswith("data.pkl") else source.read(name))
    return target.getvalue()


CORPUS = {
    "empty": b"",
    "text": b"<!DOCTYPE html>\n<title>404</title>\n" * 9,
    "prose": b"c\nno checkpoint, alas\n",
    "bytes": bytes(range(256)) * 9,
    "blanks": b" " * 100,
    "a number": pickle.dumps(5),
    "a set": pickle.dumps({1, 2}),
    "a list": saved([torch.ones(2)]),
    "no tensors": saved({"state_dict": {"a": "text"}}),
    "numbered": saved({1: torch.ones(2)}),
    "two of a name": saved({"module.a": torch.ones(2), "a": torch.ones(2)}),
    "sparse": saved({"encoder_q.body.0.weight": torch.eye(3).to_sparse()}),
    "without data": saved({"encoder_q.body.0.weight": torch.ones(4, 3, device="meta")}),
    "payload": saved({"state_dict": Payload()}),
    "payload in an old file": saved({"state_dict": Payload()}, zipped=False),
    "payload in a plain pickle": pickle.dumps({"state_dict": Payload()}, protocol=2),
    "payload in a good archive": with_pickle(pickle.dumps(Payload(), protocol=2)),
    "a deep pickle": b"\x80\x02" + b"(" * 5000 + b"l" * 5000 + b".",
    "zip of nothing": with_pickle(b""),
    "header too long": (2**60).to_bytes(8, "little") + b"{}",
    "header no mapping": (8).to_bytes(8, "little") + b"[1,2,3] ",
    "header no JSON": (8).to_bytes(8, "little") + b"\xff\xfe{{{{{{",
    "deep header": (20000).to_bytes(8, "little") + b"[" * 20000,
}


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("name", CORPUS)
def test_what_is_no_file_of_weights_is_refused_by_every_reader(tmp_path, name, ending):
    path = tmp_path / f"weights.{ending}"
    path.write_bytes(CORPUS[name])
    said = read_every_way(path)
    assert len(said) == 7, said
    assert all(str(path) in text for text in said)
    assert not any("weights_only" in text for text in said), "advice to let the file execute code"


def test_a_payload_is_named(tmp_path):
    path = tmp_path / "bad.pth"
    path.write_bytes(CORPUS["payload"])
    with pytest.raises(UserError, match=r"holds more than tensors \(exec\), which is not loaded"):
        read_checkpoint(path)


def test_missing_files_and_folders_are_said(tmp_path):
    for read in (read_checkpoint, read_safetensors):
        for path in (tmp_path, tmp_path / "none"):
            with pytest.raises(UserError, match=r"^no (checkpoint|weights) at "):
                read(path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("encoder_q.body.0.weight", torch.ones(4, 4), r"weight: \[4, 4\] in the file, \[4, 3\] here"),
        ("encoder_q.body.0.weight", torch.ones(4, 3).int(), r"weight: int32 \[4, 3\] in the file"),
        ("encoder_k.body.0.bias", torch.ones(4) * 1j, r"bias: complex64 \[4\] in the file"),
        ("encoder_q.body.1.num_batches_tracked", torch.ones(2), "num_batches_tracked"),
        ("queue", torch.ones(ROWS), r"queue: \[6\] in the file, \[6, 4\] here"),
        ("queue", torch.ones(ROWS, DIM).long(), r"queue: int64 \[6, 4\] in the file"),
        ("queue_ptr", torch.tensor([2, 3]), "queue_ptr: no row of the 6"),
        ("queue_ptr", torch.tensor([-1]), "queue_ptr: no row of the 6"),
        ("queue_ptr", torch.tensor([ROWS]), "queue_ptr: no row of the 6"),
        ("queue_ptr", torch.tensor([float("nan")]), "queue_ptr: no row of the 6"),
        ("labels", torch.ones(ROWS), r"labels: \[6\] in the file, whole numbers \[6\] here"),
        ("labels", torch.ones(3).long(), r"labels: int64 \[3\] in the file"),
    ],
)
def test_tensors_of_another_form_are_named(tmp_path, key, value, words):
    path = tmp_path / "other.pth"
    torch.save({"state_dict": published() | {key: value}}, path)
    own = method()
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    with pytest.raises(UserError, match=words):
        load_isd_checkpoint(path, own)
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())
    assert own.queue.fill == 0
    assert load_isd_checkpoint(path, own, allow_unmatched=True)


def test_a_file_all_of_whose_numbers_were_halved_loads(tmp_path):
    whole = Tiny().state_dict()
    torch.save({f"encoder_q.{name}": value.half() for name, value in whole.items()}, tmp_path / "half.pth")
    backbone = Tiny()
    assert load_encoder(tmp_path / "half.pth", backbone) == []
    for name, value in backbone.state_dict().items():
        torch.testing.assert_close(value, whole[name], atol=1e-3, rtol=1e-3)


def test_names_in_a_file_cannot_forge_a_line(tmp_path):
    path = tmp_path / "forged.pth"
    torch.save({"encoder_q.\x1b[2J\nerror: all is well": torch.ones(1), "x\ny.z": torch.ones(1)}, path)
    for prefix in ("encoder_q", "other"):
        with pytest.raises(UserError) as error:
            load_encoder(path, Tiny(), prefix)
        assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "change",
    [{"image_size": "x"}, {"image_size": "0"}, {"image_size": "9" * 5000}, {"mean": "[0, 0]"}, {"mean": "{"},
     {"mean": "[" * 9999}, {"std": "[1, 0, 1]"}, {"std": "[1, 1, NaN]"}, {"std": "5"}, {"mean": '["a", 0, 0]'}],
)  # fmt: skip
def test_a_damaged_description_is_refused(tmp_path, change):
    text = {"arch": "resnet8", "stem": "cifar", "image_size": "32", "mean": "[0, 0, 0]", "std": "[1, 1, 1]"}
    path = tmp_path / "weights.safetensors"
    path.write_bytes(save(Tiny().state_dict(), text | change))
    with pytest.raises(UserError, match="its metadata are damaged"):
        describe(path)


@pytest.mark.parametrize(("target", "encoder"), [("encoder_k", "teacher"), ("encoder_t", "teacher")])
def test_the_teacher_is_found_in_files_of_moco_isd_and_msf(tmp_path, target, encoder):
    student, teacher = ({"conv1.weight": torch.full((64, 3, 7, 7), x)} for x in (1.0, 2.0))
    state = {f"module.encoder_q.{k}": v for k, v in student.items()}
    state |= {f"module.{target}.{k}": v for k, v in teacher.items()}
    torch.save({"state_dict": state}, tmp_path / "published.pth")
    options = {"teacher": str(tmp_path / "published.pth"), "teacher_backbone": "resnet18"}
    for name, own in (("student", student), ("teacher", teacher)):
        found = find_in_file(MethodConfig(**options, teacher_encoder=name))
        assert found.weights.keys() == own.keys()
        assert torch.equal(found.weights["conv1.weight"], own["conv1.weight"])
        assert (found.arch, found.stem) == ("resnet18", "imagenet")
    torch.save({"state_dict": {f"encoder_q.{k}": v for k, v in student.items()}}, tmp_path / "published.pth")
    with pytest.raises(UserError, match="has no encoder 'encoder_k' or 'encoder_t'"):
        find_in_file(MethodConfig(**options, teacher_encoder="teacher"))
