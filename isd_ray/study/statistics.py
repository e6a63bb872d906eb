"""Is a difference more than chance? Paired tests over seeds or splits, and what few of them can never show."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

EXACT = 16  # most pairs whose 2^n signs are all tried
DRAWS = 99_999  # random signs for more pairs
LEVEL = 0.05


@dataclass(frozen=True)
class Paired:
    """Differences of n pairs: mean, standard deviation (n - 1), 95 % interval of the mean, p of two two-sided tests.

    What n does not allow is None: everything but the mean for one pair; t, its p and the interval where all differences
    are equal.
    """

    n: int
    mean: float
    deviation: float | None = None
    low: float | None = None
    high: float | None = None
    t: float | None = None
    p_t: float | None = None
    p_sign: float | None = None

    @property
    def least(self) -> float:
        """Smallest p that the sign-flip test can give with n pairs."""
        return float(min(1.0, 2.0 ** (1 - self.n)))


def paired(differences: Sequence[float]) -> Paired:
    """Test whether differences [n >= 1] have mean 0, by Student's t and by flipping their signs.

    The t-test takes differences for normal. The sign-flip test (Fisher) takes them for symmetric about 0 alone: p is
    the share of the 2^n signs whose mean is at least as far from 0, all of them tried up to 16 pairs.
    """
    x = np.asarray(differences, dtype=float)
    n, mean = len(x), float(x.mean())
    if n < 2:
        return Paired(n, mean)
    deviation, p_sign = float(x.std(ddof=1)), _sign_flip(x)
    if deviation <= 1e-12 * max(1.0, abs(mean)):
        return Paired(n, mean, 0.0, p_sign=p_sign)
    test = stats.ttest_1samp(x, 0.0)
    interval = test.confidence_interval(1 - LEVEL)
    low, high, t, p_t = map(float, (interval.low, interval.high, test.statistic, test.pvalue))
    return Paired(n, mean, deviation, low, high, t, p_t, p_sign)


def _sign_flip(x: np.ndarray) -> float:
    """The share of signs; scipy counts ties within rounding as at least as far."""
    few = len(x) <= EXACT
    test = stats.permutation_test(
        (x,),
        np.mean,
        permutation_type="samples",
        n_resamples=np.inf if few else DRAWS,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Return p values adjusted for being several (Holm 1979), in their order; None stays and does not count."""
    known = sorted((value, i) for i, value in enumerate(p) if value is not None)
    adjusted: list[float | None] = [None] * len(p)
    highest = 0.0
    for rank, (value, i) in enumerate(known):
        highest = max(highest, min(1.0, value * (len(known) - rank)))
        adjusted[i] = highest
    return adjusted
