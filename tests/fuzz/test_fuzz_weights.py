"""Files of weights and checkpoints: bytes changed, tensors of other shapes and kinds, keys gone or new."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from damage import altered, damaged, leaves, texts
from doors import knock
from fuzzing import fuzz
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sandbox import put
from torch import Tensor
from world import World, as_arguments

TENSORS: tuple[Callable[[Tensor], Any], ...] = (
    lambda x: x.double(),
    lambda x: x.half(),
    lambda x: x.long(),
    lambda x: x.bool(),
    lambda x: x[None],
    lambda x: x.flatten()[:1],
    lambda x: x.flatten()[:0],
    lambda x: x.sum(),
    lambda x: torch.full_like(x, float("nan")) if x.is_floating_point() else x - 1,
    lambda x: torch.full_like(x, 1e38) if x.is_floating_point() else torch.full_like(x, 2**62),
    lambda x: torch.zeros_like(x),
    lambda x: x.to(torch.complex64),
    lambda x: x.to_sparse() if x.dim() else x,
    lambda x: x.expand(3, *x.shape),
    lambda x: torch.empty(x.shape, device="meta"),
    lambda x: torch.nn.Parameter(x) if x.is_floating_point() else x,
    lambda x: x.tolist() if x.numel() < 9 else None,
    lambda x: [x, x],
    lambda x: {"a": x},
)


@st.composite
def trees(draw: Any, tree: Any) -> Any:
    """Return what `torch.load` gave, with a few entries replaced, gone or new."""
    changed = _copied(tree)
    for _ in range(draw(st.integers(1, 2))):
        holder = changed
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            key = draw(st.sampled_from(keys))
            if not isinstance(holder[key], dict | list) or not holder[key] or draw(st.integers(0, 3)) == 0:
                break
            holder = holder[key]
        how = draw(st.sampled_from(("tensor", "tensor", "value", "remove", "add")))
        if how == "remove":
            del holder[key]
        elif how == "add" and isinstance(holder, dict):
            holder[draw(texts)] = draw(st.one_of(leaves, st.builds(lambda: torch.zeros(2))))
        elif how == "tensor" and isinstance(holder[key], Tensor):
            holder[key] = draw(st.sampled_from(TENSORS))(holder[key])
        else:
            holder[key] = draw(leaves)
        if not changed:
            break
    return changed


def _copied(tree: Any) -> Any:
    """Return the tree with containers of its own; tensors are shared, since nothing changes them in place."""
    if isinstance(tree, dict):
        return {k: _copied(v) for k, v in tree.items()}
    return [_copied(v) for v in tree] if isinstance(tree, list) else tree


def saved(tree: Any) -> bytes:
    """Return the tree as PyTorch saves it."""
    torch.save(tree, buffer := io.BytesIO())
    return buffer.getvalue()


def legacy(tree: Any) -> bytes:
    """Return the tree as PyTorch saved it before it used archives."""
    torch.save(tree, buffer := io.BytesIO(), _use_new_zipfile_serialization=False)
    return buffer.getvalue()


class Bomb:
    """What would run a command where it is unpickled."""

    def __reduce__(self) -> Any:
        return __import__("os").mkdir, ("harm",)


OBJECTS = (
    Bomb(),
    np.zeros(3),
    np.float64(1),
    {1, 2},
    complex(1),
    range(3),
    Path("x"),
    1,
    None,
    [],
    {},
    "a",
    torch.zeros(2),
)


def test_checkpoints(world: World, sandbox, jobs) -> None:
    oldest, newest = sorted((world.run / "checkpoints").iterdir())
    tree = torch.load(oldest, weights_only=True)
    bytes_ = oldest.read_bytes()
    changed = st.one_of(
        trees(tree).map(saved), trees(tree).map(saved), trees(tree).map(saved), damaged(bytes_),
        st.sampled_from(OBJECTS).map(saved), st.sampled_from(OBJECTS).map(lambda o: saved(tree | {"step": o})),
        st.just(legacy(tree)),
    )  # fmt: skip

    @fuzz(
        150,
        content=changed,
        door=st.sampled_from(("evaluate", "embed", "pretrain", "teacher")),
        named=st.booleans(),
    )
    def case(content: bytes, door: str, named: bool) -> None:
        sandbox.fresh()
        run, out = put(world.run, sandbox.out / "run"), sandbox.out / "new"
        (run / "checkpoints" / newest.name).write_bytes(content)
        (run / "result.json").unlink()
        if door == "pretrain":  # from the first of the two, so that what was loaded is trained on
            (run / "checkpoints" / newest.name).rename(run / "checkpoints" / oldest.name)
        name = [f"--checkpoint={newest.name}"] if named else []
        seed = world.options(**{"method.name": "seed", "method.teacher": str(run / "checkpoints" / newest.name),
                                "output": str(sandbox.out), "name": "new", "evaluate.enabled": False})  # fmt: skip
        job, given, writes = {
            "evaluate": ("evaluate", [str(run), "--protocols", "knn1", *name], [run]),
            "embed": ("embed", [f"--run={run}", f"--shards={world.shards / 'test'}", f"--out={out}", *name], [out]),
            "pretrain": ("pretrain", [*world.arguments(**{"evaluate.enabled": False}), f"--output={sandbox.out}",
                                      "--name=run"], [run]),
            "teacher": ("pretrain", as_arguments(seed), [out]),
        }[door]  # fmt: skip
        knock(
            f"checkpoints, {door}",
            jobs[job],
            given,
            sandbox,
            writes=writes,
            about=(len(content), content[:300]),
        )

    case()


def with_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Return what changes the header of a safetensors file."""

    def changed(content: bytes) -> bytes:
        size = int.from_bytes(content[:8], "little")
        header = json.dumps(change(json.loads(content[8 : 8 + size]))).encode()
        return len(header).to_bytes(8, "little") + header + content[8 + size :]

    return changed


def test_files_of_weights(world: World, sandbox, jobs, untrained) -> None:
    good = (world.root / "weights.safetensors").read_bytes()
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])
    state = torch.load(world.root / "weights.pth", weights_only=True)
    headers = st.one_of(
        altered(header["__metadata__"]).map(lambda m: header | {"__metadata__": m}), altered(header)
    ).map(lambda h: with_header(lambda _: h)(good))
    tensors = load_file(world.root / "weights.safetensors")
    plain = trees(tensors).map(lambda t: _safetensors(t, sandbox.root.parent / "made.safetensors"))
    files = st.one_of(
        st.tuples(st.just(".safetensors"), st.one_of(headers, headers, damaged(good), plain)),
        st.tuples(st.sampled_from((".pth", ".pt", ".bin", "")),
                  st.one_of(trees(state).map(saved), damaged(saved(state)), st.sampled_from(OBJECTS).map(saved),
                            st.just(legacy(state)), trees(tensors).map(saved))),
    )  # fmt: skip
    backbones = st.sampled_from(
        ("", "resnet8", "resnet8", "resnet20", "timm:none", "timm:resnet10t", "resnet18", "x\x1b")
    )

    @fuzz(
        260,
        file=files,
        backbone=backbones,
        encoder=st.sampled_from(("encoder_q", "", "x")),
        teacher=st.booleans(),
    )
    def case(file: tuple[str, bytes], backbone: str, encoder: str, teacher: bool) -> None:
        sandbox.fresh()
        place, out = sandbox.inputs / f"weights{file[0]}", sandbox.out / "run"
        place.write_bytes(file[1])
        if teacher:
            options = {
                "method.name": "seed",
                "method.teacher": str(place),
                "evaluate.every": 0,
                "name": "run",
            }
            options |= {"method.teacher_backbone": backbone or None, "output": str(sandbox.out)}
            given = as_arguments(world.options(**options))
        else:
            given = [
                f"--weights={place}",
                f"--shards={world.shards / 'test'}",
                f"--out={out}",
                f"--encoder={encoder}",
            ]
            given += [f"--backbone={backbone}", "--stem=stride2", "--image-size=8"] if backbone else []
        job = "pretrain" if teacher else "embed"
        about = (file[0], len(file[1]), file[1][:1500])
        knock(f"weights, {job}", jobs[job], given, sandbox, writes=[out], about=about)

    case()


def _safetensors(tensors: Any, place: Path) -> bytes:
    """Return tensors as safetensors writes them; what it does not take is left out."""
    kept = {str(k): v.contiguous() for k, v in tensors.items() if isinstance(v, Tensor) and v.layout == torch.strided
            and v.device.type == "cpu" and not v.is_complex()} if isinstance(tensors, dict) else {}  # fmt: skip
    save_file({k.encode("utf-8", "replace").decode(): v.clone() for k, v in kept.items()}, place)
    return place.read_bytes()
