"""Figures of a preference dataset. One pass keeps a few numbers per response and pair; numpy and pandas do the rest.

Legend: G groups, R responses of all groups, P pairs of all groups, A rating aspects.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from silkie.data.judge_checks import judge_flags
from silkie.data.pairs import mean_ratings
from silkie.data.schema import prompt_text

Length = Callable[[str], int]
RATING_VALUES = 21  # different ratings that get a column each: 0 to 10 in halves
RATING_BINS = 10  # of ratings with more values
NO_MODEL = "(unnamed)"


def count_words(text: str) -> int:
    """Length of a text in words, the measure that needs no tokenizer."""
    return len(text.split())


@dataclass(slots=True)
class Statistics:
    """What the figures need of every group; `add` takes some groups, `figures` gives the results.

    100,000 groups of three responses, rated on three aspects, need about 65 MiB.

    Args:
        aspects: the rating aspects of the dataset.
        length: text -> length, in words or in tokens of a tokenizer.
        unit: name of that measure.
    """

    aspects: tuple[str, ...] = ()
    length: Length = count_words
    unit: str = "words"
    responses: int = 0
    flags: Counter[str] = field(default_factory=Counter)
    models: dict[str, int] = field(default_factory=dict)  # name -> number in the column "model"
    columns: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))

    def add(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Take in some stored groups (a batch, so that the Python lists stay short)."""
        sizes = [len(group["responses"]) for group in groups]
        self._keep("responses_per_group", sizes)
        self._keep("pairs_per_group", [len(group["pairs"] or []) for group in groups])
        self._keep("images_per_group", [count_image_parts(group) for group in groups])
        self._keep("prompt_length", [self.length(prompt_text(group["prompt"])) for group in groups])
        self._keep("response_length", [self.length(text) for group in groups for text in group["responses"]])
        self._keep("model", [number for group in groups for number in self._model_numbers(group)])
        starts = [self.responses + before for before in itertools.accumulate(sizes, initial=0)]
        self._keep_rows("pairs", 2, _pairs(groups, starts), np.int32)
        self._keep_rows("comparisons", 2, _comparisons(groups, starts), np.int32)
        per_group = [group.get("ratings") or [None] * len(group["responses"]) for group in groups]
        ratings = [rating for group in per_group for rating in group]
        self._keep("rated", [rating is not None for rating in ratings])
        self._keep("mean_rating", [mean for group in per_group for mean in mean_ratings(group)], np.float64)
        values = ((rating or {}).get(aspect) for rating in ratings for aspect in self.aspects)
        self._keep_rows("ratings", len(self.aspects), values, np.float64)
        self.flags.update(flag for group in groups for flag in judge_flags(group))
        self.responses = starts[-1]

    def _keep(self, name: str, values: list[Any], kind: Any = np.int32) -> None:
        self.columns[name].append(np.array(values, dtype=kind))

    def _keep_rows(self, name: str, width: int, values: Iterable[Any], kind: Any) -> None:
        self.columns[name].append(np.array(list(values), dtype=kind).reshape(-1, width) if width else np.empty((0, 0)))

    def _model_numbers(self, group: Mapping[str, Any]) -> list[int]:
        """A number per source model; -1 where the whole group names none."""
        if not group.get("models"):
            return [-1] * len(group["responses"])
        return [self.models.setdefault(model or NO_MODEL, len(self.models)) for model in group["models"]]

    def figures(self) -> dict[str, Any]:
        """All results as plain JSON values; shares are fractions of 1."""
        column = {name: np.concatenate(parts) for name, parts in self.columns.items()}
        lengths, pairs = column["response_length"], column["pairs"]
        longer = lengths[pairs[:, 0]] - lengths[pairs[:, 1]]  # [P] by how much the chosen response is longer
        ratings = _Ratings(self.aspects, column) if column["rated"].any() else None
        has_mean = ~np.isnan(column["mean_rating"])
        return {
            "groups": len(column["responses_per_group"]),
            "responses": len(lengths),
            "pairs": len(pairs),
            "images": int(column["images_per_group"].sum()),
            "responses_per_group": as_json(column["responses_per_group"]),
            "pairs_per_group": as_json(column["pairs_per_group"]),
            "length_unit": self.unit,
            "prompt_length": summary(column["prompt_length"]),
            "response_length": summary(lengths),
            "ratings": ratings.values() if ratings else {},
            "rating_step": ratings.step if ratings else None,
            "agreement": ratings.agreement() if ratings else {},
            "preference_diversity": ratings.diversity() if ratings else NO_DIVERSITY,
            "length_bias": {
                "chosen_longer": share(longer > 0),
                "chosen_shorter": share(longer < 0),
                "chosen_equal": share(longer == 0),
                "rating_length_correlation": correlation(lengths[has_mean], column["mean_rating"][has_mean]),
            },
            "models": self._model_figures(column, longer),
            "judge_flags": dict(self.flags.most_common()),
        }

    def _model_figures(self, column: Mapping[str, np.ndarray], longer: np.ndarray) -> dict[str, Any]:
        """Per source model what it wrote and how it fared, the most successful first."""
        numbers = column["model"]
        frame = pd.DataFrame({"length": column["response_length"], "rating": column["mean_rating"]})
        written = frame.groupby(numbers).agg(
            responses=("length", "size"), length=("length", "mean"), rating=("rating", "mean")
        )
        winner, loser = numbers[column["pairs"]].T if len(column["pairs"]) else np.empty((2, 0), dtype=np.int64)
        found = {}
        for name, number in self.models.items():
            won = winner == number
            pairs = int(won.sum() + (loser == number).sum())
            found[name] = {
                "responses": int(written.responses[number]),
                "win_rate": int(won.sum()) / pairs if pairs else None,
                "pairs": pairs,
                "mean_rating": number_or_none(written.rating[number]),
                "mean_length": float(written.length[number]),
                "longer_when_chosen": share(longer[won] > 0),
            }
        return dict(sorted(found.items(), key=lambda item: -win_rate(item[1])))


NO_DIVERSITY: dict[str, Any] = {"rated_pairs": 0, "aspects_conflict": None, "aspects": {}}


class _Ratings:
    """Figures of the ratings [R, A] (NaN: missing or not a number) of the rated groups."""

    def __init__(self, aspects: tuple[str, ...], column: Mapping[str, np.ndarray]) -> None:
        self.aspects, self.ratings = aspects, column["ratings"]
        self.rated = self.ratings[column["rated"].astype(bool)]
        self.order = self._order(column["comparisons"])  # of every two responses of a group
        decided = self._order(column["pairs"])
        self.decided = decided[~np.isnan(decided).any(axis=1)]  # of the pairs that have every rating
        self.step = rating_step(np.unique(self.rated[~np.isnan(self.rated)]))

    def _order(self, couples: np.ndarray) -> np.ndarray:
        """[n, A] per couple of responses 1, 0 or -1 where the first is rated above, like or below the second; NaN where
        a rating is missing."""
        return np.sign(self.ratings[couples[:, 0]] - self.ratings[couples[:, 1]]).astype(np.float32)

    def values(self) -> dict[str, Any]:
        return {aspect: rating_figures(self.rated[:, i], self.step) for i, aspect in enumerate(self.aspects)}

    def agreement(self) -> dict[str, Any]:
        """Per two aspects: do they order two responses alike?"""
        found = {}
        for i, j in itertools.combinations(range(len(self.aspects)), 2):
            known = ~np.isnan(self.order[:, i] + self.order[:, j])
            one, two = self.order[known, i], self.order[known, j]
            ties = (one == 0) | (two == 0)
            both = self.rated[~np.isnan(self.rated[:, i] + self.rated[:, j])]
            if len(one):
                found[f"{self.aspects[i]} / {self.aspects[j]}"] = {
                    "same_order": share((one == two)[~ties]),
                    "opposite_order": share((one != two)[~ties]),
                    "a_tie_in_one": share(ties),
                    "correlation": correlation(both[:, i], both[:, j]),
                    "response_pairs": len(one),
                }
        return found

    def diversity(self) -> dict[str, Any]:
        """Which aspects decide the pairs, and how often they contradict each other."""
        signs = self.decided
        alone = (signs != 0).sum(axis=1) == 1
        return {
            "rated_pairs": len(signs),
            "aspects_conflict": share((signs > 0).any(axis=1) & (signs < 0).any(axis=1)),
            "aspects": {
                aspect: {
                    "for": share(signs[:, i] > 0),
                    "tie": share(signs[:, i] == 0),
                    "against": share(signs[:, i] < 0),
                    "alone": share(alone & (signs[:, i] > 0)),
                }
                for i, aspect in enumerate(self.aspects)
                if len(signs)
            },
        }


def _pairs(groups: Sequence[Mapping[str, Any]], starts: Sequence[int]) -> Iterable[tuple[int, int]]:
    for group, start in zip(groups, starts, strict=False):
        yield from ((start + chosen, start + rejected) for chosen, rejected in group["pairs"] or [])


def _comparisons(groups: Sequence[Mapping[str, Any]], starts: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Every two responses of the rated groups."""
    for group, start in zip(groups, starts, strict=False):
        if group.get("ratings"):
            yield from itertools.combinations(range(start, start + len(group["responses"])), 2)


def count_image_parts(group: Mapping[str, Any]) -> int:
    """Images of a group, counted in its prompt, so that the image column need not be read."""
    return sum(part["type"] == "image" for turn in group["prompt"] for part in turn["content"])


def win_rate(model: Mapping[str, Any]) -> float:
    """-1 for a model without pairs, so that it sorts last."""
    return -1.0 if model["win_rate"] is None else model["win_rate"]


def number_or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def share(flags: np.ndarray) -> float | None:
    """The share that is true; None of nothing."""
    return int(flags.sum()) / len(flags) if len(flags) else None


def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's r; None where one side does not vary."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def rating_step(values: np.ndarray) -> float | None:
    """1, 2 or 5 times a power of ten, in which the ratings are counted where they have too many different values for a
    table."""
    if len(values) <= RATING_VALUES:
        return None
    span = float(np.ptp(values))
    power = 10.0 ** math.floor(math.log10(span / RATING_BINS))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / RATING_BINS)


def rating_figures(column: np.ndarray, step: float | None) -> dict[str, Any]:
    """Mean and shares of one aspect's ratings; with a step, the share of a value is that of all ratings nearest to
    it."""
    values = column[~np.isnan(column)]
    shown, counts = np.unique(values if step is None else np.round(values / step) * step, return_counts=True)
    return {
        "mean": float(values.mean()) if len(values) else None,
        "rated": len(values),
        "not_a_number": len(column) - len(values),
        "share": {f"{value + 0.0:g}": int(count) / len(values) for value, count in zip(shown, counts, strict=True)},
    }


def summary(values: np.ndarray) -> dict[str, Any]:
    """Mean, quantiles and a histogram with bins that double."""
    if not len(values):
        return {"mean": None, "min": None, "p50": None, "p95": None, "max": None, "histogram": {}}
    p50, p95 = np.quantile(values, (0.5, 0.95), method="inverted_cdf")  # values that occur, none in between
    return {
        "mean": float(values.mean()),
        "min": int(values.min()),
        "p50": int(p50),
        "p95": int(p95),
        "max": int(values.max()),
        "histogram": histogram(values),
    }


def histogram(values: np.ndarray) -> dict[str, int]:
    """Counts of whole numbers in the bins 0, 1, 2-3, 4-7, 8-15, ...; without the empty ends."""
    if not len(values):
        return {}
    bins = np.frexp(values)[1]  # the number of bits: 0 for 0, 1 for 1, 2 for 2-3, ...
    counts = np.bincount(bins)
    return {bin_label(index): int(counts[index]) for index in range(bins.min(), bins.max() + 1)}


def bin_label(index: int) -> str:
    low, high = (1 << index) >> 1, (1 << index) - 1
    return str(low) if low == high else f"{low}-{high}"


def as_json(values: np.ndarray) -> dict[str, int]:
    """How often each value occurs."""
    return {str(value): int(count) for value, count in zip(*np.unique(values, return_counts=True), strict=True)}
