"""Intervals and tests for benchmark scores: pure functions on arrays of per-question values.

Questions about the same image are not independent, so `bootstrap_mean` takes `clusters` and resamples those whole. All
randomness is seeded; the same call gives the same numbers.

Legend: N questions, U clusters (units), B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Estimate",
    "bootstrap_mean",
    "holm",
    "mcnemar_exact",
    "multinomial_weights",
    "percentile_interval",
]

Array = NDArray[np.float64]

# Weights of one chunk of resamples stay near 64 MB whatever the number of questions.
_CHUNK_ELEMENTS = 8_000_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its interval. Unpacks as `mean, low, high`."""

    mean: float
    low: float
    high: float

    def __iter__(self) -> Iterator[float]:
        return iter((self.mean, self.low, self.high))


def bootstrap_mean(
    values: Sequence[float] | Array,
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Mean of per-question values with a percentile bootstrap interval (Efron 1979).

    Args:
        values: [N] numbers (0/1 for right/wrong).
        clusters: [N] owner of each value (its image); clusters are resampled whole. Default: every value its own.
        confidence: coverage of the interval, in (0, 1).

    Returns:
        Estimate(mean, low, high). With one cluster the interval is the mean itself.

    Raises:
        ValueError: no values, a NaN, or lengths that differ.
    """
    x = _checked(values, "values")
    sums, counts = _cluster_sums(x, clusters)
    rng = np.random.default_rng(seed)
    draws = [(w @ sums) / (w @ counts) for w in multinomial_weights(rng, len(sums), resamples)]
    low, high = percentile_interval(np.concatenate(draws), confidence)
    return Estimate(float(x.mean()), low, high)


def mcnemar_exact(only_a_right: int, only_b_right: int) -> float:
    """Two-sided exact McNemar test on right/wrong answers: under "no difference" the flips are fair coin tosses.

    Args:
        only_a_right: questions that A answers right and B wrong.
        only_b_right: questions that B answers right and A wrong.
    """
    if only_a_right < 0 or only_b_right < 0:
        raise ValueError(f"Counts of flips cannot be negative: {only_a_right}, {only_b_right}.")
    n, k = only_a_right + only_b_right, min(only_a_right, only_b_right)
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, 2 * tail / 2**n)  # integers of any size divide to a correctly rounded float


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979) for several tests at once, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, (len(p_values) - rank) * p_values[i])
        adjusted[i] = min(1.0, running)
    return adjusted


def multinomial_weights(rng: np.random.Generator, units: int, resamples: int) -> Iterator[Array]:
    """Bootstrap weights [rows, U] in chunks that sum to `resamples` rows: how often each unit is drawn when U units are
    drawn with replacement."""
    rows_left = resamples
    while rows_left:
        rows = min(rows_left, max(1, _CHUNK_ELEMENTS // max(1, units)))
        yield rng.multinomial(units, np.full(units, 1.0 / units), size=rows).astype(np.float64)
        rows_left -= rows


def percentile_interval(draws: Array, confidence: float) -> tuple[float, float]:
    """Central interval of bootstrap draws [B]; draws that are NaN (an empty denominator in that resample) are left
    out."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}.")
    finite = draws[np.isfinite(draws)]
    if finite.size == 0:
        return float("nan"), float("nan")
    tail = (1 - confidence) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    return float(low), float(high)


def _checked(values: Sequence[float] | Array, name: str) -> Array:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"{name} must be a non-empty list of numbers, got shape {x.shape}.")
    if not np.isfinite(x).all():
        raise ValueError(
            f"{name}[{int(np.argmin(np.isfinite(x)))}] is not a number: drop unanswered questions, or count them as"
            " wrong, before this."
        )
    return x


def _cluster_sums(x: Array, clusters: Sequence[Hashable] | None) -> tuple[Array, Array]:
    """Per cluster the sum of its values [U] and their number [U]."""
    if clusters is None:
        return x, np.ones_like(x)
    if len(clusters) != len(x):
        raise ValueError(f"{len(x)} values but {len(clusters)} clusters.")
    index: dict[Hashable, int] = {}
    owner = np.array([index.setdefault(c, len(index)) for c in clusters])
    return np.bincount(owner, weights=x).astype(np.float64), np.bincount(owner).astype(np.float64)
