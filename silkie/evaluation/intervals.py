"""Bootstrap intervals of a whole score: images are resampled within strata, and every metric is recomputed from the
resampled sums."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from silkie.evaluation.scoring import Array, Score, Table
from silkie.stats import multinomial_weights, percentile_interval

__all__ = ["metric_intervals", "resampled_sums"]


def metric_intervals(
    score: Score, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Interval (low, high) of every metric that the score has."""
    table = score.table()
    (sums,) = resampled_sums((table,), resamples, seed)
    drawn = score.totals(sums, table.strata)
    return {
        name: percentile_interval(np.asarray(drawn[name]), confidence)
        for name, value in score.metrics.items()
        if value is not None
    }


def resampled_sums(tables: Sequence[Table], resamples: int, seed: int) -> list[Array]:
    """Bootstrap sums [B, S, C] of each table. The tables are of the same clusters, and get the same draws."""
    first = tables[0]
    rng = np.random.default_rng(seed)
    out = [np.empty((resamples, len(first.strata), table.sums.shape[1])) for table in tables]
    for s in range(len(first.strata)):
        own = first.stratum == s
        start = 0
        # one draw of images for all tables: what two systems share on an image cancels in their difference
        for weights in multinomial_weights(rng, int(own.sum()), resamples):
            for table, sums in zip(tables, out, strict=True):
                sums[start : start + len(weights), s] = weights @ table.sums[own]
            start += len(weights)
    return out
