"""Methods with a row for every image (NPID, PIRL, invariance propagation, DeepCluster-v2) against plain readings."""

import math

import pytest
import torch
from plain_losses import unit
from torch import Tensor, nn

from isd_ray.methods import build_method
from isd_ray.methods.base import encoder
from isd_ray.methods.pirl import cut, uniform
from isd_ray.queue.bank import Bank

N, B, D = 30, 6, 5


class Backbone(nn.Module):
    dim = D

    def forward(self, x: Tensor) -> Tensor:
        return x


def random(rows: int, seed: int, dim: int = D) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(ids: int = 0, dim: int = D) -> Bank:
    bank = Bank(N, dim, ids, dtype=torch.float64)
    links = (torch.arange(N)[:, None] * 7 + torch.arange(1, ids + 1)) % N if ids else None
    bank.write(torch.arange(N), unit(random(N, 0, dim)), links)
    return bank


def plain_npid(z: Tensor, rows: Tensor, own: Tensor, noise: Tensor | None, t: float) -> Tensor:
    """The two forms of the loss, one image after the other; the constant is that of a first batch."""
    if noise is None:
        return torch.stack(
            [-(row @ rows.T / t).log_softmax(0)[i] for row, i in zip(z, own, strict=True)]
        ).mean()
    positive, negative = ((z * rows[own]).sum(1) / t).exp(), (z @ rows[noise].T / t).exp()
    constant = N * torch.cat([positive[:, None], negative], 1).mean().item()
    share, terms = len(noise) / N, []
    for p, n in zip(positive / constant, negative / constant, strict=True):
        terms.append(-(p / (p + share)).log() - (share / (n + share)).log().sum())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("negatives", [0, 8])
def test_npid_equals_a_plain_reading(negatives):
    bank, index = filled(), torch.tensor([3, 17, 29, 0, 5, 11])
    method = build_method("npid", Backbone(), bank, negatives=negatives).double()
    method.student = nn.Identity()
    before, noise = bank.keys.clone(), Bank(N, D).draw(8) if negatives else None
    view, twin = (random(B, 3).requires_grad_() for _ in range(2))
    expected = plain_npid(unit(twin), before, index, noise, 0.1)
    loss = method([view], index).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(view.grad, twin.grad)
    assert twin.grad.abs().max() > 1e-3
    torch.testing.assert_close(bank.keys[index], unit(before[index] / 2 + unit(view.detach()) / 2))
    if negatives:
        first = method.criterion.log_z.clone()
        method([view * 2 + 1], index)
        assert torch.equal(method.criterion.log_z, first)  # the constant is that of the first batch


def test_pirl_equals_a_plain_reading():
    torch.manual_seed(0)
    bank, index = filled(), torch.tensor([3, 17, 29, 0, 5, 11])
    method = build_method("pirl", Mean(), bank, weight=0.3).double()
    method.student[1], method.piece = nn.Linear(3, D).double(), nn.Linear(3, D).double()
    method.puzzle = nn.Linear(9 * D, D).double()
    views = [torch.rand(B, 3, 12, 12, generator=torch.Generator().manual_seed(v)).double() for v in (1, 2)]
    before, chance = bank.keys.clone(), uniform(index, method.steps, 27)
    loss = method(views, index).loss
    of_image = unit(method.student[1](views[0].mean((2, 3))))
    of_puzzle = []
    for image, numbers in zip(views[1], chance, strict=True):
        pieces = []
        for cell in range(9):
            top, left = (4 * place + int(2 * numbers[9 * axis + cell]) for axis, place in places(cell))
            pieces.append(method.piece(image[:, top : top + 3, left : left + 3].mean((1, 2))))
        order = sorted(range(9), key=lambda cell: numbers[cell])
        of_puzzle.append(method.puzzle(torch.cat([pieces[cell] for cell in order])))
    parts = [plain_npid(z, before, index, None, 0.1) for z in (unit(torch.stack(of_puzzle)), of_image)]
    torch.testing.assert_close(loss, 0.3 * parts[0] + 0.7 * parts[1])
    torch.testing.assert_close(bank.keys[index], unit(before[index] / 2 + of_image.detach() / 2))


def places(cell: int):
    return enumerate(divmod(cell, 3), start=1)


class Mean(nn.Module):
    dim = 3

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def test_pieces_come_from_their_cells_and_cover_all_places():
    image = torch.arange(33 * 33.0).view(1, 1, 33, 33).expand(400, 3, 33, 33)
    pieces = cut(image, torch.rand(400, 18, generator=torch.Generator().manual_seed(0)))
    assert pieces.shape == (400, 9, 3, 8, 8)
    corner = pieces[:, :, 0, 0, 0]
    rows, columns = corner // 33, corner % 33
    for cell in range(9):
        assert set((rows[:, cell] - 11 * (cell // 3)).tolist()) == {0.0, 1.0, 2.0, 3.0}
        assert set((columns[:, cell] - 11 * (cell % 3)).tolist()) == {0.0, 1.0, 2.0, 3.0}
    assert torch.equal(pieces[:, :, 0, 1, 2] - corner, torch.full((400, 9), 33.0 + 2))


def test_numbers_follow_from_image_and_step_and_are_uniform():
    index = torch.arange(20_000)
    numbers = uniform(index, torch.tensor(5), 4)
    assert torch.equal(uniform(index[[7, 3]], torch.tensor(5), 4), numbers[[7, 3]])
    assert not torch.equal(uniform(index, torch.tensor(6), 4), numbers)
    counts = torch.histc(numbers, 10, 0, 1) / numbers.numel()
    torch.testing.assert_close(counts, torch.full((10,), 0.1).double(), atol=0.004, rtol=0)
    assert torch.corrcoef(numbers.T).fill_diagonal_(0).abs().max() < 0.03
    following = torch.stack([numbers[:-1, 0], numbers[1:, 0]])
    assert torch.corrcoef(following)[0, 1].abs() < 0.03


def plain_invprop(z, rows, links, index, weight, t=0.2, negatives=8, positives=3):
    terms, nearest = [], []
    for row, i in zip(z, index.tolist(), strict=True):
        s = row @ rows.T
        others = [j for j in s.argsort(descending=True).tolist() if j != i][:negatives]
        total = sum((s[j] / t).exp() for j in others)
        loss = -((s[i] / t).exp() / ((s[i] / t).exp() + total)).log()
        reached, layer = [], [i]
        for _ in range(3):
            layer = [j for k in layer for j in links[k].tolist()]
            reached += layer
        chosen = sorted((j for j in reached if j != i), key=lambda j: s[j].item())[:positives]
        terms.append(loss - weight * (sum((s[j] / t).exp() for j in chosen) / total).log())
        nearest.append(others[:4])
    return torch.stack(terms).mean(), torch.tensor(nearest)


@pytest.mark.parametrize("started", [False, True])
def test_invprop_equals_a_plain_reading(started):
    bank, index = filled(ids=4), torch.tensor([3, 17, 29, 0, 5, 11])
    method = build_method("invprop", Backbone(), bank, negatives=8, positives=3, weight_start=0).double()
    method.student = nn.Identity()
    if started:
        method.update_teacher(0.0)
    before, links = bank.keys.clone(), bank.ids.clone()
    view, twin = (random(B, 3).requires_grad_() for _ in range(2))
    expected, nearest = plain_invprop(unit(twin), before, links, index, 0.6 if started else 0.0)
    loss = method([view], index).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(view.grad, twin.grad)
    assert torch.equal(bank.ids[index], nearest)
    torch.testing.assert_close(bank.keys[index], unit(before[index] / 2 + unit(view.detach()) / 2))


def test_invprop_without_links_has_the_first_term_alone():
    bank = filled(ids=4)
    bank.ids.fill_(-1)
    method = build_method("invprop", Backbone(), bank, weight_start=0).double()
    method.student = nn.Identity()
    index, view = torch.arange(B), random(B, 3).requires_grad_()
    method.update_teacher(0.0)
    loss = method([view], index).loss
    loss.backward()
    assert view.grad.isfinite().all()
    bank.load_state_dict(filled(ids=4).state_dict())
    expected, _ = plain_invprop(unit(view.detach()), bank.keys, bank.ids, index, 0.0, negatives=N - 1)
    torch.testing.assert_close(loss.detach(), expected)  # 4096 negatives are all images here


def test_deepcluster_predicts_the_clusters_of_the_last_epoch():
    bank = Bank(N, 2 * D, 3, dtype=torch.float64)
    method = build_method("deepcluster_v2", Backbone(), bank, prototypes=4).double()
    method.student = encoder(nn.Identity(), nn.Identity())
    first = [random(N, seed) for seed in (3, 4)]
    method.begin_epoch(0)
    assert method(first, torch.arange(N)).loss == 0  # nothing is clustered as yet
    torch.testing.assert_close(bank.keys, torch.cat([unit(x) for x in first], dim=1))
    method.begin_epoch(1)
    for h, view in enumerate((0, 1, 0)):
        rows = unit(first[view])
        assert torch.equal(bank.ids[:, h], (rows @ method.centroids[h].T).argmax(1))
    views = [random(B, seed).requires_grad_() for seed in (5, 6, 7)]  # the third is small
    twins = [view.detach().clone().requires_grad_() for view in views]
    index, terms = torch.tensor([3, 17, 29, 0, 5, 11]), []
    for twin in twins:
        for h in range(3):
            log = (unit(twin) @ method.centroids[h].T / 0.1).log_softmax(1)
            terms.append(-log[torch.arange(B), bank.ids[index, h]].mean())
    expected = sum(terms) / len(terms)
    loss = method(views, index).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for view, twin in zip(views, twins, strict=True):
        torch.testing.assert_close(view.grad, twin.grad)


def test_a_random_network_has_the_loss_of_chance():
    bank = Bank(4000, 128)
    method = build_method("npid", Backbone(), bank)
    z = unit(random(64, 1, 128)).float()
    method.student = nn.Identity()
    assert method([z], torch.arange(64)).loss.item() == pytest.approx(math.log(4000) + 100 / 128 / 2, abs=0.5)
