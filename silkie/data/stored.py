"""From a source's group to the stored row: the check, its pairs, and the reasons of what was dropped from it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from silkie.data.check import check_group, check_pairs, check_storable
from silkie.data.pairs import PairOptions, build_pairs, filter_given, is_weight, same_text
from silkie.data.row import Found, Row
from silkie.data.schema import OPTIONAL, Group


class NoPairs(Exception):
    """A sound group that yields no pair (all ratings tie, one response, ...)."""

    def __init__(self, reason: str, notes: list[str]) -> None:
        super().__init__(reason)
        self.notes = notes


def stored_row(
    group: Group, row: Row, options: PairOptions, aspects: tuple[str, ...], *, fallback_id: str, need_pairs: bool
) -> tuple[dict[str, Any], list[str]]:
    """Check a group, build its pairs and return (stored row, notes). A note is the reason of one dropped response or
    pair.

    Raises RowError for a broken group and NoPairs for a sound one without a pair and without labels.
    """
    check_group({field.name: getattr(group, field.name) for field in fields(group)}, row, aspects=aspects)
    stored: dict[str, Any] = {
        "id": str(group.id) if group.id is not None else fallback_id,
        "images": group.images,
        "prompt": group.prompt,
        "responses": group.responses,
        "models": group.models,
        **{name: getattr(group, name) for name in OPTIONAL},
    }
    if aspects:
        stored["ratings"] = (
            None
            if group.ratings is None
            else [{name: rating.get(name) for name in aspects} for rating in group.ratings]
        )
        texts = group.rationales
        stored["rationales"] = (
            None if texts is None else [{name: (text or {}).get(name) for name in aspects} for text in texts]
        )
    pairs, weights, notes = pair_up(
        stored | {"pairs": group.pairs, "pair_weights": group.pair_weights, "ratings": group.ratings}, options, row
    )
    stored["pairs"], stored["pair_weights"] = pairs, weights
    check_storable(stored, row)
    if not pairs and need_pairs and group.labels is None:
        raise NoPairs(why_no_pairs(len(group.responses), notes), notes)
    return stored, notes


def pair_up(group: dict[str, Any], options: PairOptions, row: Row) -> tuple[list[list[int]], list[float], list[str]]:
    """(pairs, weights, notes) of a group. Pairs that a source brings are kept, unless a strategy asks for others."""
    given, ratings, responses = group["pairs"], group.get("ratings"), group["responses"]
    if options.function is not None:
        return _from_function(options.function(group), len(responses), row)
    plain = options == PairOptions()
    if given is not None and options.needs_ratings and (plain or ratings is None):
        if not plain and options != PairOptions(strategy=options.strategy, seed=options.seed):
            raise row.error(
                "ratings",
                None,
                "ratings, which the given pair options look at",
                "Pass pairs='all' to take the pairs of the source.",
            )
        kept = filter_given(given, options.strategy, seed=options.seed, key=group["id"])
        weights = group.get("pair_weights") or [1.0] * len(given)
        distinct = [index for index in kept if not same_text(responses[given[index][0]], responses[given[index][1]])]
        notes = ["identical responses"] * (len(kept) - len(distinct))
        return [[int(given[i][0]), int(given[i][1])] for i in distinct], [float(weights[i]) for i in distinct], notes
    if options.needs_ratings and ratings is None:
        raise row.error(
            "ratings",
            None,
            f"ratings or pairs for pairs={options.strategy!r}",
            "Or pass pairs='longest', 'model:NAME' or a function.",
        )
    try:
        built = build_pairs(ratings, options, responses=responses, models=group.get("models"), key=group["id"])
    except (KeyError, ValueError) as error:
        column = "models" if options.strategy == "model" else "ratings"
        raise row.error(column, Found(str(error.args[0])), f"what pairs={options.strategy!r} needs") from error
    return [list(pair) for pair in built], built.weights, list(built.dropped.elements())


def _from_function(result: Any, count: int, row: Row) -> tuple[list[list[int]], list[float], list[str]]:
    pairs, weights = [], []
    for item in result:
        values = list(item)
        if len(values) not in (2, 3) or any(isinstance(i, bool) or int(i) != i for i in values[:2]):
            raise row.error("pairs", item, "(chosen, rejected) or (chosen, rejected, weight) from the pair function")
        pairs.append([int(values[0]), int(values[1])])
        weights.append(float(values[2]) if len(values) == 3 else 1.0)
        if not is_weight(weights[-1]):
            raise row.error("pair_weights", item, "a finite weight >= 0 from the pair function")
    check_pairs(pairs, count, row)
    return pairs, weights, []


def why_no_pairs(count: int, notes: list[str]) -> str:
    if count < 2:
        return "no pairs: a single response"
    return f"no pairs: {', '.join(sorted(set(notes)))}" if notes else "no pairs"
