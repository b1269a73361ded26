"""Two systems on the same questions: what changed, how sure that is, and which answers flipped.

Intervals: paired bootstrap over images within strata, each metric recomputed from the resampled sums. p-values: the two
systems' answers swapped at random per image (permutation), and McNemar's exact test on right / wrong. A difference is b
- a."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from silkie.evaluation.intervals import resampled_sums
from silkie.evaluation.scoring import Array, Item, Score, Table, Totals
from silkie.stats import holm, mcnemar_exact, percentile_interval

__all__ = ["Comparison", "MetricDifference", "compare_scores"]


@dataclass(frozen=True, slots=True)
class MetricDifference:
    """A metric of both systems; `low`, `high` bound the difference b - a. None: the rate has an empty denominator."""

    name: str
    a: float | None
    b: float | None
    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None
    better: bool | None
    """Whether b's value is the better one; None where they are equal or the metric has no good direction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    benchmark: str
    questions: int
    metrics: list[MetricDifference]
    categories: dict[str, MetricDifference]
    """Each category's first metric; p-values are corrected for the number of categories (Holm)."""
    fixed: list[tuple[Item, Item]]
    """(a's, b's) answers of the questions that a gets wrong and b right."""
    broken: list[tuple[Item, Item]]
    mcnemar_p: float | None
    warnings: tuple[Sequence[str], Sequence[str]] = ((), ())
    """What the scorers say about a's and b's numbers."""

    def to_dict(self, *, flips: bool = True) -> dict[str, Any]:
        result: dict[str, Any] = {
            "benchmark": self.benchmark,
            "questions": self.questions,
            "metrics": {m.name: _json_values(m) for m in self.metrics},
            "categories": {name: {"metric": m.name, **_json_values(m)} for name, m in self.categories.items()},
            "flips": {"fixed": len(self.fixed), "broken": len(self.broken), "mcnemar_p": self.mcnemar_p},
        }
        if flips:
            for name, pairs in (("fixed", self.fixed), ("broken", self.broken)):
                result["flips"][f"{name}_questions"] = [
                    {
                        **{k: v for k, v in b.to_dict().items() if k != "answer"},
                        "answer_a": a.answer,
                        "answer_b": b.answer,
                    }
                    for a, b in pairs
                ]
        return result


# Rates that are neither good nor bad by themselves.
NEUTRAL = frozenset({"yes_rate", "objects_per_answer"})


def compare_scores(
    a: Score, b: Score, *, only_common: bool = False, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Comparison:
    """Compare two scored results files of one benchmark.

    Args:
        only_common: drop the questions that one of the files lacks (whole images), instead of refusing.

    Raises:
        ValueError: different benchmarks, or different questions.
    """
    if a.benchmark != b.benchmark:
        raise ValueError(f"A is {a.benchmark} and B is {b.benchmark}: only results of one benchmark can be compared.")
    items_a, items_b = _aligned(a, b, only_common)
    metrics = metric_differences(items_a, items_b, a.totals, a.lower_is_better, confidence, resamples, seed)
    return Comparison(
        benchmark=a.benchmark,
        questions=len(items_a),
        metrics=[m for m in metrics if m.name in a.metrics or m.name in b.metrics],
        categories=_category_differences(a, b, items_a, items_b, confidence, resamples, seed),
        fixed=[(x, y) for x, y in zip(items_a, items_b, strict=True) if x.correct is False and y.correct],
        broken=[(x, y) for x, y in zip(items_a, items_b, strict=True) if x.correct and y.correct is False],
        mcnemar_p=_mcnemar(items_a, items_b),
        warnings=(a.warnings, b.warnings),
    )


def metric_differences(
    a: Sequence[Item],
    b: Sequence[Item],
    totals: Totals,
    lower_is_better: frozenset[str],
    confidence: float,
    resamples: int,
    seed: int,
) -> list[MetricDifference]:
    """Every metric's difference with its interval and permutation p-value. a and b: the same questions in the same
    order."""
    # A's images for both: the two files may write image names in different ways
    table_a, table_b = Table.of(a), Table.of(b, owners=a)
    strata = table_a.strata
    point_a, point_b = totals(table_a.totals(), strata), totals(table_b.totals(), strata)
    drawn_a, drawn_b = resampled_sums((table_a, table_b), resamples, seed)
    boot_a, boot_b = totals(drawn_a, strata), totals(drawn_b, strata)
    swapped_a, swapped_b = _swapped(table_a, table_b, resamples, seed)
    perm_a, perm_b = totals(swapped_a, strata), totals(swapped_b, strata)
    rows = []
    for name in point_a:
        x, y = float(point_a[name]), float(point_b[name])
        if not np.isfinite([x, y]).all():
            rows.append(MetricDifference(name, _finite(x), _finite(y), None, None, None, None, None))
            continue
        low, high = percentile_interval(np.asarray(boot_b[name] - boot_a[name]), confidence)
        null = np.abs(np.asarray(perm_b[name] - perm_a[name]))
        # The tolerance: rounding must not make a swap that equals the observed difference look smaller. The ones: the
        # observed labelling is itself one of the swaps, so that a p-value is never 0 (Phipson and Smyth 2010).
        extreme = int(np.sum(null >= abs(y - x) - 1e-9))
        p_value = 1.0 if x == y else (extreme + 1) / (len(null) + 1)
        direction = None if x == y or name in NEUTRAL else (y < x) == (name in lower_is_better)
        rows.append(MetricDifference(name, x, y, y - x, low, high, p_value, direction))
    return rows


def _swapped(a: Table, b: Table, resamples: int, seed: int) -> tuple[Array, Array]:
    """Sums [B, S, C] after the systems' labels were swapped in a random half of the clusters."""
    rng = np.random.default_rng(seed + 1)  # not the draws of the bootstrap, which start at `seed`
    shape = (resamples, len(a.strata), a.sums.shape[1])
    moved = np.empty(shape)
    for s in range(len(a.strata)):
        difference = (b.sums - a.sums)[a.stratum == s]
        step = max(1, 8_000_000 // max(1, len(difference)))  # a chunk of swaps stays near 64 MB
        for start in range(0, resamples, step):
            swap = rng.integers(0, 2, size=(min(step, resamples - start), len(difference)), dtype=np.int8)
            moved[start : start + len(swap), s] = swap.astype(np.float64) @ difference
    return a.totals() + moved, b.totals() - moved


def _category_differences(
    a: Score, b: Score, items_a: Sequence[Item], items_b: Sequence[Item], confidence: float, resamples: int, seed: int
) -> dict[str, MetricDifference]:
    def summed(sums: Array, strata: Sequence[str]) -> dict[str, Array]:
        return a.rates(sums.sum(-2))

    rows: dict[str, MetricDifference] = {}
    for name in a.categories:
        own = [(x, y) for x, y in zip(items_a, items_b, strict=True) if name in a.category_of(x)]
        if own:
            both = ([x for x, _ in own], [y for _, y in own])
            # a fifth of the resamples: every category (MME has 14) takes another bootstrap and permutation test
            every = metric_differences(*both, summed, a.lower_is_better, confidence, max(1, resamples // 5), seed)
            rows[name] = next((m for m in every if m.difference is not None), every[0])
    tested = [name for name, m in rows.items() if m.p_value is not None]
    corrected = holm([rows[name].p_value or 0.0 for name in tested])
    for name, p_value in zip(tested, corrected, strict=True):
        rows[name] = MetricDifference(**{**asdict(rows[name]), "p_value": p_value})
    return rows


def _aligned(a: Score, b: Score, only_common: bool) -> tuple[list[Item], list[Item]]:
    by_id = {item.id: item for item in b.items}
    ids_a = {item.id for item in a.items}
    only_a, only_b = [i.id for i in a.items if i.id not in by_id], [i.id for i in b.items if i.id not in ids_a]
    if only_a or only_b:
        if not only_common:
            examples = ", ".join(repr(i) for i in (only_a + only_b)[:3])
            raise ValueError(
                f"A and B answer different questions: {len(only_a)} only in A, {len(only_b)} only in B (such as"
                f" {examples}). Expected the same questions; --only-common compares those that both have."
            )
        lacking = {(i.stratum, i.cluster or i.id) for i in a.items if i.id not in by_id} | {
            (i.stratum, i.cluster or i.id) for i in b.items if i.id not in ids_a
        }
        kept = [i for i in a.items if (i.stratum, i.cluster or i.id) not in lacking]
        if not kept:
            raise ValueError("A and B have no image in common.")
        return kept, [by_id[i.id] for i in kept]
    return list(a.items), [by_id[i.id] for i in a.items]


def _mcnemar(a: Sequence[Item], b: Sequence[Item]) -> float | None:
    judged = [
        (x.correct, y.correct) for x, y in zip(a, b, strict=True) if x.correct is not None and y.correct is not None
    ]
    return mcnemar_exact(sum(x and not y for x, y in judged), sum(y and not x for x, y in judged)) if judged else None


def _json_values(m: MetricDifference) -> dict[str, Any]:
    return {k: v for k, v in asdict(m).items() if k != "name"}


def _finite(x: float) -> float | None:
    return x if np.isfinite(x) else None
