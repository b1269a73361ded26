"""How good is a judge? Agreement with a reference sample, position and length bias, rating distributions, averages per
model.

Pure functions over `Judged` items. Intervals are 95 % bootstrap intervals that resample whole items, since the ratings
of one item depend
on each other. Legend: K responses of an item, V votes.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from silkie.feedback.rubric import number_text
from silkie.stats import bootstrap_mean

Row = Mapping[str, float | None]
_EQUAL = 1e-9  # means of equal ratings may differ in the last bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One rated item, without its texts. ratings: [K]; orders: [V][K], the response shown at each position;
    vote_ratings: [V][K]."""

    id: str
    models: tuple[str, ...]
    lengths: tuple[int, ...]
    ratings: Sequence[Row]
    orders: Sequence[Sequence[int]]
    vote_ratings: Sequence[Sequence[Row]]
    spread: Sequence[Row] | None = None


def overall(row: Row) -> float | None:
    """Mean of the aspects, as VLFeedback's pairs use it; None where any of them is missing."""
    values = list(row.values())
    if not values or any(value is None for value in values):
        return None
    return math.fsum(value for value in values if value is not None) / len(values)


def mean_interval(values: Sequence[float], clusters: Sequence[str]) -> dict[str, Any] | None:
    """Mean with its interval, as plain numbers; None without values. Many items need few resamples: their interval is
    narrow anyway."""
    if not values:
        return None
    resamples = max(200, min(2000, 2_000_000 // len(set(clusters))))
    mean, low, high = bootstrap_mean(values, clusters=clusters, resamples=resamples)
    return {"mean": mean, "low": low, "high": high, "n": len(values)}


def distributions(items: Iterable[Judged]) -> dict[str, dict[str, float]]:
    """Per aspect the share of every rating that was given, lowest first, and of "N/A". Every vote counts: means are not
    on the scale."""
    counts: dict[str, Counter[float | None]] = defaultdict(Counter)
    for item in items:
        for row in (row for rows in item.vote_ratings for row in rows):
            for aspect, value in row.items():
                counts[aspect][value] += 1
    return {
        aspect: {
            "N/A" if value is None else number_text(value): counter[value] / counter.total()
            for value in sorted(counter, key=_scale)
        }
        for aspect, counter in counts.items()
    }


def _scale(value: float | None) -> float:
    """Sorts ratings, "N/A" last."""
    return math.inf if value is None else value


def per_model(items: Sequence[Judged]) -> dict[str, dict[str, Any]]:
    """Per model: the mean of every aspect, and its win rate against other models within an item (a tie counts half)."""
    ratings: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    wins: dict[str, list[float]] = defaultdict(list)
    owners: dict[str, list[str]] = defaultdict(list)
    for item in items:
        for model, row in zip(item.models, item.ratings, strict=True):
            for aspect, value in row.items():
                if value is not None:
                    ratings[model][aspect].append(value)
        for i, j, first, second in _comparisons(item.ratings):
            if item.models[i] == item.models[j]:
                continue  # two temperatures of one model: it wins as often as it loses
            won = _outcome(first, second)
            for index, value in ((i, won), (j, 1 - won)):
                wins[item.models[index]].append(value)
                owners[item.models[index]].append(item.id)
    return {
        model: {
            "responses": max(len(values) for values in ratings[model].values()),
            "means": {aspect: math.fsum(values) / len(values) for aspect, values in ratings[model].items()},
            "win_rate": mean_interval(wins[model], owners[model]),
        }
        for model in sorted(ratings)
    }


def position_bias(items: Sequence[Judged]) -> dict[str, Any]:
    """By position shown: the mean of (rating - mean rating of that vote). Orders are random, so every entry is 0 for a
    fair judge.

    "first_minus_last" is the gap between the first and the last position within a vote.
    """
    values: dict[int, list[float]] = defaultdict(list)
    owners: dict[int, list[str]] = defaultdict(list)
    gaps: list[float] = []
    gap_owners: list[str] = []
    for item in items:
        for order, rows in zip(item.orders, item.vote_ratings, strict=True):
            scores = [overall(rows[response]) for response in order]
            known = [score for score in scores if score is not None]
            if len(known) < len(scores) or len(scores) < 2:
                continue
            mean = math.fsum(known) / len(known)
            for position, score in enumerate(known):
                values[position].append(score - mean)
                owners[position].append(item.id)
            gaps.append(known[0] - known[-1])
            gap_owners.append(item.id)
    return {
        "by_position": {
            str(position + 1): mean_interval(values[position], owners[position]) for position in sorted(values)
        },
        "first_minus_last": mean_interval(gaps, gap_owners),
    }


def length_bias(items: Sequence[Judged]) -> dict[str, Any]:
    """Of the comparisons with a winner and unequal lengths, the share in which the longer response wins (0.5: length
    plays no part, or does not show), and the share of ties."""
    longer: list[float] = []
    owners: list[str] = []
    ties = total = 0
    for item in items:
        for i, j, first, second in _comparisons(item.ratings):
            total += 1
            won = _outcome(first, second)
            ties += won == 0.5
            if won != 0.5 and item.lengths[i] != item.lengths[j]:
                longer.append(float((item.lengths[i] > item.lengths[j]) == (won == 1)))
                owners.append(item.id)
    return {"longer_wins": mean_interval(longer, owners), "tie_share": ties / total if total else None}


def judge_agreement(items: Sequence[Judged], reference: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """The judge against a reference (people or an oracle) on the items that both have rated.

    Per aspect of the reference and "overall" (the mean of those aspects, on both sides): "pairwise", the share of the
    reference's comparisons with a winner that the judge decides the same way (a tie of the judge counts half, so a
    judge that knows nothing is at 0.5); "within_one", the share of ratings at most 1 apart; "bias", judge minus
    reference. Raises ValueError where an item has another number of responses in the reference.
    """
    shared = [item for item in items if item.id in reference]
    aspects: dict[str, None] = {}
    for item in shared:
        if len(reference[item.id]) != len(item.ratings):
            raise ValueError(
                f"reference, item {item.id!r}: found {len(reference[item.id])} ratings; expected {len(item.ratings)}"
            )
        aspects |= {aspect: None for row in reference[item.id] for aspect in row if aspect in item.ratings[0]}
    result: dict[str, Any] = {"items": len(shared)}
    for name in (*aspects, "overall"):
        pairwise: list[float] = []
        pair_owners: list[str] = []
        near: list[float] = []
        gaps: list[float] = []
        owners: list[str] = []
        for item in shared:
            judge = [_value(row, name, aspects) for row in item.ratings]
            truth = [_value(row, name, aspects) for row in reference[item.id]]
            both = [(x, y) for x, y in zip(judge, truth, strict=True) if x is not None and y is not None]
            near += [float(abs(x - y) <= 1 + _EQUAL) for x, y in both]
            gaps += [x - y for x, y in both]
            owners += [item.id] * len(both)
            for (x, y), (u, v) in combinations(both, 2):
                if (winner := _outcome(y, v)) != 0.5:
                    pairwise.append(1 - abs(_outcome(x, u) - winner))
                    pair_owners.append(item.id)
        result[name] = {
            "pairwise": mean_interval(pairwise, pair_owners),
            "within_one": mean_interval(near, owners),
            "bias": mean_interval(gaps, owners),
        }
    return result


def vote_spread(items: Sequence[Judged]) -> dict[str, float] | None:
    """Per aspect the mean standard deviation over the votes; None where items have one vote each."""
    values: dict[str, list[float]] = defaultdict(list)
    for item in items:
        for row in item.spread or ():
            for aspect, value in row.items():
                if value is not None:
                    values[aspect].append(value)
    return {aspect: math.fsum(found) / len(found) for aspect, found in values.items()} or None


def quality_report(items: Sequence[Judged], reference: Mapping[str, Sequence[Row]] | None = None) -> dict[str, Any]:
    """Everything above in one JSON-ready mapping."""
    return {
        "items": len(items),
        "responses": sum(len(item.ratings) for item in items),
        "distributions": distributions(items),
        "models": per_model(items),
        "position_bias": position_bias(items),
        "length_bias": length_bias(items),
        "vote_spread": vote_spread(items),
        "agreement": judge_agreement(items, reference) if reference is not None else None,
    }


def quality_markdown(report: Mapping[str, Any]) -> str:
    """The report as a page of Markdown tables."""
    lines = [
        "# Quality of the ratings",
        "",
        f"{report['items']:,} items, {report['responses']:,} responses.",
        "",
        "## Rating distribution",
        "",
    ]
    given = {key for shares in report["distributions"].values() for key in shares}
    keys = sorted(given, key=lambda key: _scale(None if key == "N/A" else float(key)))
    lines += [f"| aspect | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
    for aspect, shares in report["distributions"].items():
        lines.append(f"| {aspect} | " + " | ".join(f"{100 * shares.get(key, 0):.1f} %" for key in keys) + " |")
    aspects = list(report["distributions"])
    lines += [
        "",
        "## Models",
        "",
        f"| model | responses | {' | '.join(aspects)} | win rate |",
        "|---" * (len(aspects) + 3) + "|",
    ]
    for model, row in report["models"].items():
        means = " | ".join(f"{row['means'][aspect]:.2f}" if aspect in row["means"] else "-" for aspect in aspects)
        lines.append(f"| {model} | {row['responses']:,} | {means} | {_shown(row['win_rate'], percent=True)} |")
    lines += ["", "## Biases of the judge", ""]
    lines.append(
        f"- first minus last position: {_shown(report['position_bias']['first_minus_last'])} (0 for a judge without"
        " position bias)"
    )
    lines += [
        f"- position {p}: {_shown(value)} against the mean"
        for p, value in report["position_bias"]["by_position"].items()
    ]
    lines.append(
        f"- the longer response wins: {_shown(report['length_bias']['longer_wins'], percent=True)} of decided"
        " comparisons"
    )
    if report["length_bias"]["tie_share"] is not None:
        lines.append(f"- ties: {100 * report['length_bias']['tie_share']:.1f} % of comparisons")
    if report["vote_spread"]:
        spreads = ", ".join(f"{aspect} {value:.2f}" for aspect, value in report["vote_spread"].items())
        lines.append(f"- mean standard deviation over the votes: {spreads}")
    if report["agreement"] is not None:
        found = report["agreement"]
        lines += ["", f"## Agreement with the reference ({found['items']:,} items)", ""]
        lines += ["| aspect | same winner | within 1 | judge minus reference |", "|---|---|---|---|"]
        for name, row in found.items():
            if name != "items":
                cells = [
                    _shown(row["pairwise"], percent=True),
                    _shown(row["within_one"], percent=True),
                    _shown(row["bias"]),
                ]
                lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _shown(value: Mapping[str, Any] | None, *, percent: bool = False) -> str:
    if value is None:
        return "-"
    if percent:
        return f"{100 * value['mean']:.1f} % [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"
    return f"{value['mean']:+.2f} [{value['low']:+.2f}, {value['high']:+.2f}]"


def _value(row: Row, name: str, aspects: Iterable[str]) -> float | None:
    return overall({aspect: row.get(aspect) for aspect in aspects}) if name == "overall" else row.get(name)


def _comparisons(ratings: Sequence[Row]) -> Iterable[tuple[int, int, float, float]]:
    scores = [overall(row) for row in ratings]
    for (i, first), (j, second) in combinations(enumerate(scores), 2):
        if first is not None and second is not None:
            yield i, j, first, second


def _outcome(first: float, second: float) -> float:
    """1 where the first wins, 0 where the second does, 0.5 for a tie."""
    return 0.5 if abs(first - second) < _EQUAL else float(first > second)
