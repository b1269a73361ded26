"""From a source's group to the stored row: checks, pairs, and the counts of what was left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from silkie.data.pairs import PairOptions, build_pairs, filter_given, is_weight, same_text
from silkie.data.registry import Found, Row
from silkie.data.schema import Group, count_images


class NoPairs(Exception):
    """A sound group that yields no pair (all ratings tie, one response, ...)."""

    def __init__(self, reason: str, notes: list[str]) -> None:
        super().__init__(reason)
        self.notes = notes


def finish(
    group: Group, row: Row, options: PairOptions, aspects: tuple[str, ...], *, fallback_id: str, need_pairs: bool
) -> tuple[dict[str, Any], list[str]]:
    """Check a group, build its pairs and return (stored row, notes). A note is the reason of one dropped response or
    pair.

    Raises RowError for a broken group and NoPairs for a sound one without a pair.
    """
    check(group, row, aspects)
    stored: dict[str, Any] = {
        "id": str(group.id) if group.id is not None else fallback_id,
        "images": group.images,
        "prompt": group.prompt,
        "responses": group.responses,
        "models": group.models,
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
    check_strings(stored, row)
    if not pairs and need_pairs:
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
        if len(values) not in (2, 3) or any(int(index) != index for index in values[:2]):
            raise row.error("pairs", item, "(chosen, rejected) or (chosen, rejected, weight) from the pair function")
        pairs.append([int(values[0]), int(values[1])])
        weights.append(float(values[2]) if len(values) == 3 else 1.0)
        if not is_weight(weights[-1]):
            raise row.error("pair_weights", item, "a finite weight >= 0 from the pair function")
    check_pairs(pairs, count, row)
    return pairs, weights, []


def check(group: Group, row: Row, aspects: tuple[str, ...]) -> None:
    """Every rule of the group schema that an adapter could break."""
    if not group.responses:
        raise row.error("responses", [], "at least one response")
    if not group.prompt:
        raise row.error("prompt", [], "a conversation that ends with a user turn")
    if count_images(group.prompt) != len(group.images):
        raise row.error(
            "prompt",
            Found(f"{count_images(group.prompt)} image part(s) for {len(group.images)} image(s)"),
            "one image part per image",
        )
    if group.prompt[-1]["role"] != "user":
        raise row.error(
            "prompt",
            Found(f"a last turn of role {group.prompt[-1]['role']!r}"),
            "a conversation that ends with a user turn",
        )
    for name in ("ratings", "rationales", "models"):
        values = getattr(group, name)
        if values is not None and len(values) != len(group.responses):
            raise row.error(
                name, Found(f"{len(values)} entries"), f"one entry for each of the {len(group.responses)} responses"
            )
    unknown = sorted({aspect for rating in group.ratings or [] for aspect in rating} - set(aspects))
    if unknown:
        raise row.error(
            "ratings",
            Found(f"aspect {unknown[0]!r}"),
            f"one of the aspects {', '.join(map(repr, aspects)) or '(none)'}",
            f"The aspects are read off the first records; pass aspects=(..., {unknown[0]!r}) to name them all.",
        )
    if group.pairs is not None:
        check_pairs(group.pairs, len(group.responses), row)


def check_pairs(pairs: Sequence[Sequence[int]], count: int, row: Row) -> None:
    """Pairs are two different indices into the responses."""
    if not isinstance(pairs, (list, tuple)):
        raise row.error("pairs", pairs, "a list of [chosen, rejected]")
    for pair in pairs:
        if not isinstance(pair, (list, tuple)):
            raise row.error("pairs", pair, "[chosen, rejected]")
        if (
            len(pair) != 2
            or not all(isinstance(index, int) and 0 <= index < count for index in pair)
            or pair[0] == pair[1]
        ):
            raise row.error("pairs", list(pair), f"two different indices from 0 to {count - 1}")


def check_strings(stored: dict[str, Any], row: Row) -> None:
    """Every text of a row is null or a string that Arrow can write."""
    for column, value in _strings(stored):
        if value is not None and not isinstance(value, str):
            raise row.error(column, value, "text")
        if value and not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise row.error(
                column,
                value,
                "text that UTF-8 can hold",
                "It has half of a surrogate pair: an emoji that was cut in two.",
            )


def _strings(stored: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "id", stored["id"]
    for index, turn in enumerate(stored["prompt"]):
        yield from ((f"prompt[{index}]", part["text"]) for part in turn["content"])
    for name in ("responses", "models"):
        yield from ((f"{name}[{index}]", value) for index, value in enumerate(stored[name] or []))
    for index, texts in enumerate(stored.get("rationales") or []):
        yield from ((f"rationales[{index}].{aspect}", text) for aspect, text in texts.items())


def why_no_pairs(count: int, notes: list[str]) -> str:
    if count < 2:
        return "no pairs: a single response"
    return f"no pairs: {', '.join(sorted(set(notes)))}" if notes else "no pairs"
