"""The bank in one process: rows by image, contrast with all of them, clusters. Several ranks: tests/distributed."""

import pytest
import torch
import torch.nn.functional as F

from isd_ray.errors import UserError
from isd_ray.queue.bank import Bank
from isd_ray.queue.clusters import spherical_kmeans

N, D, B, T = 40, 6, 5, 0.2


def random(rows: int, seed: int) -> torch.Tensor:
    x = torch.randn(rows, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x, dim=1)


def filled(ids: int = 0) -> Bank:
    bank = Bank(N, D, ids, dtype=torch.float64)
    bank.write(torch.arange(N), random(N, 0), torch.arange(N * ids).reshape(N, ids) if ids else None)
    return bank


def test_rows_start_uniform_about_the_unit_sphere_from_the_seed():
    bank = Bank(4000, 128, seed=3)
    bound = (3 / 128) ** 0.5
    assert bank.keys.abs().max() <= bound
    assert bank.keys.mean().abs() < 1e-3
    assert bank.keys.norm(dim=1).mean().item() == pytest.approx(1, abs=0.01)
    assert torch.equal(bank.keys, Bank(4000, 128, seed=3).keys)
    assert not torch.equal(bank.keys, Bank(4000, 128, seed=4).keys)


def test_rows_are_those_that_were_written():
    bank, index = Bank(N, D, ids=2, dtype=torch.float64), torch.tensor([7, 0, 39])
    others = [i for i in range(N) if i not in index.tolist()]
    before, rows = bank.keys.clone(), random(3, 1)
    bank.write(index, rows, torch.tensor([[1, 2], [3, 4], [5, 6]]))
    assert torch.equal(bank.read(index), rows)
    assert torch.equal(bank.shared(index), rows)
    assert bank.read_ids(index.flip(0)).tolist() == [[5, 6], [3, 4], [1, 2]]
    assert torch.equal(bank.keys[others], before[others])
    assert bank.written.nonzero().flatten().tolist() == [0, 7, 39]


def test_a_mixed_row_is_a_unit_average():
    bank, z, index = filled(), random(B, 2), torch.arange(B)
    expected = 0.3 * bank.read(index) + 0.7 * z
    bank.mix(index, z, 0.3)
    torch.testing.assert_close(bank.read(index), expected / expected.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("excluding", [False, True])
@pytest.mark.parametrize("with_floor", [False, True])
def test_lse_and_its_gradient_are_those_of_the_whole_matrix(excluding, with_floor):
    bank, z, index = filled(), random(B, 2).requires_grad_(), torch.tensor([3, 3, 0, 39, 20])
    floor = torch.linspace(-0.5, 0.2, B, dtype=torch.float64) if with_floor else None
    scores = z.detach().clone().requires_grad_()
    similarity = scores @ bank.keys.T
    out = torch.zeros(B, N, dtype=torch.bool)
    if excluding:
        out[torch.arange(B), index] = True
    if with_floor:
        out |= similarity.detach() <= floor[:, None]
    expected = (similarity / T).masked_fill(out, -torch.inf).logsumexp(dim=1)
    lse = bank.lse(z, T, index if excluding else None, floor)
    torch.testing.assert_close(lse, expected)
    weights = torch.arange(1.0, B + 1).double()
    (lse * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(z.grad, scores.grad)


def test_nothing_above_the_floor_is_minus_infinity():
    bank, z = filled(), random(B, 2).requires_grad_()
    lse = bank.lse(z, T, floor=torch.full((B,), 2.0))
    assert (lse == -torch.inf).all()


def test_nearest_rows_leave_out_the_own_one():
    bank, index = filled(), torch.tensor([4, 9])
    similarity, image = bank.nearest(bank.read(index), 3, exclude=index)
    expected = (bank.read(index) @ bank.keys.T).scatter(1, index[:, None], -torch.inf).topk(3)
    torch.testing.assert_close(similarity, expected.values)
    assert torch.equal(image, expected.indices)
    assert bank.nearest(bank.read(index), 3)[1][:, 0].tolist() == [4, 9]
    similarity, image = bank.nearest(bank.read(index), N + 5, exclude=index)
    assert image.shape == (2, N)
    assert image[:, -1].tolist() == [-1, -1]
    assert (similarity[:, -1] == -torch.inf).all()


def test_draws_differ_from_call_to_call_and_continue_after_loading():
    bank = Bank(N, D, seed=1)
    first, second = bank.draw(1000), bank.draw(1000)
    assert not torch.equal(first, second)
    assert set(first.tolist()) == set(range(N))
    again = Bank(N, D, seed=1)
    assert torch.equal(again.draw(1000), first)
    loaded = Bank(N, D, seed=1)
    loaded.load_state_dict(again.state_dict())
    assert torch.equal(loaded.draw(1000), second)


def test_a_saved_bank_is_loaded_to_the_bit_and_another_refused():
    bank, other = filled(ids=2), Bank(N, D, ids=2, dtype=torch.float64)
    other.load_state_dict(bank.state_dict())
    for name in ("keys", "ids", "written"):
        assert torch.equal(getattr(bank, name), getattr(other, name))
    with pytest.raises(UserError, match=r"bank is \(40, 6\), the run needs \(41, 6\)"):
        Bank(N + 1, D, ids=2).load_state_dict(bank.state_dict())


def test_embeddings_that_are_not_finite_stay_out():
    bank, before = filled(), filled().keys
    with pytest.raises(UserError, match="not finite"):
        bank.write(torch.tensor([1]), torch.full((1, D), torch.nan))
    assert torch.equal(bank.keys, before)


def test_kmeans_finds_clusters_that_are_there():
    centres = torch.eye(D, dtype=torch.float64)[:4]
    truth = torch.arange(N) % 4
    bank = Bank(N, 2 * D, ids=1, dtype=torch.float64)
    near = F.normalize(centres[truth] + 0.05 * random(N, 5), dim=1)
    written = torch.arange(N - 3)
    bank.write(written, torch.cat([random(N, 6), near], dim=1)[written])
    centroids, ids = spherical_kmeans(bank, slice(D, 2 * D), 12)
    assert ids[-3:].tolist() == [-1, -1, -1]  # never written
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(12).double())
    for cluster in range(12):
        assert len(set(truth[ids == cluster].tolist())) <= 1
    nearest = (near[written] @ centroids.T).argmax(dim=1)
    assert torch.equal(ids[written], nearest)
