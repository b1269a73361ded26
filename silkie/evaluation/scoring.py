"""The score of a results file, and the sums it is made of.

Every official number here is a function of SUMS over questions (right answers, image pairs right, true positives,
rating points ...). So a benchmark says what each question adds (`Item.counts`), and how sums become metrics (`rates`);
the point estimate, a category's row and every bootstrap resample then come from the same formula.

Legend: N questions, U clusters (images), S strata (subtasks scored apart), C counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Item", "Score", "Table", "build_score", "confusion_counts", "confusion_rates", "ratio"]

Array = NDArray[np.float64]
Rates = Callable[[Array], dict[str, Array]]
"""sums [..., C] -> metric name -> [...]"""
Totals = Callable[[Array, Sequence[str]], dict[str, Array]]
"""sums [..., S, C], names of the S strata -> metric name -> [...]"""


@dataclass(slots=True, kw_only=True)
class Item:
    """One scored question. `value` is what a paired comparison compares (0/1, a rating, a share); `counts` are its
    additions to the sums; `invented` the objects that a description names and the image does not hold."""

    id: str
    answer: str
    counts: tuple[float, ...]
    value: float | None = None
    correct: bool | None = None
    category: str = ""
    stratum: str = ""
    cluster: str = ""
    image: str = ""
    prompt: str = ""
    label: str | None = None
    read: str | None = None
    invented: tuple[str, ...] = ()
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            k: v
            for k, v in asdict(self).items()
            if v not in (None, "", ()) and k not in ("counts", "cluster", "stratum")
        }


@dataclass(slots=True, kw_only=True)
class Score:
    """What `score` gives. `metrics` is ordered, the headline first; None marks a rate whose denominator is empty."""

    benchmark: str
    metrics: dict[str, float | None]
    categories: dict[str, dict[str, float | None]]
    items: list[Item]
    warnings: list[str] = field(default_factory=list)
    official: dict[str, float] = field(default_factory=dict)
    lower_is_better: frozenset[str] = frozenset()
    rates: Rates = field(repr=False)
    totals: Totals = field(repr=False)
    category_of: Callable[[Item], Sequence[str]] = field(repr=False)

    @property
    def primary(self) -> str:
        return next(iter(self.metrics))

    def table(self) -> Table:
        return Table.of(self.items)

    def to_dict(self, *, items: bool = False) -> dict[str, Any]:
        result: dict[str, Any] = {
            "benchmark": self.benchmark,
            "primary": self.primary,
            "questions": len(self.items),
            "metrics": self.metrics,
            "categories": self.categories,
        }
        if self.official:
            result["official"] = self.official
        if self.warnings:
            result["warnings"] = self.warnings
        if items:
            result["items"] = [item.to_dict() for item in self.items]
        return result


@dataclass(frozen=True, slots=True)
class Table:
    """Counts per cluster: `sums` [U, C], the stratum of each cluster [U], the strata's names. A cluster lies in one
    stratum."""

    sums: Array
    stratum: NDArray[np.int64]
    strata: tuple[str, ...]
    clusters: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, items: Sequence[Item], owners: Sequence[Item] | None = None) -> Table:
        """Sum the items' counts by cluster. `owners`: the same questions in another results file, whose clusters and
        strata are taken."""
        index: dict[tuple[str, str], int] = {}
        rows: list[Array] = []
        for item, owner in zip(items, owners or items, strict=True):
            # a question without a cluster (no image) is resampled on its own
            key = (owner.stratum, owner.cluster or owner.id)
            if key not in index:
                index[key] = len(rows)
                rows.append(np.zeros(len(item.counts)))
            rows[index[key]] += np.asarray(item.counts, dtype=np.float64)
        strata = tuple(dict.fromkeys(stratum for stratum, _ in index))
        position = {name: i for i, name in enumerate(strata)}
        return cls(np.array(rows), np.array([position[stratum] for stratum, _ in index]), strata, tuple(index))

    def totals(self) -> Array:
        """[S, C]"""
        return np.stack([self.sums[self.stratum == s].sum(0) for s in range(len(self.strata))])


def build_score(
    benchmark: str,
    items: list[Item],
    rates: Rates,
    *,
    totals: Totals | None = None,
    category_of: Callable[[Item], Sequence[str]] = lambda item: [item.category] if item.category else [],
    category_order: Sequence[str] = (),
    warnings: Sequence[str] = (),
    official: Mapping[str, float] | None = None,
    lower_is_better: Iterable[str] = (),
) -> Score:
    """Sum the items' counts and turn the sums into metrics, in all and per category.

    Args:
        rates: sums [..., C] -> metrics.
        totals: sums [..., S, C] -> metrics, where strata are not simply added up (MME). Default: `rates` of the sum
            over strata.
        category_of: the categories of an item (MM-Vet's questions have several).

    Raises:
        ValueError: no items.
    """
    if not items:
        raise ValueError(f"{benchmark}: no answered questions to score.")
    combine: Totals = totals or (lambda sums, strata: rates(sums.sum(-2)))
    table = Table.of(items)
    groups: dict[str, list[Array]] = {name: [] for name in category_order}
    for item in items:
        for name in category_of(item):
            groups.setdefault(name, []).append(np.asarray(item.counts, dtype=np.float64))
    return Score(
        benchmark=benchmark,
        metrics=_nan_as_none(combine(table.totals(), table.strata)),
        categories={
            name: {"questions": len(rows), **_nan_as_none(rates(np.sum(rows, axis=0)))}
            for name, rows in groups.items()
            if rows
        },
        items=items,
        warnings=list(warnings),
        official=dict(official or {}),
        lower_is_better=frozenset(lower_is_better),
        rates=rates,
        totals=combine,
        category_of=category_of,
    )


def ratio(numerator: Array, denominator: Array) -> Array:
    """Elementwise quotient, NaN (not zero) where the denominator is empty: "nothing to measure" is not "all wrong"."""
    numerator, denominator = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    return np.divide(
        numerator, denominator, out=np.full(np.broadcast(numerator, denominator).shape, np.nan), where=denominator != 0
    )


def confusion_counts(read: str, label: str, *, positive: str) -> tuple[float, ...]:
    """(questions, right, true positives, predicted positives, labelled positives, read as "yes", unreadable)."""
    right = read == label
    return (
        1.0,
        float(right),
        float(right and label == positive),
        float(read == positive),
        float(label == positive),
        float(read == "yes"),
        float(read == "other"),
    )


def confusion_rates(sums: Array) -> dict[str, Array]:
    """Accuracy, precision, recall, F1, yes-rate from sums of `confusion_counts` [..., 7].

    F1 = 2 TP / (predicted positives + labelled positives), the same number as 2PR / (P + R) and defined also where P is
    not."""
    total, right, true_positive, predicted, labelled, yes, other = np.moveaxis(
        np.asarray(sums, dtype=np.float64), -1, 0
    )
    return {
        "accuracy": ratio(right, total),
        "precision": ratio(true_positive, predicted),
        "recall": ratio(true_positive, labelled),
        "f1": ratio(2 * true_positive, predicted + labelled),
        "yes_rate": ratio(yes, total),
        "unreadable": ratio(other, total),
    }


def _nan_as_none(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: None if math.isnan(float(value)) else float(value) for name, value in metrics.items()}
