"""A report as one self-contained HTML page: style, script, charts and images inside, nothing fetched."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from silkie.report.charts import interval_plot, line_chart
from silkie.report.names import metric_name
from silkie.report.pictures import PictureBook
from silkie.report.schema import Answer, BenchmarkRow, Card, Curve, Flip, Report, System

__all__ = ["page", "render"]

NEUTRAL = ("yes_rate", "objects_per_answer")
FLIP_NAMES: dict[Flip, str] = {
    "fixed": "Fixed",
    "broken": "Broken",
    "right": "Both right",
    "wrong": "Both wrong",
    "unjudged": "Not judged",
}


def render(report: Report) -> str:
    """The page. All texts are escaped; only this package's own markup is not."""
    book = PictureBook()
    cards = [_card(card, book) for card in mixed(report.gallery)]
    shown = Counter(card.flip for card in report.gallery)
    return page(
        "page.html.j2",
        report.title,
        report.summary,
        filters={"value": format_value, "number": format_number, "signed": signed},
        report=report,
        tiles=[
            tile
            for row in report.benchmarks
            if row.headline and len(row.systems) > 1
            if (tile := _tile(row, report.names[1]))["trained"] is not None
        ][:4],
        curves=[(curve, Markup(line_chart(curve)), list(curve.series)) for curve in report.curves if _goes_on(curve)],
        tables=_tables(report.benchmarks),
        cards=cards,
        only_changes=not any(system.low is not None for row in report.benchmarks for system in row.systems),
        paired=any(system.difference_low is not None for row in report.benchmarks for system in row.systems),
        categories=sorted({card["category"] for card in cards if card["category"]}),
        sets=sorted({card["benchmark"] for card in cards if card["benchmark"]}),
        flips=[(flip, name, shown[flip]) for flip, name in FLIP_NAMES.items() if shown[flip]],
        omitted=_omitted(report),
        pictures=book.uris,
    )


def page(template: str, title: str, summary: str, *, filters: dict[str, Any], **values: Any) -> str:
    """A template of this package as one page with its style and script inside. Texts are escaped, `Markup` is not."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("silkie.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= filters
    style, script = Markup(_resource("style.css")), Markup(_resource("script.js"))
    return environment.get_template(template).render(title=title, summary=summary, style=style, script=script, **values)


def _omitted(report: Report) -> str:
    """Where the gallery is a selection: of how many questions, and how many of those changed in which direction."""
    counts = report.gallery_counts or {}
    total = sum(counts.values())
    if total <= len(report.gallery):
        return ""
    every = ", ".join(f"{counts[flip]:,} {name.lower()}" for flip, name in FLIP_NAMES.items() if counts.get(flip))
    return (
        f"A selection of {len(report.gallery)} from {total:,} questions ({every}); the counts below are of the"
        " selection."
    )


def mixed(cards: Sequence[Card]) -> list[Card]:
    """Flipped questions first; within flips and the rest, benchmarks and categories take turns."""
    turns: Counter[tuple[bool, str, str]] = Counter()
    order = []
    for place, card in enumerate(cards):
        group = (card.flip not in ("fixed", "broken"), card.benchmark, card.category)
        order.append((group[0], turns[group], place))
        turns[group] += 1
    return [cards[place] for _, _, place in sorted(order)]


def format_number(value: float | None) -> str:
    """Shares with three places, large scores with one, nothing as a dash."""
    if value is None:
        return "–"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def signed(value: float | None) -> str:
    return "–" if value is None else ("+" if value > 0 else "−" if value < 0 else "") + format_number(abs(value))


def format_value(value: Any) -> str:
    """A configuration value as a person writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple | set):
        return ", ".join(map(format_value, value))
    return "–" if value is None else str(value)


def _goes_on(curve: Curve) -> bool:
    """Whether there is more than one step to show."""
    return len({step for points in curve.series.values() for step, _ in points}) > 1


def _tile(row: BenchmarkRow, shown: str) -> dict[str, Any]:
    """`shown`: the system that the report is about; a row without it shows the one after the base."""
    base = row.systems[0]
    trained = next((system for system in row.systems[1:] if system.name == shown), row.systems[1])
    difference = trained.difference
    if difference is None and base.value is not None and trained.value is not None:
        difference = trained.value - base.value
    return {
        "name": row.name,
        "of": [text for text in (metric_name(row.metric), trained.name if len(row.systems) > 2 else "") if text],
        "base": base.value,
        "trained": trained.value,
        "difference": difference,
        "low": trained.difference_low,
        "high": trained.difference_high,
        "caveats": _caveats([{"row": row}]),
        # coloured where the change is sure, or where nothing says how sure it is
        "kind": _direction(row, difference) if _sure(trained) or trained.difference_low is None else "same",
    }


def _direction(row: BenchmarkRow, difference: float | None) -> str:
    if not difference or row.neutral or row.metric in NEUTRAL:
        return "same"
    return "better" if (difference < 0) == row.lower_is_better else "worse"


def _tables(rows: Sequence[BenchmarkRow]) -> list[dict[str, Any]]:
    """Rows of the same benchmark (or group) under one heading."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        tables.setdefault(row.group or row.name, []).append(_row(row))
    return [
        {
            "name": name,
            "rows": own,
            "caveats": _caveats(own),
            "tested": any(s.p_value is not None for r in own for s in r["row"].systems),
            "questions": next((r["row"].questions for r in own if r["row"].questions), None),
        }
        for name, own in tables.items()
    ]


def _caveats(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the table's systems' scorers say; once, without a name, what all of them say."""
    said: dict[str, list[str]] = {}
    for system in (system for row in rows for system in row["row"].systems):
        for caveat in system.caveats:
            said.setdefault(caveat, []).append(system.name)
    systems = {system.name for row in rows for system in row["row"].systems}
    return [text if set(who) == systems else f"{', '.join(dict.fromkeys(who))}: {text}" for text, who in said.items()]


def _row(row: BenchmarkRow) -> dict[str, Any]:
    strips = [Markup(strip) for strip in interval_plot(row.systems)]
    values = [s.value for s in row.systems if s.value is not None]
    best = (
        (min(values) if row.lower_is_better else max(values))
        if values and not row.neutral and row.metric not in NEUTRAL
        else None
    )
    systems = [
        {
            "system": s,
            "strip": strip,
            "kind": _direction(row, s.difference) if _sure(s) or s.difference_low is None else "same",
            "sure": _sure(s),
            "best": s.value is not None and s.value == best,
            "number": i,
        }
        for i, (s, strip) in enumerate(zip(row.systems, strips, strict=True))
    ]
    return {
        "row": row,
        "systems": systems,
        "title": _row_title(row),
    }


def _row_title(row: BenchmarkRow) -> str:
    """Under a group's heading the row's own name, with its metric where there is one; under a benchmark's heading the
    metric."""
    metric = metric_name(row.metric)
    if not row.group:
        return metric or row.name
    name = row.name.split(": ", 1)[-1]
    return f"{name} ({metric})" if metric else name


def _sure(system: System) -> bool:
    """Whether the difference's interval leaves out zero."""
    return (
        system.difference_low is not None
        and system.difference_high is not None
        and (system.difference_low > 0 or system.difference_high < 0)
    )


def _card(card: Card, book: PictureBook) -> dict[str, Any]:
    return {
        "id": card.id,
        "prompt": card.prompt,
        "reference": card.reference,
        "category": card.category,
        "benchmark": card.benchmark,
        "flip": card.flip,
        "flip_name": FLIP_NAMES[card.flip],
        "picture": book.add(card.image) if card.image is not None else None,
        "answers": [_answer(card.base), _answer(card.trained)],
    }


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        "html": _marked(answer.answer, answer.invented),
        "correct": answer.correct,
        "ratings": answer.ratings,
        "note": answer.note,
        "invented": answer.invented,
    }


def _marked(text: str, phrases: Sequence[str]) -> Markup:
    """The text, escaped, with the invented phrases marked (singular and plural, whole words)."""
    if not text.strip():
        return Markup('<span class="empty">(no answer)</span>')
    if not phrases:
        return Markup(escape(text))
    pattern = re.compile(
        r"\b(?:"
        + "|".join(re.escape(escape(p)) + r"(?:e?s)?" for p in sorted(phrases, key=len, reverse=True))
        + r")\b",
        re.IGNORECASE,
    )
    return Markup(pattern.sub(lambda m: f"<mark>{m.group()}</mark>", escape(text)))


def _resource(name: str) -> str:
    return files("silkie.report").joinpath(name).read_text(encoding="utf-8")
