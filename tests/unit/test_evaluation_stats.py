"""Intervals and tests against closed forms, enumeration and known coverage."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from silkie.stats import (
    bootstrap_mean,
    holm,
    mcnemar_exact,
    multinomial_weights,
    paired_bootstrap,
    paired_permutation,
    percentile_interval,
    wilson_interval,
)


def test_mcnemar_is_the_binomial_tail():
    # 3 + 10 flips: 2 * (C(13,0) + C(13,1) + C(13,2) + C(13,3)) / 2^13 = 2 * 378 / 8192
    assert mcnemar_exact(3, 10) == pytest.approx(756 / 8192)
    assert mcnemar_exact(10, 3) == mcnemar_exact(3, 10)
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(4, 4) == 1.0
    assert mcnemar_exact(0, 3000) == pytest.approx(0.0, abs=1e-300)
    with pytest.raises(ValueError, match="negative"):
        mcnemar_exact(-1, 2)


def test_bootstrap_mean_has_the_normal_width_for_many_values():
    x = np.random.default_rng(1).normal(size=400)
    mean, low, high = bootstrap_mean(x, seed=3)
    half = 1.96 * x.std() / math.sqrt(len(x))
    assert mean == pytest.approx(x.mean())
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)
    assert (mean, low, high) == tuple(bootstrap_mean(x, seed=3))
    assert (low, high) != tuple(bootstrap_mean(x, seed=4))[1:]


def test_bootstrap_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        estimate = bootstrap_mean((rng.random(60) < 0.3).astype(float), resamples=400, seed=trial)
        covered += estimate.low <= 0.3 <= estimate.high
    assert 0.90 <= covered / 300 <= 0.985


def test_clusters_widen_the_interval_by_the_root_of_their_size():
    """Six copies of each value carry the information of one."""
    values = np.random.default_rng(2).normal(size=100)
    repeated, owner = np.repeat(values, 6), np.repeat(np.arange(100), 6)
    one = bootstrap_mean(values)
    clustered = bootstrap_mean(repeated, clusters=owner.tolist())
    naive = bootstrap_mean(repeated)
    assert (clustered.low, clustered.high) == pytest.approx((one.low, one.high))
    assert (clustered.high - clustered.low) / (naive.high - naive.low) == pytest.approx(math.sqrt(6), rel=0.1)


def test_paired_bootstrap_uses_the_pairing():
    rng = np.random.default_rng(5)
    a = rng.normal(scale=10, size=200)
    b = a + 0.5 + rng.normal(scale=0.1, size=200)
    difference, low, high, p_value = paired_bootstrap(a, b)
    assert difference == pytest.approx((b - a).mean())
    assert 0.4 < low < high < 0.6, "the spread of 10 between questions must not enter"
    assert p_value == pytest.approx(1 / 10001)
    assert paired_bootstrap(a, b).significant and not paired_bootstrap(a, a).significant


def test_permutation_is_the_enumeration_of_all_swaps():
    a, b = [0.0, 1.0, 0.0, 2.0, 1.0], [1.0, 3.0, 0.5, 1.0, 1.0]
    observed = abs(sum(b) - sum(a))
    every = [abs(sum(s * (y - x) for s, x, y in zip(signs, a, b, strict=True))) for signs in product((1, -1), repeat=5)]
    assert paired_permutation(a, b) == pytest.approx(np.mean([e >= observed - 1e-9 for e in every]))
    assert paired_permutation(a, a) == 1.0


def test_monte_carlo_permutation_agrees_with_mcnemar_on_right_and_wrong():
    """On 0/1 values a swap test of the mean IS the exact McNemar test."""
    a = np.r_[np.ones(9), np.zeros(24), np.ones(30)]
    b = np.r_[np.zeros(9), np.ones(24), np.ones(30)]
    assert paired_permutation(a, b, resamples=40_000) == pytest.approx(mcnemar_exact(9, 24), abs=0.004)


def test_permutation_swaps_clusters_whole():
    a, b = [0.0] * 12, [1.0] * 12
    assert paired_permutation(a, b, clusters=[0] * 6 + [1] * 6) == 0.5  # two units: 2 of 4 swaps are as extreme
    assert paired_permutation(a, b) == pytest.approx(2 / 2**12)


def test_wilson_is_honest_at_the_ends():
    low = wilson_interval(0, 100)
    assert low.mean == 0 and low.low == 0 and low.high == pytest.approx(0.0370, abs=5e-5)
    middle = wilson_interval(50, 100)
    assert (middle.low, middle.high) == pytest.approx((0.4038, 0.5962), abs=5e-5)
    with pytest.raises(ValueError, match="not a proportion"):
        wilson_interval(5, 4)


def test_holm_against_the_textbook_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_multinomial_weights_draw_units_with_replacement():
    chunks = list(multinomial_weights(np.random.default_rng(0), 7, 1000))
    weights = np.concatenate(chunks)
    assert weights.shape == (1000, 7) and (weights.sum(1) == 7).all()
    assert weights.mean(0) == pytest.approx(np.ones(7), abs=0.1)
    assert weights.var() == pytest.approx(6 / 7, abs=0.05)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="non-empty"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match=r"values\[1\] is not a number"):
        bootstrap_mean([1.0, float("nan")])
    with pytest.raises(ValueError, match="same questions"):
        paired_bootstrap([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="clusters"):
        bootstrap_mean([1.0, 2.0], clusters=[1])
    with pytest.raises(ValueError, match="confidence"):
        percentile_interval(np.ones(3), 95)
    assert all(math.isnan(x) for x in percentile_interval(np.array([np.nan]), 0.95))
