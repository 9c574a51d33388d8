"""Intervals and paired tests for rates."""

from collections.abc import Callable
from collections.abc import Sequence
import math
import statistics
from typing import NamedTuple

import numpy as np
from scipy import special


class Estimate(NamedTuple):
    """A rate with its interval; `n` is the number of prompts behind it."""

    value: float
    low: float
    high: float
    n: int


# Normal quantile of a two-sided 95 % interval.
Z95 = statistics.NormalDist().inv_cdf(0.975)
_SLACK = 1e-9


def wilson(successes: float, n: int, z: float = Z95) -> Estimate:
    """Wilson score interval of a binomial rate; [0, 1] without observations."""
    if n == 0:
        return Estimate(math.nan, 0.0, 1.0, 0)
    rate = successes / n
    center = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n)
    half *= math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, center - half)
    high = 1.0 if successes == n else min(1.0, center + half)
    return Estimate(rate, low, high, n)


def macro_average(parts: Sequence[tuple[float, int]], z: float = Z95) -> Estimate:
    """Mean of the rates of several groups (successes, n), each of equal weight.

    A Wilson interval at the effective sample size n_eff = G^2 / sum(1 / n_g), the n at
    which a plain rate has the average's variance when all groups share one rate.
    """
    return _average(parts, lambda successes, n: wilson(successes, n, z))


def exact(successes: float, n: float, error: float = 0.05) -> Estimate:
    """Clopper-Pearson interval: each end is wrong with probability error / 2 at most.

    Fractional counts, of a weighted mean, are rounded away from certainty.
    """
    if n < 1:
        return Estimate(math.nan, 0.0, 1.0, 0)
    # The slack forgives what a mean of fractions lost to rounding.
    trials = math.floor(n + _SLACK)
    fewest = math.floor(successes / n * trials + _SLACK)
    most = math.ceil(successes / n * trials - _SLACK)
    tail = error / 2
    low = special.betaincinv(fewest, trials - fewest + 1, tail) if fewest else 0.0
    high = (
        special.betaincinv(most + 1, trials - most, 1 - tail) if most < trials else 1.0
    )
    return Estimate(successes / n, float(low), float(high), trials)


def exact_average(parts: Sequence[tuple[float, int]], error: float = 0.05) -> Estimate:
    """`macro_average` with the interval of `exact`.

    With groups of equal size it errs no more often than stated, whatever their rates
    (Hoeffding 1956: the sum of unequal trials is less dispersed than a binomial).
    """
    return _average(parts, lambda successes, n: exact(successes, n, error))


def _average(
    parts: Sequence[tuple[float, int]], interval: Callable[[float, float], Estimate]
) -> Estimate:
    """Mean of the groups' rates, with the interval of its effective sample size."""
    parts = [(s, n) for s, n in parts if n]
    if not parts:
        return interval(0, 0)
    value = statistics.fmean(s / n for s, n in parts)
    effective = len(parts) ** 2 / sum(1 / n for _, n in parts)
    found = interval(value * effective, effective)
    return found._replace(value=value, n=sum(n for _, n in parts))


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], resamples: int = 10_000, seed=0
) -> tuple[float, float, float]:
    """Mean of `first - second` over the same prompts, and its 95 % interval."""
    differences = np.asarray(first, float) - np.asarray(second, float)
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(differences), size=(resamples, len(differences)))
    low, high = np.quantile(differences[rows].mean(axis=1), (0.025, 0.975))
    return float(differences.mean()), float(low), float(high)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact two-sided McNemar p-value of two judgements of the same prompts."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    n = only_first + only_second
    fewer = min(only_first, only_second)
    tail = sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n
    return min(1.0, 2 * tail)
