"""Every kernel equals the plain formula in float64, and reads do not depend on how the anchors lie."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from isd_ray.queue import attention

TEMPERATURES = st.sampled_from([0.01, 0.05, 0.2, 1.0])


def case(seed: int, rows: int, anchors: int, dim: int, temperature: float, samples: int = 9):
    """Queries / temperature, anchors, the queries' own sample index and that of the anchors (-1: unknown)."""
    generator = torch.Generator().manual_seed(seed)
    x, keys = (
        normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=1)
        for n in (rows, anchors)
    )
    own = torch.randint(-1, samples, (rows,), generator=generator)
    return x / temperature, keys, own, torch.randint(-1, samples, (anchors,), generator=generator)


def plain(x, keys, own, index):
    scores = x @ keys.T
    scores[(own[:, None] == index) & (index >= 0)] = -torch.inf
    lse = scores.logsumexp(1)
    return torch.nan_to_num((scores - lse[:, None]).exp()) @ keys, lse


@given(
    seed=st.integers(0, 999),
    rows=st.integers(1, 6),
    anchors=st.integers(1, 700),
    temperature=TEMPERATURES,
    samples=st.integers(1, 9),
)
@settings(max_examples=50, deadline=None)
def test_slices_equal_the_plain_formula(seed, rows, anchors, temperature, samples):
    x, keys, own, index = case(seed, rows, anchors, 5, temperature, samples)
    expected = plain(x, keys, own, index)
    pairs = attention.excluded_pairs(own, index)
    for kernel in (attention._eager, attention._chunked):  # 700 anchors are up to three slices of 256
        for found, value in zip(kernel(x, keys, pairs, None), expected, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)
        for found, value in zip(kernel(x.float(), keys.float(), pairs, None), expected, strict=True):
            torch.testing.assert_close(found, value.float(), rtol=1e-5, atol=1e-4)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(attention, "SLICE", 1)


@given(seed=st.integers(0, 999), cut=st.integers(0, 40), temperature=TEMPERATURES)
@settings(max_examples=40, deadline=None)
def test_splitting_permuting_and_rotating_change_nothing(seed, cut, temperature):
    x, keys, own, index = case(seed, 4, 40, 6, temperature)
    read, lse = attention.attend(x, keys, own, index)

    parts = [attention.attend(x, keys[s], own, index[s]) for s in (slice(cut), slice(cut, None))]
    reads, lses = zip(*parts, strict=True)
    merged = attention.merge(torch.stack(reads), torch.stack(lses))
    torch.testing.assert_close(merged, (read, lse), rtol=1e-12, atol=1e-12)

    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    permuted = attention.attend(x, keys[order], own, index[order])
    torch.testing.assert_close(permuted, (read, lse), rtol=1e-12, atol=1e-12)

    turn = torch.linalg.qr(case(seed, 6, 1, 6, 1.0)[0])[0]
    rotated = attention.attend(x @ turn, keys @ turn, own, index)
    torch.testing.assert_close(rotated, (read @ turn, lse), rtol=1e-11, atol=1e-11)


def test_an_excluded_anchor_changes_nothing():
    x, keys, own, index = case(3, 4, 30, 6, 0.1)
    own[:] = 77
    more = attention.attend(x, torch.cat([keys, x[:2] * 0.1]), own, torch.cat([index, own[:2]]))
    torch.testing.assert_close(more, attention.attend(x, keys, own, index), rtol=1e-12, atol=1e-12)


def test_unknown_samples_are_never_excluded():
    x, keys, own, index = case(3, 4, 30, 6, 0.1)
    own[:], index[:] = -1, -1
    torch.testing.assert_close(attention.attend(x, keys, own, index), attention.attend(x, keys))


@pytest.mark.parametrize("kernel", [attention._eager, attention._chunked])
def test_along_is_the_second_moment(kernel):
    x, keys, own, index = case(5, 4, 600, 6, 0.1)
    v = case(6, 4, 1, 6, 1.0)[0]
    read, _ = kernel(x, keys, attention.excluded_pairs(own, index), v)
    scores = (x @ keys.T).masked_fill((own[:, None] == index) & (index >= 0), -torch.inf)
    weights = scores.softmax(1)
    torch.testing.assert_close(read[:, :6], weights @ keys, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(read[:, 6:], (weights * (v @ keys.T)) @ keys, rtol=1e-12, atol=1e-12)


def test_topk_over_slices_equals_topk_over_all():
    x, keys, own, index = case(8, 5, 700, 6, 1.0, samples=50)
    value, slot = attention.topk(x, keys, 20, own, index)
    scores = (x @ keys.T).masked_fill((own[:, None] == index) & (index >= 0), -torch.inf)
    expected = scores.topk(20, dim=1)
    torch.testing.assert_close(value, expected.values)
    assert slot.tolist() == expected.indices.tolist()


def test_the_chunked_kernel_never_holds_the_matrix(monkeypatch):
    x, keys, _, _ = case(9, 8, 5000, 4, 0.1)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out._base is None and out is not keys:
                largest = max(largest, out.numel())
            return out

    with Watch():
        attention._chunked(x, keys, None, None)
    assert 0 < largest <= 8 * 256


def test_triton_kernel_in_the_interpreter():
    """The GPU kernel, run by Triton's interpreter (which knows no bf16) against float64."""
    pytest.importorskip("triton")
    script = Path(__file__).with_name("run_triton_interpreted.py")
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [24, 128, 256, 512])
def test_triton_kernel_on_a_gpu(dtype, dim):
    x, keys, own, index = (t.cuda() for t in case(1, 77, 3000, dim, 0.1, samples=500))
    keys = keys.to(dtype)
    read, lse = attention.attend(x.float(), keys, own, index)
    assert attention._triton(x, keys) is not None
    expected = plain(x.to(dtype).double(), keys.double(), own, index)
    torch.testing.assert_close(lse.double(), expected[1], rtol=0, atol=1e-3)
    torch.testing.assert_close(read.double(), expected[0], rtol=0, atol=4e-3)
