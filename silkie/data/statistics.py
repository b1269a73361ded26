"""Figures of a preference dataset: one pass over the groups, counters only, so memory does not grow with the rows.

Legend: K responses of a group, P pairs.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from silkie.data.judge_checks import judge_flags
from silkie.data.schema import prompt_text

PairCount = dict[str, Counter[str]]
Length = Callable[[str], int]
RATING_VALUES = 21  # different ratings that get a column each: 0 to 10 in halves
RATING_BINS = 10  # of ratings with more values


def count_words(text: str) -> int:
    """Length of a text in words, the measure that needs no tokenizer."""
    return len(text.split())


@dataclass(slots=True)
class Moments:
    """Running sums for a correlation."""

    n: int = 0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        self.n += 1
        self.x, self.y = self.x + x, self.y + y
        self.xx, self.yy, self.xy = self.xx + x * x, self.yy + y * y, self.xy + x * y

    def correlation(self) -> float | None:
        """Pearson's r; None where one side does not vary."""
        if self.n < 2:
            return None
        var_x, var_y = self.xx - self.x**2 / self.n, self.yy - self.y**2 / self.n
        if var_x <= 1e-12 or var_y <= 1e-12:
            return None
        return (self.xy - self.x * self.y / self.n) / math.sqrt(var_x * var_y)


@dataclass(slots=True)
class ModelFigures:
    """What one source model wrote, and how it fared."""

    responses: int = 0
    length: int = 0
    wins: int = 0
    losses: int = 0
    wins_longer: int = 0  # won pairs in which it was the longer one
    rating_sum: float = 0.0
    rated: int = 0


@dataclass(slots=True)
class Statistics:
    """Counters over groups; `add` takes one group, `figures` gives the results.

    Args:
        length: text -> length, in words or in tokens of a tokenizer.
        unit: name of that measure.
    """

    length: Length = count_words
    unit: str = "words"
    groups: int = 0
    images: int = 0
    pairs: int = 0
    group_sizes: Counter[int] = field(default_factory=Counter)
    pairs_per_group: Counter[int] = field(default_factory=Counter)
    prompt_lengths: Counter[int] = field(default_factory=Counter)
    response_lengths: Counter[int] = field(default_factory=Counter)
    ratings: dict[str, Counter[float]] = field(default_factory=lambda: defaultdict(Counter))
    missing_ratings: Counter[str] = field(default_factory=Counter)
    agreement: PairCount = field(default_factory=lambda: defaultdict(Counter))
    correlations: dict[str, Moments] = field(default_factory=lambda: defaultdict(Moments))
    decided: PairCount = field(default_factory=lambda: defaultdict(Counter))
    conflicts: int = 0
    rated_pairs: int = 0
    chosen_length: Counter[str] = field(default_factory=Counter)
    length_rating: Moments = field(default_factory=Moments)
    models: dict[str, ModelFigures] = field(default_factory=lambda: defaultdict(ModelFigures))
    flags: Counter[str] = field(default_factory=Counter)

    def add(self, group: Mapping[str, Any]) -> None:
        """Count one stored group."""
        responses, pairs = group["responses"], group["pairs"] or []
        lengths = [self.length(response) for response in responses]
        self.groups += 1
        self.images += count_image_parts(group)
        self.pairs += len(pairs)
        self.group_sizes[len(responses)] += 1
        self.pairs_per_group[len(pairs)] += 1
        self.prompt_lengths[self.length(prompt_text(group["prompt"]))] += 1
        self.response_lengths.update(lengths)
        self.flags.update(judge_flags(group))
        ratings = group.get("ratings")
        if ratings:
            self._add_ratings(ratings, lengths)
            self._add_pair_ratings(pairs, ratings)
        self._add_lengths(pairs, lengths)
        if group.get("models"):
            self._add_models(group["models"], pairs, lengths, ratings)

    def _add_ratings(self, ratings: list[Mapping[str, float | None]], lengths: list[int]) -> None:
        for rating, length in zip(ratings, lengths, strict=True):
            for aspect, value in rating.items():
                if value is None:
                    self.missing_ratings[aspect] += 1
                else:
                    self.ratings[aspect][value] += 1
            if (mean := mean_or_none(rating)) is not None:
                self.length_rating.add(length, mean)
            for first, second in itertools.combinations(rating, 2):
                if rating[first] is not None and rating[second] is not None:
                    self.correlations[f"{first} / {second}"].add(rating[first], rating[second])  # type: ignore[arg-type]
        for one, two in itertools.combinations(ratings, 2):
            signs = {aspect: sign(one[aspect], two[aspect]) for aspect in one}
            for first, second in itertools.combinations(one, 2):
                if signs[first] is not None and signs[second] is not None:
                    self.agreement[f"{first} / {second}"][relation(signs[first], signs[second])] += 1  # type: ignore[arg-type]

    def _add_pair_ratings(self, pairs: list[list[int]], ratings: list[Mapping[str, float | None]]) -> None:
        for chosen, rejected in pairs:
            signs = {aspect: sign(ratings[chosen][aspect], ratings[rejected][aspect]) for aspect in ratings[chosen]}
            if any(value is None for value in signs.values()):
                continue
            self.rated_pairs += 1
            self.conflicts += 1 in signs.values() and -1 in signs.values()
            alone = sum(value != 0 for value in signs.values()) == 1
            for aspect, value in signs.items():
                self.decided[aspect][{1: "for", 0: "tie", -1: "against"}[value]] += 1  # type: ignore[index]
                self.decided[aspect]["alone"] += alone and value == 1

    def _add_lengths(self, pairs: list[list[int]], lengths: list[int]) -> None:
        for chosen, rejected in pairs:
            difference = lengths[chosen] - lengths[rejected]
            self.chosen_length["longer" if difference > 0 else "shorter" if difference < 0 else "equal"] += 1

    def _add_models(self, models: list[str | None], pairs: list[list[int]], lengths: list[int], ratings: Any) -> None:
        for index, model in enumerate(models):
            figures = self.models[model or "(unnamed)"]
            figures.responses += 1
            figures.length += lengths[index]
            if ratings and (mean := mean_or_none(ratings[index])) is not None:
                figures.rating_sum += mean
                figures.rated += 1
        for chosen, rejected in pairs:
            winner = self.models[models[chosen] or "(unnamed)"]
            winner.wins += 1
            winner.wins_longer += lengths[chosen] > lengths[rejected]
            self.models[models[rejected] or "(unnamed)"].losses += 1

    def figures(self) -> dict[str, Any]:
        """All results as plain JSON values; shares are fractions of 1."""
        step = rating_step({value for counts in self.ratings.values() for value in counts})
        return {
            "groups": self.groups,
            "responses": self.response_lengths.total(),
            "pairs": self.pairs,
            "images": self.images,
            "responses_per_group": as_json(self.group_sizes),
            "pairs_per_group": as_json(self.pairs_per_group),
            "length_unit": self.unit,
            "prompt_length": summary(self.prompt_lengths),
            "response_length": summary(self.response_lengths),
            "ratings": {
                aspect: rating_figures(self.ratings[aspect], self.missing_ratings[aspect], step)
                for aspect in self._aspects()
            },
            "rating_step": step,
            "agreement": {name: self._agreement_figures(name) for name in self.agreement},
            "preference_diversity": self._diversity_figures(),
            "length_bias": {
                **{
                    f"chosen_{name}": share(self.chosen_length[name], self.pairs)
                    for name in ("longer", "shorter", "equal")
                },
                "rating_length_correlation": self.length_rating.correlation(),
            },
            "models": {
                name: model_figures(self.models[name])
                for name in sorted(self.models, key=lambda name: -win_rate(self.models[name]))
            },
            "judge_flags": dict(self.flags.most_common()),
        }

    def _aspects(self) -> list[str]:
        return list(dict.fromkeys([*self.ratings, *self.missing_ratings]))

    def _agreement_figures(self, name: str) -> dict[str, Any]:
        counts = self.agreement[name]
        return {
            "same_order": share(counts["same"], counts["same"] + counts["opposite"]),
            "opposite_order": share(counts["opposite"], counts["same"] + counts["opposite"]),
            "a_tie_in_one": share(counts["tie"], counts.total()),
            "correlation": self.correlations[name].correlation(),
            "response_pairs": counts.total(),
        }

    def _diversity_figures(self) -> dict[str, Any]:
        return {
            "rated_pairs": self.rated_pairs,
            "aspects_conflict": share(self.conflicts, self.rated_pairs),
            "aspects": {
                aspect: {name: share(counts[name], self.rated_pairs) for name in ("for", "tie", "against", "alone")}
                for aspect, counts in self.decided.items()
            },
        }


def count_image_parts(group: Mapping[str, Any]) -> int:
    """Images of a group, counted in its prompt, so that the image column need not be read."""
    return sum(part["type"] == "image" for turn in group["prompt"] for part in turn["content"])


def mean_or_none(rating: Mapping[str, float | None]) -> float | None:
    values = list(rating.values())
    return None if not values or any(value is None for value in values) else math.fsum(values) / len(values)  # type: ignore[arg-type]


def sign(first: float | None, second: float | None) -> int | None:
    """1, 0 or -1 as `first` is above, equal to or below `second`; None where one is missing."""
    return None if first is None or second is None else (first > second) - (first < second)


def relation(first: int, second: int) -> str:
    """How two aspects order two responses: "same", "opposite", or "tie" where one of them does not order them."""
    return "tie" if first == 0 or second == 0 else "same" if first == second else "opposite"


def share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def rating_step(values: set[float]) -> float | None:
    """1, 2 or 5 times a power of ten, in which the ratings are counted where they have too many different values for a
    table."""
    if len(values) <= RATING_VALUES:
        return None
    span = max(values) - min(values)
    power = 10.0 ** math.floor(math.log10(span / RATING_BINS))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / RATING_BINS)


def rating_figures(counts: Counter[float], missing: int, step: float | None) -> dict[str, Any]:
    """Mean and shares of one aspect's ratings; with a step, the share of a value is that of all ratings nearest to
    it."""
    total, binned = counts.total(), Counter[float]()
    for value, count in counts.items():
        binned[value if step is None else round(value / step) * step] += count
    return {
        "mean": sum(value * count for value, count in counts.items()) / total if total else None,
        "rated": total,
        "not_a_number": missing,
        "share": {f"{value:g}": binned[value] / total for value in sorted(binned)},
    }


def win_rate(figures: ModelFigures) -> float:
    """Share of a model's pairs that it wins; -1 for a model without pairs, so that it sorts last."""
    return figures.wins / (figures.wins + figures.losses) if figures.wins + figures.losses else -1.0


def model_figures(figures: ModelFigures) -> dict[str, Any]:
    return {
        "responses": figures.responses,
        "win_rate": share(figures.wins, figures.wins + figures.losses),
        "pairs": figures.wins + figures.losses,
        "mean_rating": figures.rating_sum / figures.rated if figures.rated else None,
        "mean_length": figures.length / figures.responses if figures.responses else None,
        "longer_when_chosen": share(figures.wins_longer, figures.wins),
    }


def summary(counts: Counter[int]) -> dict[str, Any]:
    """Mean, quantiles and a histogram with bins that double."""
    total = counts.total()
    if not total:
        return {"mean": None, "min": None, "p50": None, "p95": None, "max": None, "histogram": {}}
    return {
        "mean": sum(value * count for value, count in counts.items()) / total,
        "min": min(counts),
        "p50": quantile(counts, 0.5),
        "p95": quantile(counts, 0.95),
        "max": max(counts),
        "histogram": histogram(counts),
    }


def quantile(counts: Counter[int], q: float) -> int:
    """The smallest value that at least the share `q` of all values does not exceed."""
    needed, seen = q * counts.total(), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= needed:
            return value
    raise ValueError("no values")


def histogram(counts: Counter[int]) -> dict[str, int]:
    """Counts in the bins 0, 1, 2-3, 4-7, 8-15, ...; without the empty ends."""
    bins: Counter[int] = Counter()
    for value, count in counts.items():
        bins[value.bit_length()] += count
    return {bin_label(index): bins[index] for index in range(min(bins), max(bins) + 1)}


def bin_label(index: int) -> str:
    low, high = (1 << index) >> 1, (1 << index) - 1
    return str(low) if low == high else f"{low}-{high}"


def as_json(counts: Counter[int]) -> dict[str, int]:
    return {str(value): counts[value] for value in sorted(counts)}
