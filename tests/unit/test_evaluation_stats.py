"""Intervals and tests against closed forms, enumeration and known coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from silkie.stats import (
    bootstrap_mean,
    holm,
    mcnemar_exact,
    multinomial_weights,
    percentile_interval,
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
    with pytest.raises(ValueError, match="clusters"):
        bootstrap_mean([1.0, 2.0], clusters=[1])
    with pytest.raises(ValueError, match="confidence"):
        percentile_interval(np.ones(3), 95)
    assert all(math.isnan(x) for x in percentile_interval(np.array([np.nan]), 0.95))
