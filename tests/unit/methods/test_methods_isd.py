"""ISD against a plain reading of the paper, its published numbers and its symmetries."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isd_ray.errors import UserError
from isd_ray.methods import METHODS, build_method, find_method, options_of
from isd_ray.methods.base import spread
from isd_ray.models.heads import mlp
from isd_ray.queue.distributed import DistributedQueue
from isd_ray.queue.initial import initial_keys
from isd_ray.queue.losses import similarity_kl

K, B, D = 24, 8, 16


class TinyBackbone(nn.Module):
    dim = D

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, D, 3, padding=1, bias=False), nn.BatchNorm2d(D), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images).mean(dim=(2, 3))


def build(name="isd", size=K, dtype=torch.float32, init="unit", **options):
    torch.manual_seed(0)
    dim = find_method(name).embedding_dim(D)
    queue = DistributedQueue(size, dim, dtype=dtype)
    queue.enqueue(initial_keys(init, size, dim, torch.Generator().manual_seed(1)).to(dtype))
    return build_method(name, TinyBackbone(), queue, **options).to(dtype)


def batch(step, dtype=torch.float32, size=8):
    generator = torch.Generator().manual_seed(100 + step)
    views = [torch.randn(B, 3, size, size, generator=generator, dtype=dtype) for _ in range(2)]
    return views, torch.arange(step * B, (step + 1) * B)


class PlainISD:
    """The paper step by step: student forward, EMA, teacher forward, similarities, enqueue, KL, SGD.

    Weights are dicts of tensors, the networks are written out, the queue is a matrix and a pointer, SGD is
    two lines.
    """

    def __init__(self, plus, weights, queue, temperature_student, temperature_teacher, momentum, lr):
        self.plus, self.queue, self.pointer = plus, queue, 0
        self.student = {name: w.clone().requires_grad_() for name, w in weights.items()}
        self.teacher = {name: w.clone() for name, w in weights.items() if not name.startswith("predictor")}
        self.velocity = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.ts, self.tt, self.m, self.lr = temperature_student, temperature_teacher, momentum, lr

    @staticmethod
    def norm(x, w, name):
        dims = [0, *range(2, x.ndim)]
        mean, var = x.mean(dims, keepdim=True), x.var(dims, unbiased=False, keepdim=True)
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return (x - mean) / (var + 1e-5).sqrt() * w[f"{name}.weight"].view(shape) + w[f"{name}.bias"].view(
            shape
        )

    def head(self, x, w, name):
        x = F.linear(x, w[f"{name}.0.weight"], w.get(f"{name}.0.bias"))
        x = self.norm(x, w, f"{name}.1").relu()
        return F.linear(x, w[f"{name}.3.weight"], w[f"{name}.3.bias"])

    def encode(self, images, w):
        x = F.conv2d(images, w["backbone.body.0.weight"], padding=1)
        x = self.norm(x, w, "backbone.body.1").relu().flatten(2).mean(2)
        return self.head(x, w, "projector") if self.plus else x

    def step(self, view_q, view_k):
        q = self.head(self.encode(view_q, self.student), self.student, "predictor")
        q = q / q.norm(dim=1, keepdim=True)
        with torch.no_grad():
            for name, w in self.teacher.items():
                self.teacher[name] = self.m * w + (1 - self.m) * self.student[name]
            k = self.encode(view_k, self.teacher)
            k = k / k.norm(dim=1, keepdim=True)
        anchors = self.queue.clone()
        log_p_student = (q @ anchors.T / self.ts).log_softmax(1)
        p_teacher = (k @ anchors.T / self.tt).softmax(1)
        for row in k:
            self.queue[self.pointer] = row
            self.pointer = (self.pointer + 1) % len(self.queue)
        loss = (p_teacher * (p_teacher.log() - log_p_student)).sum() / len(q)
        gradients = dict(
            zip(self.student, torch.autograd.grad(loss, list(self.student.values())), strict=True)
        )
        with torch.no_grad():
            for name, w in self.student.items():
                self.velocity[name] = 0.9 * self.velocity[name] + gradients[name] + 1e-4 * w
                w -= self.lr * self.velocity[name]
        return loss.detach(), gradients

    def queue_by_age(self):
        return self.queue.roll(-self.pointer, 0)


def student_weights(method, gradient=False):
    """Parameters (or gradients) of student and predictor by the names of PlainISD."""
    named = [
        *method.student.named_parameters(),
        *((f"predictor.{n}", p) for n, p in method.predictor.named_parameters()),
    ]
    return {name: (p.grad if gradient else p.detach()).clone() for name, p in named}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], atol=1e-9, rtol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(
    ("name", "momentum", "lr", "temperatures"),
    [("isd", 0.999, 0.01, (0.02, 0.02)), ("isd_plus", 0.99, 0.05, (0.1, 0.01))],
)
def test_five_steps_equal_a_plain_reading_of_the_paper(name, momentum, lr, temperatures):
    method = build(name, dtype=torch.float64, exclude_own=False)
    optimiser = torch.optim.SGD(
        [p for p in method.parameters() if p.requires_grad], lr, 0.9, weight_decay=1e-4
    )
    anchors = method.queue.state_dict()["keys"].clone()
    plain = PlainISD(name == "isd_plus", student_weights(method), anchors, *temperatures, momentum, lr)
    for step in range(5):
        views, index = batch(step, torch.float64)
        method.update_teacher(momentum)
        loss = method(views, index).loss
        optimiser.zero_grad()
        loss.backward()
        expected, gradients = plain.step(*views)
        torch.testing.assert_close(loss.detach(), expected, atol=1e-9, rtol=1e-9)
        assert_same(student_weights(method, gradient=True), gradients)
        assert (
            max(g.abs().max() for g in gradients.values()) > 1e-2
        )  # the comparison has something to compare
        optimiser.step()
        assert_same(student_weights(method), {n: w.detach() for n, w in plain.student.items()})
        assert_same(dict(method.teacher.network.named_parameters()), plain.teacher)
        torch.testing.assert_close(
            method.queue.state_dict()["keys"], plain.queue_by_age(), atol=1e-9, rtol=1e-9
        )


def vectors():
    rows = [
        [[1, 0.2, 0], [0.1, 1, 0.3]],
        [[0.8, 0.6, 0.1], [0.2, 0.9, -0.4]],
        [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [-1, 0.5, 0.2]],
    ]
    return [F.normalize(torch.tensor(x, dtype=torch.float64), dim=1) for x in rows]


class Fixed(nn.Module):
    """A network that answers with given embeddings."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(rows.clone())

    def forward(self, images):
        return self.rows


def with_embeddings(q, k, anchors, **options):
    """An ISD whose student gives q and whose teacher gives k."""
    method = build("isd", dtype=torch.float64, **options)
    method.student, method.predictor, method.teacher.network = Fixed(q), nn.Identity(), Fixed(k)
    method.queue = DistributedQueue(len(anchors), anchors.shape[1], dtype=q.dtype)
    method.queue.enqueue(anchors)
    return method


def loss_of(q, k, anchors, temperature=0.2, temperature_teacher=0.2):
    method = with_embeddings(q, k, anchors, temperature=temperature, temperature_teacher=temperature_teacher)
    return method([torch.empty(0), torch.empty(0)], torch.arange(len(q))).loss


@pytest.mark.parametrize(("student", "teacher", "value"), [(0.2, 0.2, 0.230644), (0.1, 0.05, 0.778555)])
def test_published_numbers(student, teacher, value):
    assert loss_of(*vectors(), student, teacher).item() == pytest.approx(value, abs=1e-6)


def test_loss_is_zero_where_student_equals_teacher():
    q, _, anchors = vectors()
    assert loss_of(q, q, anchors).item() == pytest.approx(0, abs=1e-12)
    assert loss_of(q, q, anchors, 0.1, 0.2).item() > 1e-2


def test_order_of_the_anchors_and_rotation_change_nothing():
    q, k, anchors = vectors()
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    expected = loss_of(q, k, anchors)
    torch.testing.assert_close(loss_of(q, k, anchors[torch.randperm(5)]), expected)
    torch.testing.assert_close(loss_of(q @ rotation, k @ rotation, anchors @ rotation), expected)


def test_gradient_is_the_formula_of_the_paper():
    q, k, anchors = vectors()
    q.requires_grad_()
    queue = DistributedQueue(5, 3, dtype=torch.float64)
    queue.enqueue(anchors)
    (gradient,) = torch.autograd.grad(similarity_kl(queue, q, k, 0.1, 0.05).sum(), q)
    p_student, p_teacher = (q @ anchors.T / 0.1).softmax(1), (k @ anchors.T / 0.05).softmax(1)
    torch.testing.assert_close(gradient, ((p_student - p_teacher) @ anchors / 0.1).detach())


def test_own_key_is_no_anchor_in_its_step_and_enters_after():
    q, k, anchors = vectors()
    method = with_embeddings(q, k, anchors, temperature=0.2, temperature_teacher=0.2, exclude_own=False)
    assert method(
        [torch.empty(0)] * 2, torch.tensor([7, 8]), torch.tensor([1, 0])
    ).loss.item() == pytest.approx(0.230644, abs=1e-6)
    state = method.queue.state_dict()
    torch.testing.assert_close(state["keys"], torch.cat([anchors[2:], k]))
    assert state["index"].tolist()[-2:] == [7, 8]
    assert state["label"].tolist()[-2:] == [1, 0]


def test_own_past_is_excluded_where_asked():
    q, k, anchors = vectors()
    own = torch.tensor([7, 8])
    for exclude, visible in ((True, [anchors, anchors]), (False, None)):
        method = with_embeddings(q, k, anchors, temperature=0.2, temperature_teacher=0.2, exclude_own=exclude)
        method.queue = DistributedQueue(7, 3, dtype=torch.float64)
        method.queue.enqueue(torch.cat([anchors, k]), torch.tensor([-1] * 5 + [7, 8]))
        loss = method([torch.empty(0)] * 2, own).loss
        everything = torch.cat([anchors, k])
        expected = []
        for i in range(2):
            rows = torch.cat([visible[i], k[1 - i : 2 - i]]) if visible else everything
            p, log_q = (k[i] @ rows.T / 0.2).softmax(0), (q[i] @ rows.T / 0.2).log_softmax(0)
            expected.append((p * (p.log() - log_q)).sum())
        torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_empty_queue_gives_zero_loss_and_zero_gradient():
    method = build("isd", init="empty")
    views, index = batch(0)
    loss = method(views, index).loss
    loss.backward()
    assert loss.item() == 0
    learned = [p for p in method.parameters() if p.requires_grad]
    assert all(p.grad.abs().max() == 0 for p in learned)  # not None: a gradient that other ranks can wait for
    assert method.queue.fill == B


def test_teacher_gets_no_gradient_and_every_student_parameter_does():
    method = build("isd_plus")
    views, index = batch(0)
    method(views, index).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    learned = [*method.student.parameters(), *method.predictor.parameters()]
    assert all(p.grad is not None for p in learned)
    assert len(learned) == sum(p.requires_grad for p in method.parameters())


def test_diagnostics_only_when_asked():
    method = build("isd", init="unit")
    views, index = batch(0)
    assert method(views, index).diagnostics == {}
    labels = torch.zeros(B, dtype=torch.int64)
    method(views, index, labels)
    numbers = method(views, index, labels, diagnose=True).diagnostics
    assert {"spread_student", "spread_teacher"} < numbers.keys()
    assert all(value.ndim == 0 and math.isfinite(value) for value in numbers.values())


def test_spread_is_one_on_the_sphere_and_zero_at_a_point():
    x = F.normalize(torch.randn(4096, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    assert spread(x).item() == pytest.approx(1, abs=0.01)
    assert spread(x[:1].expand(64, -1)).item() == pytest.approx(0, abs=1e-4)


def test_autocast_does_not_touch_the_similarities():
    q, k, anchors = vectors()
    method = with_embeddings(q.float(), k.float(), anchors, temperature=0.02, temperature_teacher=0.02)
    exact = loss_of(q, k, anchors, 0.02, 0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = method([torch.empty(0)] * 2, torch.arange(2)).loss
    torch.testing.assert_close(loss.double(), exact, atol=1e-4, rtol=1e-4)


def test_bfloat16_embeddings_reach_the_queue_at_unit_length():
    method = build("isd")
    views, index = batch(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = method(views, index).loss
    assert loss.dtype == torch.float32
    assert method.queue.state_dict()["keys"].norm(dim=1).sub(1).abs().max() < 1e-5


def test_encoders_are_the_backbones():
    encoders = build("isd_plus").encoders()
    assert list(encoders) == ["student", "teacher"]
    assert all(encoder(torch.randn(2, 3, 8, 8)).shape == (2, D) for encoder in encoders.values())


@pytest.mark.parametrize("name", ["isd", "isd_r18", "isd_plus"])
def test_defaults_say_what_the_constructor_does(name):
    method = build(name)
    for option in ("temperature", "temperature_teacher"):
        assert getattr(method, option) == method.defaults[f"method.{option}"]
    assert list(method.views) == method.defaults["method.views"]
    assert method.exclude_own == method.defaults["queue.exclude_own"]
    assert build(name, temperature=0.5).temperature == 0.5


def test_recipes_are_those_of_the_paper():
    plus = build("isd_plus")
    shapes = [
        tuple(m.weight.shape) for m in [*plus.student.projector, *plus.predictor] if isinstance(m, nn.Linear)
    ]
    assert shapes == [(2 * D, D), (D // 4, 2 * D), (2 * D, D // 4), (D // 4, 2 * D)]
    assert [tuple(p.shape) for p in build("isd").predictor.parameters()] == [
        tuple(p.shape) for p in mlp([D, D, D], bias=False).parameters()
    ]
    assert plus.views == build("isd_r18").views == ("strong", "weak")
    assert build("isd").views == ("strong", "strong")


def test_initial_keys():
    unit = initial_keys("unit", 64, 8, torch.Generator().manual_seed(0))
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(64))
    published = initial_keys("isd_v1", 6400, 64, torch.Generator().manual_seed(0))
    torch.testing.assert_close(published.norm(dim=0), torch.ones(64))
    assert published.norm(dim=1).mean().item() == pytest.approx(0.1, rel=0.01)  # sqrt(D / K)
    assert initial_keys("empty", 64, 8).shape == (0, 8)
    with pytest.raises(UserError, match="Did you mean 'unit'"):
        initial_keys("units", 64, 8)


def test_mistakes_name_the_remedy(monkeypatch):
    with pytest.raises(UserError, match=r"unknown method 'isd-plus'\. Did you mean 'isd_plus'"):
        find_method("isd-plus")
    with pytest.raises(UserError, match=r"has no option 'temprature'\. Did you mean 'temperature'"):
        build("isd", temprature=0.1)
    with pytest.raises(UserError, match="two views"):
        build("isd", views=("strong",))

    class Other(METHODS["isd"]):
        def __init__(self, backbone, queue, *, margin=1.0):
            super().__init__(backbone, queue)

    monkeypatch.setitem(METHODS, "other", Other)
    assert options_of("other") == ("margin",)
    with pytest.raises(UserError, match=r"method 'isd' has no option 'margin'\. other has it"):
        build("isd", margin=1.0)
