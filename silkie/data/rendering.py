"""An inspection as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from silkie.data.inspect import Inspection
from silkie.io.table import table

BAR = 30  # characters of the longest bar


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


def to_text(inspection: Inspection) -> str:
    """The figures as sections of text for a terminal."""
    figures = inspection.figures
    sections = [
        inspection.report.summary(),
        _counts(figures),
        _lengths(figures),
        _images(figures["image_sizes"]),
        _ratings(figures),
        _agreement(figures),
        _diversity(figures),
        _models(figures),
        _length_bias(figures),
        _flags(figures),
        _problems(inspection),
    ]
    return "\n\n".join(section for section in sections if section)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    return table([head, *rows], indent="  ")


def bars(counts: Mapping[str, int]) -> str:
    """A histogram, one bin per line."""
    top, width = max(counts.values(), default=0), max(map(len, counts), default=0)
    digits = len(f"{top:,}")
    return "\n".join(
        f"  {label.ljust(width)}  {count:>{digits},}  {'#' * round(BAR * count / top)}".rstrip()
        for label, count in counts.items()
    )


def _counts(figures: dict[str, Any]) -> str:
    pairs = figures["pairs_per_group"]
    return _table(
        ("counts", ""),
        [
            ("groups", number(figures["groups"])),
            ("responses", number(figures["responses"])),
            ("pairs", number(figures["pairs"])),
            ("images", number(figures["images"])),
            ("groups without a pair", number(pairs.get("0", 0))),
            (
                "responses per group",
                ", ".join(f"{size}: {count:,}" for size, count in figures["responses_per_group"].items()),
            ),
            ("pairs per group", ", ".join(f"{size}: {count:,}" for size, count in pairs.items())),
        ],
    )


def _lengths(figures: dict[str, Any]) -> str:
    parts = []
    for name in ("prompt", "response"):
        values = figures[f"{name}_length"]
        title = (
            f"{name} length in {figures['length_unit']}: mean {number(values['mean'], 1)}, median"
            f" {number(values['p50'])}, "
        )
        parts.append(
            f"{title}95 % within {number(values['p95'])}, longest {number(values['max'])}\n{bars(values['histogram'])}"
        )
    return "\n".join(parts)


def _questions(per_image: dict[str, int]) -> str:
    """How many groups ask about the same images, and what share_prefix can make of it."""
    asked = {int(questions): images for questions, images in per_image.items()}
    groups, images = sum(n * count for n, count in asked.items()), sum(asked.values())
    if not groups:
        return ""
    found = f"questions per image: {groups / images:.2f} on average, at most {max(asked)} (equal images by their bytes)"
    if groups == images:
        return found
    return (
        f"{found}; with share_prefix='image' up to {groups - images:,} of {groups:,} prompts"
        f" ({(groups - images) / groups:.0%}) need not run their images again"
    )


def _images(sizes: dict[str, Any] | None) -> str:
    if not sizes or not (sizes["images"] or sizes["unreadable"]):
        return ""
    frequent = ", ".join(f"{size} ({count:,})" for size, count in sizes["most_frequent"].items())
    lines = [
        f"images: longer side in pixels; {sizes['different_sizes']:,} sizes, most frequent {frequent}",
        bars(sizes["longer_side"]),
        _questions(sizes["questions_per_image"]),
    ]
    if sizes["unreadable"]:
        lines += [
            f"unreadable images in {sizes['unreadable']:,} groups:",
            *(f"  {message}" for message in sizes["unreadable_examples"]),
        ]
    return "\n".join(lines)


def _ratings(figures: dict[str, Any]) -> str:
    ratings = figures["ratings"]
    values = sorted({value for aspect in ratings.values() for value in aspect["share"]}, key=float)
    if not values:
        return ""
    rows = [
        (
            aspect,
            *(percent(shares["share"].get(value, 0.0)) for value in values),
            number(shares["mean"]),
            number(shares["not_a_number"]),
        )
        for aspect, shares in ratings.items()
    ]
    step = figures["rating_step"]
    return _table(
        ("ratings" if step is None else f"ratings, in steps of {step:g}", *values, "mean", "not a number"), rows
    )


def _agreement(figures: dict[str, Any]) -> str:
    rows = [
        (name, percent(row["same_order"]), percent(row["a_tie_in_one"]), number(row["correlation"]))
        for name, row in figures["agreement"].items()
    ]
    return (
        _table(("aspects: do they order two responses alike?", "same order", "tie in one", "correlation"), rows)
        if rows
        else ""
    )


def _diversity(figures: dict[str, Any]) -> str:
    diversity = figures["preference_diversity"]
    if not diversity["rated_pairs"]:
        return ""
    rows = [
        (aspect, *(percent(row[name]) for name in ("for", "tie", "against", "alone")))
        for aspect, row in diversity["aspects"].items()
    ]
    text = _table(("pairs: does the aspect prefer the chosen one?", "yes", "tie", "no", "decides alone"), rows)
    conflicts = f"aspects contradict each other in {percent(diversity['aspects_conflict'])}"
    return f"{text}\n  {conflicts} of {number(diversity['rated_pairs'])} rated pairs"


def _models(figures: dict[str, Any]) -> str:
    rows = [
        (
            name,
            percent(row["win_rate"]),
            number(row["pairs"]),
            number(row["mean_rating"]),
            number(row["mean_length"], 1),
            percent(row["longer_when_chosen"]),
        )
        for name, row in figures["models"].items()
    ]
    return (
        _table(("source model", "wins", "pairs", "rating", figures["length_unit"], "longer when it wins"), rows)
        if rows
        else ""
    )


def _length_bias(figures: dict[str, Any]) -> str:
    bias = figures["length_bias"]
    longer, shorter = percent(bias["chosen_longer"]), percent(bias["chosen_shorter"])
    text = f"length bias: the chosen response is longer in {longer}, shorter in {shorter} of the pairs"
    correlation = bias["rating_length_correlation"]
    return text if correlation is None else f"{text}; correlation of rating and length {correlation:.2f}"


def _flags(figures: dict[str, Any]) -> str:
    flags = figures["judge_flags"]
    return (
        _table(("judge, look at these", "groups"), ((flag, number(count)) for flag, count in flags.items()))
        if flags
        else ""
    )


def _problems(inspection: Inspection) -> str:
    broken = [problem for problem in inspection.report.problems if problem.kind == "error"]
    if not broken:
        return ""
    more = f"\n  ... and {len(broken) - 10:,} more" if len(broken) > 10 else ""
    return "broken rows:\n" + "\n".join(f"  {problem.message}" for problem in broken[:10]) + more
