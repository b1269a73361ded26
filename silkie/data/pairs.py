"""Ratings to preference pairs: pure functions over one group.

Legend: K responses of a group, P pairs of a group.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Strategy = Literal["all", "best_vs_worst", "best_vs_rest", "random", "longest", "model"]
STRATEGIES: tuple[str, ...] = ("all", "best_vs_worst", "best_vs_rest", "random", "longest", "model")
TIE_TOLERANCE = 1e-9  # weighted means of equal ratings may differ in the last bit
MAX_WEIGHT = 3.4e38
ANY_SCALE = (-1e6, 1e6)  # of ratings whose source declares no scale; means and margins of more lose digits
_PLAIN_NUMBER = re.compile(r"\s*[+-]?[0-9]+(?:\.[0-9]+)?\s*", re.ASCII)

Rating = Mapping[str, Any] | float | int | str | None
PairFunction = Callable[[dict[str, Any]], Iterable[Sequence[float]]]


class Pairs(list[tuple[int, int]]):
    """The (chosen, rejected) index pairs of one group, and what was dropped.

    Attributes:
        weights: [P] weight of each pair in the loss.
        margins: [P] score gap of each pair, NaN where there is none.
        dropped: reason -> number of responses or pairs dropped.
    """

    def __init__(
        self,
        pairs: Iterable[tuple[int, int]] = (),
        weights: Iterable[float] | None = None,
        margins: Iterable[float] | None = None,
    ) -> None:
        super().__init__(pairs)
        self.weights = [1.0] * len(self) if weights is None else list(weights)
        self.margins = [math.nan] * len(self) if margins is None else list(margins)
        self.dropped: Counter[str] = Counter()


@dataclass(frozen=True, kw_only=True, slots=True)
class PairOptions:
    """How ratings become pairs.

    Args:
        strategy: "all" pairs of unequal score (VLFeedback's own rule), "best_vs_worst", "best_vs_rest", one "random"
            pair of unequal score, "longest" (the longest response against every other one) or "model" (the response of
            `model` against every other one). The last two ignore the ratings: they are the paper's baselines.
        aspects: which aspects count and with what weight: a mapping, or a sequence for equal weights. None: the mean of
            all.
        min_margin: pairs whose score gap is smaller are dropped.
        weight_by_margin: weight a pair by its score gap instead of by 1.
        keep_ties: with "all", keep pairs of equal score as well, in the order of the responses (margin 0).
        model: for "model": the name as it stands in the data, compared without regard to case.
        seed: for "random".
    """

    strategy: Strategy = "all"
    aspects: Mapping[str, float] | Sequence[str] | None = None
    min_margin: float = 0.0
    weight_by_margin: bool = False
    keep_ties: bool = False
    model: str | None = None
    seed: int = 0
    function: PairFunction | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(
                f"pairs={self.strategy!r} is not known; choose from {', '.join(STRATEGIES)} (model as 'model:NAME') or"
                " pass a function"
            )
        if (self.strategy == "model") != (self.model is not None):
            raise ValueError("strategy 'model' and the option `model` belong together: pairs='model:NAME'")
        if self.min_margin < 0 or not math.isfinite(self.min_margin):
            raise ValueError(f"min_margin must be a number >= 0, found {self.min_margin}")
        if self.keep_ties and (self.strategy != "all" or self.min_margin > 0 or self.weight_by_margin):
            raise ValueError(
                "keep_ties works with strategy 'all' and without min_margin or weight_by_margin: a tie has margin 0"
            )
        if self.strategy in ("longest", "model") and (
            self.min_margin > 0 or self.weight_by_margin or self.aspects is not None
        ):
            raise ValueError(
                f"strategy {self.strategy!r} does not look at ratings; aspects, min_margin and weight_by_margin have no"
                " meaning with it"
            )
        weights = self.aspect_weights
        if weights is not None and not (
            all(0 <= weight < math.inf for weight in weights.values()) and sum(weights.values()) > 0
        ):
            raise ValueError(f"aspect weights must be finite and >= 0 with a positive sum, found {weights}")

    @property
    def aspect_weights(self) -> dict[str, float] | None:
        if self.aspects is None:
            return None
        if isinstance(self.aspects, Mapping):
            return {name: float(weight) for name, weight in self.aspects.items()}
        if isinstance(self.aspects, str):
            raise ValueError(
                f"aspects must be a mapping or a sequence of names, found the string {self.aspects!r}; write"
                f" [{self.aspects!r}]"
            )
        return dict.fromkeys(self.aspects, 1.0)

    @property
    def needs_ratings(self) -> bool:
        return self.function is None and self.strategy not in ("longest", "model")

    @classmethod
    def parse(cls, pairs: str | PairOptions | PairFunction) -> PairOptions:
        """The `pairs` argument of `load_preferences` as options: a strategy name, "model:NAME", options, or a function
        of a group."""
        if isinstance(pairs, PairOptions):
            return pairs
        if callable(pairs):
            return cls(function=pairs)
        if not isinstance(pairs, str):
            raise TypeError(f"pairs must be a strategy name, PairOptions or a function, found {type(pairs).__name__}")
        if pairs.startswith("model:"):
            return cls(strategy="model", model=pairs.removeprefix("model:").strip())
        return cls(strategy=pairs)  # type: ignore[arg-type]


def parse_rating(value: Any) -> float | None:
    """A rating as a number; None where it is not one ("N/A", empty, NaN). VLFeedback stores ratings as strings."""
    if value is None or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def check_rating(value: Any, scale: tuple[float, float]) -> float | None:
    """A rating on a scale; None where there is none (null, NaN, text without a digit such as "N/A").

    Raises ValueError for whatever could be read as a rating in more than one way or is off the scale: a number
    outside it, "1_0", "4/5", true, a list.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str) and not any(letter.isdigit() for letter in value):
        return None
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not plain and not (isinstance(value, str) and _PLAIN_NUMBER.fullmatch(value)):
        raise ValueError("a plain number, or text without one such as N/A")
    low, high = scale
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not low <= number <= high:
        raise ValueError(f"a rating from {low:g} to {high:g}")
    return number


def is_weight(value: Any) -> bool:
    """True for a number >= 0 that float32, in which pair weights are stored, can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MAX_WEIGHT


def response_score(rating: Rating, weights: Mapping[str, float] | None = None) -> float | None:
    """One response's score: the (weighted) mean of its aspects; None where an aspect with a weight is missing or not a
    number."""
    if not isinstance(rating, Mapping):
        return parse_rating(rating)
    counted = {
        aspect: weight
        for aspect, weight in (dict.fromkeys(rating, 1.0) if weights is None else weights).items()
        if weight
    }
    values = [(parse_rating(rating.get(aspect)), weight) for aspect, weight in counted.items()]
    if not values or any(value is None for value, _ in values):
        return None
    return math.fsum(value * weight for value, weight in values) / math.fsum(counted.values())  # type: ignore[operator]


def _scores(ratings: Sequence[Rating], weights: Mapping[str, float] | None) -> list[float | None]:
    """[K] scores over one set of aspects: those given, or all that the ratings of the group name.

    Raises KeyError for a given aspect on which no response is rated.
    """
    named = dict.fromkeys((aspect for rating in ratings if isinstance(rating, Mapping) for aspect in rating), 1.0)
    unknown = [aspect for aspect, weight in (weights or {}).items() if weight and aspect not in named]
    if unknown and any(rating is not None and rating != {} for rating in ratings):
        raise KeyError(f"aspect {unknown[0]!r} is not among the rated ones: {', '.join(map(repr, named)) or 'none'}")
    return [response_score(rating, named if weights is None else weights) for rating in ratings]


def mean_ratings(ratings: Sequence[Mapping[str, float | None] | None]) -> list[float]:
    """[K] mean rating of the responses of one STORED group, by which its pairs are ordered; NaN for a response that
    lacks a rating on an aspect on which another one has it."""
    return [math.nan if value is None else value for value in _scores(own_aspects(ratings), None)]


def own_aspects(ratings: Sequence[Mapping[str, float | None] | None]) -> list[dict[str, float | None]]:
    """[K] stored ratings on the group's own aspects. A dataset has columns for the aspects of all of its groups: null
    for every response of a group reads as "not rated on this"."""
    rated = {aspect for rating in ratings for aspect, value in (rating or {}).items() if value is not None}
    return [{aspect: value for aspect, value in (rating or {}).items() if aspect in rated} for rating in ratings]


def build_pairs(
    ratings: Sequence[Rating] | None,
    options: PairOptions | str | None = None,
    *,
    responses: Sequence[str] | None = None,
    models: Sequence[str | None] | None = None,
    key: str = "",
    **changes: Any,
) -> Pairs:
    """The preference pairs of one group.

    Args:
        ratings: [K] per response a mapping aspect -> rating, or one number. A response with a rating that is missing or
            not a number takes part in no pair.
        options: `PairOptions` or a strategy name; further keyword arguments override single options (`min_margin=1`).
        responses: [K] texts. Needed by "longest"; where given, pairs of identical texts are dropped.
        models: [K] names, needed by "model".
        key: names the group; with the seed it decides the draw of "random", so that the result does not depend on the
            order of the groups.

    Returns (chosen, rejected) indices, with `.weights`, `.margins` and `.dropped`. VLFeedback's rule is the default:
    the mean over its three aspects, all pairs, ties dropped (arXiv 2410.09421).
    """
    chosen_options = replace(PairOptions.parse(options or "all"), **changes)
    if chosen_options.function is not None:
        raise ValueError(
            "build_pairs takes a strategy, not a function; load_preferences(pairs=function) and rebuild_pairs call one"
        )
    counts = {
        name: len(values)
        for name, values in (("ratings", ratings), ("responses", responses), ("models", models))
        if values is not None
    }
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"one entry per response, but there are {', '.join(f'{count} {name}' for name, count in counts.items())}"
        )
    if chosen_options.strategy == "longest":
        texts = _required(responses, "responses", "longest")
        return _one_against_rest(_longest(texts), len(texts), responses, "no single longest response")
    if chosen_options.strategy == "model":
        names = _required(models, "models", "model")
        return _one_against_rest(_of_model(names, chosen_options.model), len(names), responses, "model absent")
    scores = _scores(_required(ratings, "ratings", chosen_options.strategy), chosen_options.aspect_weights)
    return _by_score(scores, chosen_options, responses, key)


def _required(values: Sequence | None, name: str, strategy: str) -> Sequence:
    if values is None:
        raise ValueError(f"pairs={strategy!r} needs the {name} of the group, and there are none")
    return values


def _by_score(scores: Sequence[float | None], options: PairOptions, responses: Sequence[str] | None, key: str) -> Pairs:
    """Pairs ordered by score. A larger index wins nothing: ties are ties, whatever the order of the responses."""
    rated = [index for index, value in enumerate(scores) if value is not None]
    dropped = Counter({"rating not a number": len(scores) - len(rated)})
    ordered: list[tuple[int, int, float]] = []  # (chosen, rejected, margin)
    for position, i in enumerate(rated):
        for j in rated[position + 1 :]:
            margin = float(scores[i] - scores[j])  # type: ignore[operator]
            if abs(margin) <= TIE_TOLERANCE:
                dropped["tie"] += not options.keep_ties
                if options.keep_ties:
                    ordered.append((i, j, 0.0))
            elif abs(margin) < options.min_margin - TIE_TOLERANCE:
                dropped["below min_margin"] += 1
            else:
                ordered.append((i, j, margin) if margin > 0 else (j, i, -margin))
    if responses is not None:
        distinct = [pair for pair in ordered if not same_text(responses[pair[0]], responses[pair[1]])]
        dropped["identical responses"] += len(ordered) - len(distinct)
        ordered = distinct
    ordered = _select(ordered, scores, options, key)
    weights = [margin if options.weight_by_margin else 1.0 for _, _, margin in ordered]
    pairs = Pairs(((i, j) for i, j, _ in ordered), weights, (margin for _, _, margin in ordered))
    pairs.dropped = +dropped
    return pairs


def _select(
    ordered: list[tuple[int, int, float]], scores: Sequence[float | None], options: PairOptions, key: str
) -> list[tuple[int, int, float]]:
    if options.strategy == "all" or not ordered:
        return ordered
    if options.strategy == "random":
        return [random.Random(f"{options.seed}:{key}").choice(ordered)]
    values = [value for value in scores if value is not None]
    best, worst = max(values) - TIE_TOLERANCE, min(values) + TIE_TOLERANCE
    kept = [pair for pair in ordered if scores[pair[0]] >= best]  # type: ignore[operator]
    if options.strategy == "best_vs_worst":
        kept = [pair for pair in kept if scores[pair[1]] <= worst]  # type: ignore[operator]
        return kept[:1]  # several best or several worst: one pair, the first in the order of the responses
    return kept


def _one_against_rest(best: int | None, count: int, responses: Sequence[str] | None, reason: str) -> Pairs:
    if best is None:
        pairs = Pairs()
        pairs.dropped[reason] += 1
        return pairs
    rest = [index for index in range(count) if index != best]
    distinct = [index for index in rest if responses is None or not same_text(responses[best], responses[index])]
    pairs = Pairs((best, index) for index in distinct)
    pairs.dropped = +Counter({"identical responses": len(rest) - len(distinct)})
    return pairs


def _longest(responses: Sequence[str]) -> int | None:
    lengths = [len(response) for response in responses]
    longest = [index for index, length in enumerate(lengths) if length == max(lengths)]
    return longest[0] if len(longest) == 1 else None


def _of_model(models: Sequence[str | None], wanted: str | None) -> int | None:
    matches = [index for index, model in enumerate(models) if (model or "").casefold() == (wanted or "").casefold()]
    return matches[0] if matches else None


def same_text(first: str, second: str) -> bool:
    """True where two texts differ in white space at most."""
    return first == second or first.split() == second.split()


def filter_given(pairs: Sequence[Sequence[int]], strategy: str, *, seed: int = 0, key: str = "") -> list[int]:
    """Positions of the pairs that `strategy` keeps where a source brings pairs but no ratings. No preference is
    invented.

    The best responses are those that are never rejected, the worst those that are never chosen: with all pairs of
    distinct ranks given, exactly the first and the last rank.
    """
    if strategy == "all" or not pairs:
        return list(range(len(pairs)))
    if strategy == "random":
        return [random.Random(f"{seed}:{key}").randrange(len(pairs))]
    chosen, rejected = {pair[0] for pair in pairs}, {pair[1] for pair in pairs}
    kept = [position for position, pair in enumerate(pairs) if pair[0] not in rejected]
    if strategy == "best_vs_worst":
        return [position for position in kept if pairs[position][1] not in chosen][:1]
    return kept
