"""The one check of a preference group: what adapters, `validate` and the trainer rely on.

Legend: K responses of a group, P pairs of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from silkie.data.pairs import is_weight, same_text
from silkie.data.row import Found, Row
from silkie.data.schema import Conversation, count_images

__all__ = ["check_distinct", "check_group", "check_no_video", "check_pairs", "check_storable", "is_aspect"]

PER_RESPONSE = ("labels", "ratings", "rationales", "models")
VIDEO_PLACEHOLDER = "<video>"  # what conversations write for a video, as <image> for an image
LONGEST_ASPECT = 200  # characters
CONVERSATION = "a conversation that ends with a user turn"


def check_group(group: Mapping[str, Any], row: Row, *, aspects: Sequence[str] | None = None) -> None:
    """Check every rule of the group schema (`silkie.data.schema.Group`) that a source or a user could break.

    Identical responses in a pair are `check_distinct`'s: loading drops such pairs, training refuses them.

    Args:
        group: the columns of one group.
        row: makes the errors, which name source and row.
        aspects: the rating aspects that the dataset has columns for; None leaves their names unchecked.

    Raises RowError.
    """
    prompt, responses, images = group["prompt"], group["responses"], group.get("images") or []
    if not responses:
        raise row.error("responses", [], "at least one response")
    for index, response in enumerate(responses):
        row.check_text(response, f"responses[{index}]")
    if not prompt:
        raise row.error("prompt", [], CONVERSATION)
    if (parts := count_images(prompt)) != len(images):
        found = Found(f"{parts} image part(s) for {len(images)} image(s)")
        raise row.error("prompt", found, "one image part per image")
    if prompt[-1]["role"] not in ("user", "tool"):
        raise row.error("prompt", Found(f"a last turn of role {prompt[-1]['role']!r}"), CONVERSATION)
    for name in PER_RESPONSE:
        values = group.get(name)
        if values is not None and len(values) != len(responses):
            raise row.error(
                name, Found(f"{len(values)} entries"), f"one entry for each of the {len(responses)} responses"
            )
    if group.get("pairs") is not None:
        check_pairs(group["pairs"], len(responses), row)
        _check_weights(group, row)
    if aspects is not None:  # last: the names are learnt from sound rows, so any other fault of a row explains it
        _check_aspects(group.get("ratings") or [], aspects, row)


def check_no_video(record: Mapping[str, Any], prompt: Conversation, row: Row) -> None:
    """Refuse a row with a video, wherever it holds it: without the video its answers would be about nothing.

    Args:
        record: the row as it was read, or the group: its columns `videos` and `video` are looked at.
        prompt: the conversation made of it; parts of type video and the mark <video> in a text are looked for.
        row: makes the errors, which name source and row.

    Raises RowError.
    """
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else part
        for turn in prompt
        for part in ([turn["content"]] if isinstance(turn["content"], str) else turn["content"] or [])
    ]
    column = next((name for name in ("videos", "video") if record.get(name)), "prompt")
    found = (
        "a video"
        if column != "prompt"
        else "a part of type video"
        if any(part["type"] == "video" for part in parts)
        else f"the mark {VIDEO_PLACEHOLDER}"
        if any(VIDEO_PLACEHOLDER in (part.get("text") or "") for part in parts)
        else ""
    )
    if found:
        raise row.error(column, Found(found), "no video", "silkie trains on images only: take frames as images.")


def is_aspect(name: Any) -> bool:
    """Whether a text can be the name of an aspect, which names a column: no line break, NUL or half of a surrogate
    pair, and no text that slipped in from elsewhere."""
    return isinstance(name, str) and bool(name.strip()) and name.isprintable() and len(name) <= LONGEST_ASPECT


def _check_aspects(ratings: Sequence[Mapping[str, Any]], aspects: Sequence[str], row: Row) -> None:
    for aspect in (aspect for rating in ratings for aspect in rating):
        if not is_aspect(aspect):
            expected = f"an aspect whose name is printable text of up to {LONGEST_ASPECT} characters"
            raise row.error("ratings", aspect, expected)
    unknown = sorted({aspect for rating in ratings for aspect in rating} - set(aspects))
    if unknown:
        raise row.error(
            "ratings",
            Found(f"aspect {unknown[0]!r}"),
            f"one of the aspects {', '.join(map(repr, aspects)) or '(none)'}",
            f"The aspects are read off the first records; pass aspects=(..., {unknown[0]!r}) to name them all.",
        )


def check_pairs(pairs: Any, count: int, row: Row) -> None:
    """Pairs are two different indices into the `count` responses."""
    if not isinstance(pairs, (list, tuple)):
        raise row.error("pairs", pairs, "a list of [chosen, rejected]")
    for pair in pairs:
        if not isinstance(pair, (list, tuple)):
            raise row.error("pairs", pair, "[chosen, rejected]")
        indices = all(isinstance(index, int) and not isinstance(index, bool) and 0 <= index < count for index in pair)
        if len(pair) != 2 or not indices or pair[0] == pair[1]:
            raise row.error("pairs", list(pair), f"two different indices from 0 to {count - 1}")


def check_distinct(group: Mapping[str, Any], row: Row) -> None:
    """The two responses of a pair differ in more than white space: there is no preference between equal ones."""
    for chosen, rejected in group["pairs"]:
        if same_text(group["responses"][chosen], group["responses"][rejected]):
            found = Found(f"responses {chosen} and {rejected}, which are identical")
            raise row.error("pairs", found, "pairs of different responses")


def _check_weights(group: Mapping[str, Any], row: Row) -> None:
    weights, pairs = group.get("pair_weights"), group["pairs"]
    if not weights:  # an empty list means 1 for each pair, like none
        return
    # one too few or too many would shift the weights of every later group in a batch
    if len(weights) != len(pairs):
        raise row.error("pair_weights", Found(f"{len(weights)} weights"), f"one for each of the {len(pairs)} pairs")
    if not all(map(is_weight, weights)):
        raise row.error("pair_weights", weights, "finite weights >= 0")


def check_storable(stored: Mapping[str, Any], row: Row) -> None:
    """Every text of a row is null or a string that Arrow can write."""
    for column, value in _texts(stored):
        if value is not None and not isinstance(value, str):
            raise row.error(column, value, "text")
        if value and not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise row.error(
                column,
                value,
                "text that UTF-8 can hold",
                "It has half of a surrogate pair: an emoji that was cut in two.",
            )


def _texts(stored: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "id", stored["id"]
    for index, turn in enumerate(stored["prompt"]):
        yield from ((f"prompt[{index}]", part["text"]) for part in turn["content"])
    for name in ("responses", "models"):
        yield from ((f"{name}[{index}]", value) for index, value in enumerate(stored[name] or []))
    for index, texts in enumerate(stored.get("rationales") or []):
        yield from ((f"rationales[{index}].{aspect}", text) for aspect, text in texts.items())
