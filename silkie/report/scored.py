"""What answers were worth -> rows of the report's table and cards of its gallery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from silkie.evaluation import get_benchmark
from silkie.evaluation.compare import MetricDifference, compare_scores
from silkie.evaluation.intervals import metric_intervals
from silkie.evaluation.run import read_meta
from silkie.evaluation.scoring import Item, Score
from silkie.report.schema import Answer, BenchmarkRow, Card, Evaluation, System

__all__ = ["caveats", "comparison_row", "flip_cards", "score_evaluation"]


def score_evaluation(root: Path, described: Evaluation) -> tuple[list[BenchmarkRow], list[Card], list[str]]:
    """Score the results files of one evaluation and compare every system with the first: rows, cards, notes."""
    compared, benchmark = described.compared, get_benchmark(described.benchmark)
    files = {name: root / file for name, file in described.systems.items()}
    annotations = root / described.annotations if described.annotations else None
    scores = {name: benchmark.score_results(file, annotations) for name, file in files.items()}
    base_name, base = next(iter(scores.items()))
    intervals = {name: metric_intervals(score) for name, score in scores.items()}
    differences = {
        name: {m.name: m for m in compare_scores(base, score).metrics}
        for name, score in scores.items()
        if name != base_name
    }
    title = described.name or benchmark.title
    rows = [
        BenchmarkRow(
            name=title,
            metric=metric,
            lower_is_better=metric in base.lower_is_better,
            systems=tuple(
                _system(name, score, metric, intervals[name], differences.get(name, {}).get(metric))
                for name, score in scores.items()
            ),
            headline=metric == base.primary,
            questions=len(base.items) if metric == base.primary else None,
        )
        for metric in base.metrics
        if metric not in ("unreadable", "ungraded")
    ]
    if not described.gallery or compared is None:
        return rows, [], []
    images = root / described.images if described.images else Path(read_meta(files[base_name]).get("data", root))
    other = {item.id: item for item in scores[compared[1]].items}
    return rows, *flip_cards([(item, other[item.id]) for item in base.items if item.id in other], images, title)


def _system(
    name: str,
    score: Score,
    metric: str,
    intervals: Mapping[str, tuple[float, float]],
    difference: MetricDifference | None,
) -> System:
    low, high = intervals.get(metric, (None, None))
    changed = (
        {}
        if difference is None
        else {"difference": difference.difference, "difference_low": difference.low, "difference_high": difference.high}
    )
    return System(
        name=name,
        value=score.metrics.get(metric),
        low=low,
        high=high,
        **changed,
        p_value=difference.p_value if difference else None,
        caveats=caveats(score) if metric == score.primary else (),
    )


def caveats(score: Score) -> tuple[str, ...]:
    """What the scorer says about its numbers, and answers that it could not read or grade."""
    counts = ((name, score.metrics.get(name)) for name in ("unreadable", "ungraded"))
    unread = (f"{_share(number)} of {len(score.items)} answers {name}." for name, number in counts if number)
    return (*unread, *score.warnings)


def _share(number: float) -> str:
    return f"{number}" if isinstance(number, int) else f"{100 * number:.1f} %"


def comparison_row(
    m: MetricDifference,
    name: str,
    names: tuple[str, str],
    questions: int | None,
    headline: bool = False,
    said: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> BenchmarkRow:
    lower = bool(m.difference and m.better is not None and (m.difference < 0) == m.better)
    b = System(
        name=names[1],
        value=m.b,
        difference=m.difference,
        difference_low=m.low,
        difference_high=m.high,
        p_value=m.p_value,
        caveats=tuple(said[1]),
    )
    return BenchmarkRow(
        name=name,
        metric=m.name,
        lower_is_better=lower,
        systems=(System(name=names[0], value=m.a, caveats=tuple(said[0])), b),
        headline=headline,
        questions=questions,
    )


def flip_cards(pairs: Sequence[tuple[Item, Item]], images: Path, benchmark: str) -> tuple[list[Card], list[str]]:
    """A card per question, and a note where images that the results name are not found."""
    cards = [_card(a, b, images, benchmark) for a, b in pairs]
    lost = [
        a.image or b.image
        for (a, b), card in zip(pairs, cards, strict=True)
        if (a.image or b.image) and card.image is None
    ]
    notes = (
        [
            f"{benchmark}: the images of {len(lost)} of {len(cards)} questions were not found in {images} (first:"
            f" {lost[0]})."
        ]
        if lost
        else []
    )
    return cards, notes


def _card(a: Item, b: Item, images: Path, benchmark: str) -> Card:
    def answer(item: Item) -> Answer:
        return Answer(
            answer=item.answer,
            correct=item.correct,
            ratings=_rating(item),
            invented=item.invented,
            note=item.note,
        )

    shown = a.image or b.image
    # MME's result files name an image without its subtask's folder
    places = (images, images / a.category, images / a.category / "images", Path())
    image = next((place / shown for place in places if shown and (place / shown).is_file()), None)
    return Card(
        id=a.id,
        prompt=a.prompt or b.prompt,
        base=answer(a),
        trained=answer(b),
        image=image,
        category=a.category,
        benchmark=benchmark,
        reference=a.label or "",
    )


def _rating(item: Item) -> dict[str, float]:
    """The judge's rating, where that is what was read (otherwise it is yes, no, refuse ...)."""
    try:
        return {"rating": float(item.read or "")}
    except ValueError:
        return {}
