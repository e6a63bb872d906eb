"""SEED and CompRess against float64 readings of their papers; the frozen teacher stays what it is."""

import ast
import inspect
import io

import pytest
import torch
from plain_losses import plain_compress, plain_seed, unit
from torch import Tensor, nn

from isd_ray.config import MethodConfig
from isd_ray.errors import UserError
from isd_ray.methods import METHODS, build_method, find_method, options_of
from isd_ray.models.backbones import build_backbone
from isd_ray.models.frozen import Frozen, fingerprint
from isd_ray.queue.distributed import DistributedQueue
from isd_ray.queue.losses import seed

B, D, WIDE, K = 6, 5, 7, 20  # D: of the student, WIDE: of the teacher
FROZEN = [name for name in METHODS if "method.teacher" in METHODS[name].defaults]


def random(rows: int, seed: int, dim: int = D) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Flat(nn.Module):
    """A backbone of vectors; batch norm shows whether the mode is that of training."""

    arch, stem_kind = "flat", "own"

    def __init__(self, dim: int, seed: int = 0, width: int = D) -> None:
        super().__init__()
        self.dim = dim
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(width, dim), nn.BatchNorm1d(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def build(name: str, anchors: Tensor | None = None, owner: Tensor | None = None, **options) -> nn.Module:
    """A method on vectors of length D in float64; its queue holds `anchors` [n, columns]."""
    cls = find_method(name)
    queue = DistributedQueue(K, cls.embedding_dim(D, WIDE), dtype=torch.float64)
    if anchors is not None:
        queue.enqueue(anchors, owner)
    return build_method(name, Flat(D, 1), queue, teacher=Frozen(Flat(WIDE, 2)), **options).double().train()


def columns(name: str) -> Tensor:
    """K anchors as the queue of the method holds them: unit rows in either space."""
    return torch.cat(
        [unit(random(K, 0, WIDE)), *([unit(random(K, 9))] if name == "compress_2q" else [])], dim=1
    )


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("name", FROZEN)
def test_loss_and_gradient_equal_a_plain_reading(name, exclude):
    anchors, index, owner = columns(name), torch.arange(B), torch.arange(K) % 9
    t, t_teacher = 0.3, 0.15
    method = build(name, anchors, owner, temperature=t, temperature_teacher=t_teacher, exclude_own=exclude)
    view = random(B, 3)
    mask = owner != index[:, None] if exclude else torch.ones(B, K, dtype=torch.bool)
    k = unit(method.teacher(view))
    assert not k.requires_grad
    x = method.student(view)
    twin = x.detach().clone().requires_grad_()
    if name == "seed":
        expected = plain_seed(unit(twin), k, anchors, mask, t, t_teacher)
    else:
        own_space = anchors[:, WIDE:] if name == "compress_2q" else anchors
        expected = plain_compress(unit(twin), k, own_space, anchors[:, :WIDE], mask, t, t_teacher)
    method.student = Fixed(x.detach().clone().requires_grad_())
    loss = method([view], index).loss
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-10)
    loss.backward()
    expected.backward()
    assert twin.grad.abs().max() > 1e-3
    torch.testing.assert_close(method.student.x.grad, twin.grad, atol=1e-10, rtol=1e-10)


class Fixed(nn.Module):
    """A student whose embeddings are given."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x

    def forward(self, _: Tensor) -> Tensor:
        return self.x


def vectors() -> list[Tensor]:
    rows = [
        [[1, 0.2, 0], [0.1, 1, 0.3]],
        [[0.8, 0.6, 0.1], [0.2, 0.9, -0.4]],
        [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [-1, 0.5, 0.2]],
    ]
    return [unit(torch.tensor(r, dtype=torch.float64)) for r in rows]


def test_known_number_of_seed():
    q, k, anchors = vectors()
    queue = DistributedQueue(len(anchors), 3, dtype=torch.float64)
    queue.enqueue(anchors)
    assert seed(queue, q, k, 0.2, 0.07).mean().item() == pytest.approx(1.365243, abs=1e-6)


def test_known_number_of_compress():
    """At equal temperatures and widths 1q is ISD's divergence; 2q is the same where both spaces are one."""
    q, k, anchors = vectors()
    for name in ("compress_1q", "compress_2q"):
        two = name == "compress_2q"
        queue = DistributedQueue(len(anchors), 6 if two else 3, dtype=torch.float64)
        queue.enqueue(torch.cat([anchors, anchors], dim=1) if two else anchors)
        method = build_method(
            name, Flat(3), queue, teacher=Frozen(Flat(3)), temperature=0.2, temperature_teacher=0.2
        )
        loss = method.loss(*method.queries(q, k), None).mean().item()
        assert loss == pytest.approx(0.230644, abs=1e-6)


def test_seed_with_a_nearly_certain_teacher_is_moco():
    """The authors' temperature of 1e-4: all of the target lies on the image itself."""
    anchors, view, index = unit(random(K, 0, WIDE)), random(B, 3), torch.arange(B)
    method = build("seed", anchors, temperature_teacher=1e-4)
    q, k = unit(method.student(view)), unit(method.teacher(view))
    from isd_ray.queue.losses import info_nce

    expected = info_nce(method.queue, q, k, 0.2).mean()
    torch.testing.assert_close(method([view], index).loss, expected)


@pytest.mark.parametrize("name", FROZEN)
def test_keys_enter_the_queue_after_the_similarities_with_their_image(name):
    anchors, view = columns(name), random(B, 3)
    method = build(name)
    assert (
        method([view], torch.arange(B)).loss.item() == 0
    )  # of an empty queue: the step's own k is no anchor
    method = build(name, anchors)
    with torch.no_grad():
        for p in method.student.parameters():
            p.mul_(-1.5)  # the average stays where it was
    average = unit(build(name).average(view)) if name == "compress_2q" else None
    method([view], torch.arange(B) + 7, torch.arange(B) % 2)
    state, k = method.queue.state_dict(), unit(method.teacher(view))
    newest = k if average is None else torch.cat([k, average], dim=1)
    torch.testing.assert_close(state["keys"], torch.cat([anchors, newest])[-K:])
    assert state["index"][-B:].tolist() == list(range(7, 7 + B))
    assert state["label"][-B:].tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("name", FROZEN)
def test_the_teacher_is_no_part_of_what_is_learned_or_saved(name):
    method = build(name)
    before = {n: v.clone() for n, v in method.teacher.network.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.1)
    for step in range(3):
        method.train()
        method.update_teacher(0.9)
        method([random(B, step)], torch.arange(B)).loss.backward()
        optimizer.step()
    after = method.teacher.network.state_dict()
    assert all(torch.equal(value, after[n]) for n, value in before.items())  # batch norm's statistics too
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.network.parameters())
    assert [n for n in method.state_dict() if n.startswith("teacher")] == ["teacher._extra_state"]
    assert not [n for n, _ in method.named_parameters() if n.startswith("teacher")]
    assert list(method.encoders()) == ["student", "teacher"]
    learned = [p for p in method.parameters() if p.requires_grad]
    assert sum(p.grad.abs().max() > 0 for p in learned) > len(learned) / 2


def test_a_checkpoint_comes_back_with_the_same_teacher_and_with_no_other():
    method, buffer = build("seed"), io.BytesIO()
    torch.save(method.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    build("seed").load_state_dict(saved)
    other = build("seed")
    other.teacher = Frozen(Flat(WIDE, 3).double())
    with pytest.raises(UserError, match=r"^--method.teacher: .*weights differ"):
        other.load_state_dict(saved)


def test_fingerprint_sees_every_bit_every_name_and_the_stem():
    network = build_backbone("resnet8", stem="stride2")
    one = fingerprint(network)
    assert torch.equal(one, fingerprint(network))
    network.stem_kind = "cifar"
    assert not torch.equal(one, fingerprint(network))
    network.stem_kind = "stride2"
    with torch.no_grad():
        network.bn1.running_var[3] += 1e-7
    assert not torch.equal(one, fingerprint(network))


def test_the_teacher_moves_with_its_method():
    method = build("seed")
    assert {p.dtype for p in method.teacher.network.parameters()} == {torch.float64}
    method.to("meta")
    assert {v.device.type for v in method.teacher.network.state_dict().values()} == {"meta"}


def test_the_average_of_2q_follows_the_student():
    method = build("compress_2q")
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(1.0)
    before = [p.clone() for p in method.average.parameters()]
    method.update_teacher(0.75)
    for old, new in zip(before, method.average.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.25)


@pytest.mark.parametrize("name", FROZEN)
def test_one_view_for_both_networks_or_one_each(name):
    view, other = random(B, 3), random(B, 4)
    seen = []
    for views in ([view], [view, view], [view, other]):
        method = build(name, columns(name))
        seen.append(method(views, torch.arange(B)).loss)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    with pytest.raises(UserError, match="one view or two, not 3"):
        build(name, views=["weak"] * 3)


@pytest.mark.parametrize("name", FROZEN)
def test_defaults_name_every_option_and_the_constructor_takes_them(name):
    method = build(name)
    own = {option.removeprefix("method.") for option in method.defaults if option.startswith("method.")}
    loader, loop = {"teacher_backbone", "teacher_encoder"}, {"momentum", "momentum_schedule"}
    assert own - loader - loop == set(options_of(name)) - {"exclude_own"}
    assert own <= set(MethodConfig.model_fields)
    for option in ("temperature", "temperature_teacher"):
        assert getattr(method, option) == method.defaults[f"method.{option}"]
    assert list(method.views) == method.defaults["method.views"]
    assert ("momentum" in own) == (name == "compress_2q")
    assert f"{name}," in MethodConfig.model_fields["name"].description.replace(" or", ",") + ","


@pytest.mark.parametrize("name", FROZEN)
def test_diagnostics_only_when_asked(name):
    method, index = build(name, columns(name), torch.arange(K)), torch.arange(B)
    assert method([random(B, 3)], index).diagnostics == {}
    numbers = method([random(B, 4)], index, torch.zeros(B, dtype=torch.int64), diagnose=True).diagnostics
    assert {"teacher_entropy", "own_mass", "purity", "spread_student", "spread_teacher"} <= set(numbers)
    assert all(value.ndim == 0 and value.isfinite() and not value.requires_grad for value in numbers.values())
    assert 0 < numbers["spread_student"] < 1.01
    assert 0 < numbers["spread_teacher"] < 1.01


def test_heads_are_those_of_the_papers():
    def shapes(name):
        return [tuple(m.weight.shape) for m in build(name).student.projector.modules() if hasattr(m, "bias")]

    assert shapes("compress_1q") == [(WIDE, D)]
    assert shapes("compress_2q") == []
    assert shapes("seed") == [(D, D), (WIDE, D)]


@pytest.mark.parametrize("name", FROZEN)
def test_a_page_imports_no_data_no_files_and_no_collectives(name):
    imported = set()
    for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(METHODS[name])))):
        imported |= {node.module} if isinstance(node, ast.ImportFrom) else set()
        imported |= {a.name for a in node.names} if isinstance(node, ast.Import) else set()
    assert not [m for m in imported if m.startswith(("isd_ray.interop", "isd_ray.train", "pathlib", "io"))]
