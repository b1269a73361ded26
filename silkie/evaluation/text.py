"""Scores and comparisons as plain text tables."""

from __future__ import annotations

from collections.abc import Mapping

from silkie.evaluation.compare import Comparison, MetricDifference
from silkie.evaluation.scoring import Score
from silkie.io.table import table

__all__ = ["comparison_text", "score_text"]


def score_text(score: Score, intervals: Mapping[str, tuple[float, float]] | None = None) -> str:
    """The score with its categories; with `intervals`, the metrics' 95 % intervals."""
    head = [f"{score.benchmark}: {len(score.items)} questions"]
    bounds = intervals or {}
    head.append(
        table(
            [
                [name, metric_text(value), *([span(bounds[name])] if name in bounds else [])]
                for name, value in score.metrics.items()
            ]
        )
    )
    if score.categories:
        columns = list(dict.fromkeys(column for row in score.categories.values() for column in row))
        rows = [["category", *columns]] + [
            [name, *(metric_text(row.get(column)) for column in columns)] for name, row in score.categories.items()
        ]
        head.append(table(rows))
    if score.official:
        head.append(
            "as the official scorer prints it:\n"
            + table([[name, f"{value:.1f}"] for name, value in score.official.items()])
        )
    return "\n\n".join([*head, *(f"note: {warning}" for warning in score.warnings)])


def comparison_text(comparison: Comparison, shown_flips: int = 10, names: tuple[str, str] | None = None) -> str:
    """Metrics and categories with difference, interval and p-value, and the first flipped questions.

    Args:
        names: what A and B are; two lines say it.
    """
    header = ["", "A", "B", "B - A", "95 % interval", "p"]
    parts = [
        "\n".join(
            [
                f"{comparison.benchmark}: {comparison.questions} questions",
                *(f"{letter}: {name}" for letter, name in zip("AB", names or (), strict=False)),
            ]
        ),
        table([header, *map(_cells, comparison.metrics)]),
    ]
    if comparison.categories:
        rows = [[f"{name} ({m.name})", *_cells(m)[1:]] for name, m in comparison.categories.items()]
        parts.append(table([["category", "A", "B", "B - A", "95 % interval", "p (Holm)"], *rows]))
    p = "" if comparison.mcnemar_p is None else f" (McNemar exact p = {comparison.mcnemar_p:.2g})"
    parts.append(f"flips: {len(comparison.fixed)} wrong -> right, {len(comparison.broken)} right -> wrong{p}")
    for title, pairs in (("wrong -> right", comparison.fixed), ("right -> wrong", comparison.broken)):
        for a, b in pairs[:shown_flips]:
            parts.append(
                f"[{title}] {b.image or b.id}: {_short(b.prompt)}\n    A: {_short(a.answer)}\n    B: {_short(b.answer)}"
            )
        if len(pairs) > shown_flips:
            parts.append(f"... {len(pairs) - shown_flips} more {title}; --json lists all, --html shows them")
    said = (f"note: {letter}: {text}" for letter, own in zip("AB", comparison.warnings, strict=True) for text in own)
    return "\n\n".join([*parts, *said])


def metric_text(value: float | None) -> str:
    """Four decimals under 10, two from there on, a count as it is, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def span(interval: tuple[float, float]) -> str:
    return f"[{metric_text(interval[0])}, {metric_text(interval[1])}]"


def _cells(m: MetricDifference) -> list[str]:
    interval = "-" if m.low is None or m.high is None else span((m.low, m.high))
    p_value = "-" if m.p_value is None else "< 0.001" if m.p_value < 0.001 else f"{m.p_value:.3f}"
    sign = "" if m.difference is None or m.difference < 0 else "+"
    return [m.name, metric_text(m.a), metric_text(m.b), sign + metric_text(m.difference), interval, p_value]


def _short(text: str, length: int = 160) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= length else flat[: length - 3] + "..."
