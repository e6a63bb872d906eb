"""Each baseline against a float64 reading of its paper with whole matrices, and the numbers known for it."""

import ast
import inspect

import pytest
import torch
from plain_losses import plain, unit
from torch import Tensor, nn

from isd_ray.config import MethodConfig
from isd_ray.errors import UserError
from isd_ray.methods import METHODS, build_method, find_method, options_of
from isd_ray.queue.bank import Bank
from isd_ray.queue.distributed import DistributedQueue

B, D, K = 6, 5, 20
OF_BANK = tuple(name for name in METHODS if METHODS[name].uses_bank)  # their losses: test_methods_bank
OWN_FILE = ("swav", "dino", *OF_BANK)  # their losses and heads: test_methods_prototypes
FROZEN = [name for name in METHODS if "method.teacher" in METHODS[name].defaults]  # test_methods_frozen
BASELINES = [name for name in METHODS if not name.startswith("isd") and name not in FROZEN]
WITH_QUEUE = [name for name in BASELINES if METHODS[name].uses_queue]
WITH_TEACHER = [name for name in BASELINES if "method.momentum" in METHODS[name].defaults]


def random(rows: int, seed: int, dim: int = D) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TinyBackbone(nn.Module):
    dim = 8

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images).mean(dim=(2, 3))


def build(name, **options):
    """A method as a user gets it, on a tiny backbone, with an empty queue."""
    torch.manual_seed(0)
    cls = find_method(name)
    memory: DistributedQueue | Bank | None = None
    if cls.uses_queue:
        memory = DistributedQueue(K, cls.embedding_dim(TinyBackbone.dim))
    if cls.uses_bank:
        memory = Bank(K, cls.embedding_dim(TinyBackbone.dim), cls.bank_ids)
    return build_method(name, TinyBackbone(), memory, **options)


def images(method):
    """A batch of as many views as the method takes."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(len(method.views), B, 3, 12, 12, generator=generator))


def with_embeddings(name, anchors, owner, h, teacher, **options):
    """A method whose "views" are its projections already: the networks are the identity, the teacher shifts by
    `teacher`, and the predictor is the matrix h."""
    method = build(name, **options)
    method.student = nn.Identity()
    if hasattr(method, "predictor"):
        method.predictor = nn.Linear(D, D, bias=False).double()
        method.predictor.weight.data = h.clone()
    if hasattr(method, "teacher"):
        method.teacher.network = Shift(teacher)
    if method.uses_queue:
        method.queue = DistributedQueue(len(anchors), anchors.shape[1], dtype=torch.float64)
        method.queue.enqueue(anchors, owner)
    return method


class Shift(nn.Module):
    def __init__(self, by: Tensor) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


CASES = [
    *((name, {}) for name in BASELINES if name not in OWN_FILE),
    ("moco_v2", {"symmetric": True}),
    ("moco_v1", {"symmetric": True}),
]
CASES += [(name, {"exclude_own": False}) for name in WITH_QUEUE if name not in ("msf", *OWN_FILE)]


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_loss_and_gradient_equal_a_plain_reading(name, options):
    anchors, h, shift = unit(random(K, 0)), random(D, 1), random(1, 2)
    index = torch.arange(B)
    owner = torch.arange(K) % 9  # some anchors are the images' own
    method = with_embeddings(name, anchors, owner, h, shift, **options)
    views = [random(B, seed).requires_grad_() for seed in (3, 4)]
    twins = [view.detach().clone().requires_grad_() for view in views]
    excludes = "exclude_own" in options_of(name) and options.get("exclude_own", True)
    mask = owner != index[:, None] if excludes else torch.ones(B, K, dtype=torch.bool)
    expected = plain(
        name, twins, [twin + shift for twin in twins], h, anchors, mask, options.get("symmetric")
    )
    loss = method(views, index).loss
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-10)
    loss.backward()
    expected.backward()
    for view, twin in zip(views, twins, strict=True):
        if twin.grad is None:  # the teacher's view of a method of one direction
            assert view.grad is None
            continue
        assert twin.grad.abs().max() > 1e-3
        torch.testing.assert_close(view.grad, twin.grad, atol=1e-10, rtol=1e-10)


def vectors():
    rows = [
        [[1, 0.2, 0], [0.1, 1, 0.3]],
        [[0.8, 0.6, 0.1], [0.2, 0.9, -0.4]],
        [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [-1, 0.5, 0.2]],
    ]
    return [unit(torch.tensor(x, dtype=torch.float64)) for x in rows]


@pytest.mark.parametrize(
    ("name", "options", "value"),
    [
        ("moco_v2", {}, 1.382355),
        ("ressl", {}, 0.945876),
        ("co2", {}, 1.382355 + 0.3 * 1.598307),
        ("msf", {"neighbours": 2}, 0.384844),
        ("byol_asym", {}, 0.343358),
        ("byol", {}, 2 * 0.343358),
        ("simsiam", {}, -0.828321),
        ("simclr", {}, 0.731716),
        ("debiased", {}, 0.679213),
    ],
)
def test_known_numbers(name, options, value):
    q, k, anchors = vectors()
    method = with_embeddings(name, anchors, None, torch.eye(3).double(), torch.zeros(1), **options)
    if hasattr(method, "predictor"):
        method.predictor = nn.Identity()
    assert method([q, k], torch.arange(2)).loss.item() == pytest.approx(value, abs=1e-6)


def test_known_number_of_one_direction_of_sce():
    q, k, anchors = vectors()
    method = with_embeddings("sce", anchors, None, torch.eye(3).double(), torch.zeros(1))
    assert method.loss(q, k, None).mean().item() == pytest.approx(1.499915, abs=1e-6)


def test_one_neighbour_is_byol_asym():
    anchors, h, shift = unit(random(K, 0)), random(D, 1), random(1, 2)
    views = [random(B, 3), random(B, 4)]
    one = with_embeddings("msf", anchors, None, h, shift, neighbours=1)
    asym = with_embeddings("byol_asym", anchors, None, h, shift)
    expected = asym(views, torch.arange(B)).loss
    torch.testing.assert_close(one(views, torch.arange(B)).loss, expected, atol=1e-12, rtol=1e-12)


def test_a_class_prior_of_zero_is_simclr_and_a_senseless_one_is_refused():
    views = [random(B, 3), random(B, 4)]
    debiased = with_embeddings("debiased", None, None, None, None, class_prior=0.0)
    simclr = with_embeddings("simclr", None, None, None, None)
    expected = simclr(views, torch.arange(B)).loss
    torch.testing.assert_close(debiased(views, torch.arange(B)).loss, expected, atol=1e-12, rtol=1e-12)
    with pytest.raises(UserError, match=r"method\.class_prior"):
        build("debiased", class_prior=1.0)


def test_a_neighbour_of_an_empty_queue_is_the_embedding_itself():
    method, z = build("nnclr"), unit(torch.randn(B, 256))
    assert torch.equal(method.neighbour(z, torch.arange(B)), z)


def test_weight_one_of_sce_is_moco_in_both_directions():
    anchors, shift, views = unit(random(K, 0)), random(1, 2), [random(B, 3), random(B, 4)]
    eye = torch.eye(D).double()
    sce = with_embeddings("sce", anchors, None, eye, shift, weight=1.0, temperature=0.2)
    moco = with_embeddings("moco_v2", anchors, None, eye, shift, symmetric=True)
    loss = sce(views, torch.arange(B)).loss
    torch.testing.assert_close(2 * loss, moco(views, torch.arange(B)).loss, atol=1e-12, rtol=1e-12)


def test_simclr_does_not_depend_on_the_order_of_the_images():
    method = with_embeddings("simclr", None, None, None, None)
    views, order = [random(B, 3), random(B, 4)], torch.randperm(B, generator=torch.Generator().manual_seed(0))
    expected = method(views, torch.arange(B)).loss
    torch.testing.assert_close(method([v[order] for v in views], order + 40).loss, expected)
    alone = method([v[:1] for v in views], torch.arange(1)).loss
    assert alone.item() == 0  # a single image has no negatives


@pytest.mark.parametrize("name", [name for name in WITH_QUEUE if name not in OWN_FILE])
def test_keys_enter_the_queue_with_their_image(name):
    anchors, shift, views = unit(random(K, 0)), random(1, 2), [random(B, 3), random(B, 4)]
    method = with_embeddings(name, anchors, None, torch.eye(D).double(), shift)
    method(views, torch.arange(B) + 7, torch.arange(B) % 2)
    state = method.queue.state_dict()
    if name == "nnclr":
        keys = [unit(views[0])]  # no teacher; the first view's
    else:
        keys = [unit(view + shift) for view in (reversed(views) if name == "sce" else views[1:])]
    torch.testing.assert_close(state["keys"], torch.cat([anchors, *keys])[-K:])
    assert state["index"][-B:].tolist() == list(range(7, 7 + B))
    assert state["label"][-B:].tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("name", [name for name in WITH_QUEUE if name in WITH_TEACHER])
def test_own_key_is_an_anchor_of_its_step_in_mean_shift_alone(name):
    """With a queue that is empty before the step, only what the step itself enqueues could be an anchor."""
    method = build(name)
    images, index = torch.randn(2, B, 3, 6, 6), torch.arange(B)
    loss = method([images[0], images[1]], index).loss
    assert (loss.item() > 0.01) == (name == "msf")
    loss.backward()
    learned = [p for p in method.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in learned)  # zero at most: other ranks wait for it
    assert method.queue.fill == (2 * B if name == "sce" else B)


@pytest.mark.parametrize("name", BASELINES)
def test_every_learned_weight_gets_a_gradient_and_no_teacher_does(name):
    method = build(name)
    views, index = images(method), torch.arange(B)
    method(views, index)
    method.begin_epoch(1)
    seen_before = name == "deepcluster_v2"  # others have no anchor but their own then
    method(views, index if seen_before else index + B).loss.backward()
    learned = [p for p in method.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in learned)
    assert sum(p.grad.abs().max() > 0 for p in learned) > len(learned) / 2
    if name in WITH_TEACHER:
        assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())


@pytest.mark.parametrize("name", BASELINES)
def test_teacher_is_the_average_of_students_and_evaluated_with_them(name):
    method = build(name)
    assert list(method.encoders()) == ["student", "teacher"][: 1 + (name in WITH_TEACHER)]
    images = torch.randn(2, 3, 6, 6)
    assert all(encoder(images).shape == (2, TinyBackbone.dim) for encoder in method.encoders().values())
    before = {n: p.clone() for n, p in method.named_parameters()}
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(1.0)
    method.update_teacher(0.75)
    for n, p in method.named_parameters():
        moved = 1.0 if n.startswith("student") else 0.25 if n.startswith("teacher") else 0.0
        torch.testing.assert_close(p.detach(), before[n] + moved, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in FROZEN])
def test_defaults_name_every_option_and_the_constructor_takes_them(name):
    method, outside = build(name), {"exclude_own", "gather"}
    own = {option.removeprefix("method.") for option in method.defaults if option.startswith("method.")}
    assert own - {"momentum", "momentum_schedule"} == set(options_of(name)) - outside
    assert own <= set(MethodConfig.model_fields)
    assert ("exclude_own" in options_of(name)) == ("queue.exclude_own" in method.defaults)
    inside = {"prototypes", "freeze"} | (
        {"temperature"} if name in ("npid", "pirl") else set()
    )  # of a module
    for option in own - {"momentum", "momentum_schedule", "views"} - inside:
        assert getattr(method, option) == method.defaults[f"method.{option}"]
    assert list(method.views) == method.defaults["method.views"]
    assert f"{name}," in MethodConfig.model_fields["name"].description.replace(" or", ",") + ","


@pytest.mark.parametrize("name", BASELINES)
def test_diagnostics_only_when_asked(name):
    method = build(name)
    views, index = images(method), torch.arange(B)
    assert method(views, index).diagnostics == {}
    numbers = method(views, index + B, torch.zeros(B, dtype=torch.int64), diagnose=True).diagnostics
    assert "spread_student" in numbers
    assert ("spread_teacher" in numbers) == (name in WITH_TEACHER)
    assert ("purity" in numbers) == (name in WITH_QUEUE and name not in OWN_FILE)
    assert all(value.ndim == 0 and value.isfinite() and not value.requires_grad for value in numbers.values())


@pytest.mark.parametrize("name", BASELINES)
def test_autocast_leaves_the_loss_in_full_precision(name):
    method = build(name)
    views, index = images(method), torch.arange(B)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        method(views, index)
        loss = method(views, index + B).loss
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def shapes(*modules):
    return [tuple(m.weight.shape) for net in modules for m in net.modules() if isinstance(m, nn.Linear)]


def test_heads_are_those_of_the_papers():
    d = TinyBackbone.dim
    names = ("moco_v2", "simclr", "byol", "byol_asym", "simsiam", "ressl", "sce", "co2", "msf")
    moco, simclr, byol, asym, simsiam, ressl, sce, co2, msf = (build(name) for name in names)
    assert shapes(build("moco_v1").student) == [(128, d)]
    assert shapes(build("debiased").student) == shapes(simclr.student)
    assert shapes(build("fnc").student) == [(d, d), (d, d), (128, d)]
    nnclr, wide = build("nnclr"), [(2048, d), (2048, 2048), (2048, 2048)]
    projector = [(2048, d), (2048, 2048), (256, 2048)]
    assert shapes(nnclr.student, nnclr.predictor) == [*projector, (4096, 256), (256, 4096)]
    assert shapes(build("barlow_twins").student) == shapes(build("vicreg").student) == wide
    assert shapes(moco.student, moco.predictor) == shapes(co2.student) == [(d, d), (128, d)]
    assert shapes(simclr.student) == [(d, d), (128, d)]
    assert shapes(byol.student, byol.predictor) == [(2 * d, d), (256, 2 * d), (2 * d, 256), (256, 2 * d)]
    plus = [(2 * d, d), (d // 4, 2 * d), (2 * d, d // 4), (d // 4, 2 * d)]
    assert shapes(asym.student, asym.predictor) == shapes(msf.student, msf.predictor) == plus
    assert shapes(simsiam.student) == [(d, d), (d, d), (2048, d)]
    assert shapes(simsiam.predictor) == [(512, 2048), (2048, 512)]
    assert shapes(ressl.student, ressl.predictor) == [(2 * d, d), (512, 2 * d)]
    wide = [(2 * d, d), (2 * d, 2 * d), (256, 2 * d), (2 * d, 256), (256, 2 * d)]
    assert shapes(sce.student, sce.predictor) == wide
    norms = {
        name: [m for m in build(name).student.projector if "Norm" in type(m).__name__] for name in BASELINES
    }
    assert [name for name in BASELINES if not norms[name]] == [
        *("npid", "pirl", "invprop", "moco_v1", "moco_v2", "ressl", "co2", "dino")
    ]
    assert [name for name in BASELINES if norms[name] and not norms[name][-1].affine] == ["simsiam", "sce"]
    last = norms["simclr"][-1]
    assert last.weight.requires_grad
    assert not last.bias.requires_grad


@pytest.mark.parametrize("name", METHODS)
def test_a_page_is_short_and_imports_no_ray_no_data_and_no_collectives(name):
    source = inspect.getsource(inspect.getmodule(METHODS[name]))
    imported = set()
    for node in ast.walk(ast.parse(source)):
        imported |= {a.name for a in node.names} if isinstance(node, ast.Import) else set()
        imported |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    assert not [m for m in imported if m.startswith(("ray", "isd_ray.data", "torch.distributed"))]
    assert len(source.splitlines()) <= 150


def test_a_wrong_number_of_views_is_refused():
    for name in BASELINES:
        with pytest.raises(UserError, match=r"takes (two views|one view)"):
            build(name, views=["strong"] * (2 if len(build(name).views) == 1 else 1))
