"""Paired tests against formulas written out, and what few pairs can never show."""

import itertools
import math

import numpy as np
import pytest

from isd_ray.study.statistics import holm, paired

# Diff rows of table 5 of the ISD paper, from its method rows (D10 of the 30 rare classes as it must be, 49.8).
MOCO_ALL = [48.9, 57.8, 59.4, 56.7, 62.0, 54.6, 57.8, 57.2, 62.4, 54.4]
ISD_ALL = [49.6, 57.9, 61.9, 58.6, 62.3, 56.3, 57.8, 58.1, 62.5, 55.3]
MOCO_RARE = [44.7, 52.3, 57.3, 53.1, 57.7, 50.7, 51.1, 51.9, 58.9, 49.8]
ISD_RARE = [46.5, 53.9, 60.8, 56.8, 60.5, 54.5, 53.1, 55.0, 60.7, 51.5]


def sign_flip(differences: list[float]) -> float:
    """Every sign by hand, in float64."""
    x, n = np.array(differences), len(differences)
    means = [abs(np.mean(x * s)) for s in itertools.product((1, -1), repeat=n)]
    return sum(m >= abs(x.mean()) * (1 - 1e-12) for m in means) / 2**n


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_both_tests_by_hand(n):
    x = np.random.default_rng(n).normal(0.7, 1, n).tolist()
    test = paired(x)
    mean, deviation = math.fsum(x) / n, math.sqrt(math.fsum((v - math.fsum(x) / n) ** 2 for v in x) / (n - 1))
    assert test.n == n
    assert test.mean == pytest.approx(mean, rel=1e-12)
    assert test.deviation == pytest.approx(deviation, rel=1e-12)
    assert test.t == pytest.approx(mean / (deviation / math.sqrt(n)), rel=1e-12)
    assert test.p_sign == pytest.approx(sign_flip(x), rel=1e-12)
    half = mean - test.low
    assert test.high - mean == pytest.approx(half, rel=1e-9)


def test_t_has_the_p_of_a_table():
    """Student's t of n = 3 in closed form: p = 1 - t / sqrt(t^2 + 2); its 97.5 % point of 2 degrees is 4.302653."""
    test = paired([1.0, 2.0, 4.5])
    assert test.p_t == pytest.approx(1 - test.t / math.sqrt(test.t**2 + 2), rel=1e-10)
    assert (test.mean - test.low) / (test.deviation / math.sqrt(3)) == pytest.approx(4.302653, rel=1e-6)


def test_the_paper_s_table_5():
    everything = paired(np.subtract(ISD_ALL, MOCO_ALL))
    rare = paired(np.subtract(ISD_RARE, MOCO_RARE))
    large = [((38 * i - 30 * ri) - (38 * m - 30 * rm)) / 8
             for i, ri, m, rm in zip(ISD_ALL, ISD_RARE, MOCO_ALL, MOCO_RARE, strict=True)]  # fmt: skip
    assert (round(everything.mean, 2), round(everything.t, 1)) == (0.91, 3.3)
    assert (round(rare.mean, 2), round(rare.t, 1)) == (2.58, 9.1)
    assert round(paired(large).mean, 1) == -5.4  # what the rare row alone hides
    assert rare.p_sign == pytest.approx(2 / 2**10)  # all ten have one sign: the least that ten can give
    assert rare.p_sign == pytest.approx(rare.least)


def test_few_pairs_say_little():
    one = paired([3.0])
    assert (one.n, one.mean, one.least) == (1, 3.0, 1.0)
    assert one.p_t is one.p_sign is one.low is one.deviation is None
    three = paired([3.0, 3.1, 3.2])
    assert three.p_sign == pytest.approx(0.25)
    assert three.least == 0.25
    assert paired([1.0] * 5).least > 0.05 > paired([1.0] * 6).least


def test_equal_differences_have_no_t():
    equal = paired([2.0, 2.0, 2.0])
    assert (equal.deviation, equal.t, equal.p_t, equal.low) == (0.0, None, None, None)
    assert equal.p_sign == pytest.approx(0.25)
    assert paired([0.0, 0.0]).p_sign == 1.0


def test_many_pairs_are_sampled_close_to_the_truth():
    x = np.random.default_rng(0).normal(0.4, 1, 24).tolist()
    test = paired(x)
    assert test.p_sign == pytest.approx(test.p_t, abs=0.02)  # both are right for normal differences
    assert paired(x).p_sign == test.p_sign


def test_holm_by_hand():
    assert holm([0.01, None, 0.04, 0.03]) == [
        pytest.approx(0.03),
        None,
        pytest.approx(0.06),
        pytest.approx(0.06),
    ]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
