import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from isd_ray.models.heads import mlp
from isd_ray.models.teacher import Teacher


def moved(seed: int = 0) -> tuple[nn.Module, Teacher]:
    torch.manual_seed(seed)
    student = mlp([4, 8, 4])
    teacher = Teacher(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
    return student, teacher


def test_momentum_one_leaves_and_zero_copies():
    student, teacher = moved()
    before = [p.clone() for p in teacher.parameters()]
    teacher.update(student, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    teacher.update(student, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))


@settings(max_examples=20, deadline=None)
@given(momentum=st.floats(0, 1), seed=st.integers(0, 100))
def test_update_is_the_average_in_float64(momentum, seed):
    student, teacher = moved(seed)
    expected = [
        momentum * t.double() + (1 - momentum) * s.double()
        for s, t in zip(student.parameters(), teacher.parameters(), strict=True)
    ]
    teacher.update(student, momentum)
    for parameter, value in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.double(), value, atol=1e-6, rtol=1e-6)


def test_teacher_gets_no_gradient():
    student, teacher = moved()
    x = torch.randn(8, 4, requires_grad=True)
    output = teacher(x)
    assert not output.requires_grad
    (student(x) * output).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_batch_norm_is_the_teachers_own():
    student, teacher = moved()
    student(torch.randn(8, 4) + 3)
    teacher.update(student, 0.0)
    own = teacher.network[1]
    assert own.num_batches_tracked == 0  # an update averages parameters only
    x = torch.randn(64, 4)
    hidden = teacher.network[0](x)
    teacher(x)
    torch.testing.assert_close(own.running_mean, 0.1 * hidden.mean(0))


def test_a_different_student_is_refused():
    _, teacher = moved()
    with pytest.raises(ValueError, match=r"3\.bias"):
        teacher.update(mlp([4, 8, 4], last_bias=False), 0.5)
