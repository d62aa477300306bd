"""How much chance there is in a difference: intervals over users and seeds, a permutation test, Holm's correction.

Two systems are ranked on the same targets, so their difference is taken user by user: what is hard for both cancels.
``paired`` says how far it would move with other users; seeds move it too, and ``seed_interval`` says how far.
U users, N predictions (one a user but under temporal ... successive).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
DRAWS = 10_000
"Of every bootstrap and permutation test."


@dataclass(frozen=True)
class Paired:
    """The difference of two systems over the same users.

    Args:
        a, b: mean of each; difference: a - b.
        low, high: its 95 % interval over users.
        p: two-sided p-value of no difference.
    """

    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of a number over seeds, and the 95 % interval of the mean."""

    mean: float
    sd: float
    low: float
    high: float


def paired(
    a: npt.ArrayLike, b: npt.ArrayLike, users: npt.ArrayLike | None = None, draws: int = DRAWS, seed: int = 0
) -> Paired:
    """Difference of means with a bootstrap interval and a sign-flip permutation test.

    Args:
        a, b: (N,) a metric of two systems, prediction by prediction in the same order.
        users: (N,) whose prediction each is, where users have several: they are drawn and flipped whole. Unset:
            each is a user's own.
        draws: of the bootstrap and of the test, whose smallest p-value is 1 / (draws + 1).
        seed: of the draws.

    Raises:
        ValueError: the lengths differ, or there is nothing to compare.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"two systems are compared on the same users: shapes {a.shape} and {b.shape}")
    delta, counts = _by_user(a - b, users)
    low, high = _bootstrap(delta, counts, draws, seed)
    p = _sign_flip(delta, draws, seed)
    return Paired(float(a.mean()), float(b.mean()), float((a - b).mean()), low, high, p)


def user_interval(
    values: npt.ArrayLike, users: npt.ArrayLike | None = None, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of a metric's mean, had other users been drawn; arguments as of ``paired``."""
    return _bootstrap(*_by_user(np.asarray(values, np.float64), users), draws, seed)


def seed_interval(values: Sequence[float]) -> Spread:
    """Mean over seeds with its 95 % t interval; one seed has no spread, which is then NaN."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return Spread(mean, math.nan, math.nan, math.nan)
    sd = float(np.std(values, ddof=1))
    half = t_quantile(n - 1) * sd / math.sqrt(n)
    return Spread(mean, sd, mean - half, mean + half)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values of a family of comparisons, adjusted by Holm's step-down method, in the given order.

    Calling those below .05 different has a chance of at most 5 % of one false call in the whole family.
    """
    adjusted, floor = [0.0] * len(ps), 0.0
    for place, index in enumerate(np.argsort(ps, kind="stable")):
        floor = max(floor, min(1.0, (len(ps) - place) * ps[index]))
        adjusted[index] = floor
    return adjusted


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by bisection of its distribution (Abramowitz and Stegun, 26.7.3-4)."""

    def within(t: float) -> float:
        """Probability of [-t, t]."""
        angle = math.atan(t / math.sqrt(freedom))
        cosine, odd = math.cos(angle), freedom % 2
        term = total = cosine if odd else 1.0
        for step in range(2 + odd, freedom - 1, 2):
            term *= cosine**2 * (step - 1) / step
            total += term
        if not odd:
            return math.sin(angle) * total
        return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))

    low, high = 0.0, 100.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < 0.95 else (low, middle)
    return high


def _by_user(values: Array, users: npt.ArrayLike | None) -> tuple[Array, Array | None]:
    """(U,) sums of each user's values and (U,) how many there are; None where each has one."""
    if users is None:
        return values, None
    _, number, counts = np.unique(np.asarray(users), return_inverse=True, return_counts=True)
    if (counts == 1).all():
        return values, None
    return np.bincount(number, values).astype(np.float64), counts.astype(np.float64)


def _bootstrap(sums: Array, counts: Array | None, draws: int, seed: int) -> tuple[float, float]:
    """Percentiles of the mean over users drawn with replacement."""
    generator = np.random.default_rng(seed)
    means = []
    for size in _blocks(draws, len(sums)):
        drawn = generator.integers(len(sums), size=(size, len(sums)), dtype=np.int32)
        means.append(sums[drawn].sum(1) / (len(sums) if counts is None else counts[drawn].sum(1)))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def _sign_flip(delta: Array, draws: int, seed: int) -> float:
    """How often flipping each user's sign at random gives a sum as far from 0: two-sided, (hits + 1) / (draws + 1)."""
    delta = delta[delta != 0]  # their signs change nothing
    if not len(delta):
        return 1.0
    generator = np.random.default_rng(seed)
    observed, hits = abs(delta.sum()), 0
    for size in _blocks(draws, len(delta)):
        width = -(-len(delta) // 8)
        bits = np.frombuffer(generator.bytes(size * width), np.uint8).reshape(size, width)
        flipped = np.unpackbits(bits, axis=1, count=len(delta)).astype(np.float64)
        # sums of the same terms in another order are not the same to the last bit
        hits += int((np.abs(delta.sum() - 2 * flipped @ delta) >= observed * (1 - 1e-9)).sum())
    return (hits + 1) / (draws + 1)


def _blocks(draws: int, width: int) -> list[int]:
    """Sizes that ``draws`` rows are made in, a few million numbers at a time."""
    size = max(1, 2**22 // width)
    return [min(size, draws - begin) for begin in range(0, draws, size)]
