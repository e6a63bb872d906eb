"""kNN votes against known answers, scikit-learn and a plain loop."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from isd_ray.errors import UserError
from isd_ray.evaluate.knn import knn, majority_vote, merge, neighbours, weighted_vote


def blobs(n: int, d: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=g)
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    return centres[y] + 1.5 * torch.randn(n, d, generator=g), y


@pytest.mark.parametrize("k", [1, 3, 21])
def test_two_class_vote_equals_scikit_learn(k: int) -> None:
    bank, y = blobs(300, 8, 2, 0)  # two classes and an odd k: no ties
    queries, _ = blobs(80, 8, 2, 1)
    peer = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(bank.numpy(), y.numpy())
    assert knn(bank, y, queries, k, classes=2).tolist() == peer.predict(queries.numpy()).tolist()


def test_weighted_vote_equals_a_plain_loop() -> None:
    bank, y = blobs(300, 8, 5, 0)
    queries, _ = blobs(60, 8, 5, 1)
    cosine = F.normalize(queries.double(), dim=1) @ F.normalize(bank.double(), dim=1).T
    expected = []
    for row in cosine.tolist():
        score = [0.0] * 5
        for j in sorted(range(300), key=lambda j: -row[j])[:200]:
            score[y[j]] += math.exp(row[j] / 0.07)
        expected.append(score.index(max(score)))
    assert knn(bank, y, queries, 200, classes=5, weighted=True).tolist() == expected


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 40),
    q=st.integers(1, 12),
    query_chunk=st.integers(1, 13),
    bank_chunk=st.integers(1, 41),
    data=st.data(),
)
def test_chunks_change_nothing(
    n: int, q: int, query_chunk: int, bank_chunk: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, n))
    bank, _ = blobs(n, 6, 3, n)
    queries, _ = blobs(q, 6, 3, 100 + q)
    cosine = F.normalize(queries.double(), dim=1) @ F.normalize(bank.double(), dim=1).T
    expected = cosine.sort(dim=1, descending=True)
    similarity, row = neighbours(bank, queries, k, query_chunk=query_chunk, bank_chunk=bank_chunk)
    assert torch.equal(row, expected.indices[:, :k])
    torch.testing.assert_close(similarity.double(), expected.values[:, :k], atol=1e-6, rtol=0)


@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, 39), max_size=5), k=st.integers(1, 40))
def test_the_nearest_of_parts_merge_to_the_nearest_of_the_whole(cuts: set[int], k: int) -> None:
    bank, _ = blobs(40, 6, 3, 5)
    queries, _ = blobs(7, 6, 3, 6)
    edges, parts = [0, *sorted(cuts), 40], []
    for start, stop in pairwise(edges):
        similarity, row = neighbours(bank[start:stop], queries, min(k, stop - start))
        parts.append((similarity, row + start))
    similarity, row = merge(parts, k)
    whole = neighbours(bank, queries, k)
    torch.testing.assert_close(similarity, whole[0], atol=1e-6, rtol=0)
    assert torch.equal(row, whole[1])


def test_ties_fall_to_each_tied_class_equally_often_and_repeat_with_the_seed() -> None:
    votes = torch.tensor([[2, 0, 2, 5, 0, 4]]).expand(6000, 6)  # 0 and 2 tie, 4 and 5 have one vote each
    winners = majority_vote(votes, 7, seed=3)
    share = torch.bincount(winners, minlength=7) / 6000
    assert share[[1, 3, 4, 5, 6]].sum() == 0
    assert abs(share[0] - 0.5) < 0.03  # 4.6 standard deviations
    assert torch.equal(winners, majority_vote(votes, 7, seed=3))
    assert not torch.equal(winners, majority_vote(votes, 7, seed=4))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=7, max_size=7), min_size=1, max_size=8), st.integers(0, 9)
)
def test_the_winner_always_has_the_most_votes(votes: list[list[int]], seed: int) -> None:
    winners = majority_vote(torch.tensor(votes), 5, seed).tolist()
    assert all(
        row.count(w) == max(row.count(c) for c in range(5)) for row, w in zip(votes, winners, strict=True)
    )


def test_one_close_neighbour_outweighs_two_far_ones_only_in_the_weighted_vote() -> None:
    similarity, labels = torch.tensor([[0.9, 0.5, 0.5]]), torch.tensor([[1, 0, 0]])
    assert majority_vote(labels, 2).item() == 0
    assert weighted_vote(similarity, labels, 2).item() == 1
    assert weighted_vote(similarity, labels, 2, temperature=1.0).item() == 0
    assert weighted_vote(similarity, labels, 2, temperature=1e-4).item() == 1  # exp(9000) does not overflow


def test_length_of_features_plays_no_part() -> None:
    bank, y = blobs(50, 8, 3, 0)
    queries, _ = blobs(20, 8, 3, 1)
    scale = torch.rand(50, 1) * 9 + 0.1
    assert torch.equal(knn(bank, y, queries, 5, classes=3), knn(bank * scale, y, queries * 7, 5, classes=3))


def test_a_class_missing_from_the_bank_is_never_predicted() -> None:
    bank, y = blobs(60, 4, 3, 0)
    keep = y != 1
    assert 1 not in knn(bank[keep], y[keep], bank, 3, classes=3)


def test_bad_input_is_named() -> None:
    bank, y = torch.eye(3), torch.tensor([0, 1, 2])
    with pytest.raises(UserError, match="k = 4 neighbours of a bank of 3 images"):
        knn(bank, y, bank, 4, classes=3)
    with pytest.raises(UserError, match="label -1"):
        knn(bank, torch.tensor([0, -1, 2]), bank, 1, classes=3)
    with pytest.raises(UserError, match=r"label 2, outside 0\.\.1"):
        knn(bank, y, bank, 1, classes=2)
    with pytest.raises(UserError, match="3 images and 2 labels"):
        knn(bank, y[:2], bank, 1, classes=3)
    with pytest.raises(UserError, match="bank is empty"):
        knn(bank[:0], y[:0], bank, 1, classes=3)
