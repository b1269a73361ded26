"""The preference group: the one row type that every part of silkie reads.

Legend: K responses of a group, P pairs of a group, I images of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Features, Image, List, Value

VLFEEDBACK_ASPECTS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
ROLES = ("system", "user", "assistant")
IMAGE_PLACEHOLDER = "<image>"

Form = Literal["plain", "turns"]
ImageValue = dict[str, Any]  # {"bytes": bytes | None, "path": str | None}: what `datasets.Image(decode=False)` stores
Conversation = list[dict[str, Any]]


class DataError(ValueError):
    """The data cannot be used as preference groups; the message says what to do."""


class NoGroupLeft(DataError):
    """No row of the data can be trained on."""


class RowError(DataError):
    """One row is broken. Names the source, the row, the column, what was found and what was expected."""

    def __init__(self, source: str, row: str, column: str, found: str, expected: str, hint: str = "") -> None:
        self.source, self.row, self.column, self.found, self.expected, self.hint = (
            source,
            row,
            column,
            found,
            expected,
            hint,
        )
        message = f"{source}, {row}, column {column!r}: found {found}; expected {expected}."
        super().__init__(f"{message} {hint}".strip())

    def __reduce__(self):  # raised in worker processes, so it must survive pickling
        return RowError, (self.source, self.row, self.column, self.found, self.expected, self.hint)

    @property
    def reason(self) -> str:
        """The message without its location: equal for rows that are broken in the same way."""
        return f"column {self.column!r}: expected {self.expected}"


class SkipRow(Exception):
    """A well-formed row that silkie does not train on (a video, a tie marked by the source): dropped and counted, never
    an error."""


@dataclass(slots=True, kw_only=True)
class Group:
    """One preference group before it is written to Arrow. See `group_features` for the column types."""

    prompt: Conversation
    responses: list[str]  # [K]
    images: list[ImageValue]  # [I]
    pairs: Sequence[Sequence[int]] | None = None  # [P] (chosen, rejected); None: to be built from the ratings
    pair_weights: Sequence[float] | None = None  # [P]
    labels: list[bool | None] | None = None  # [K] desirable, undesirable, or not labelled (thumbs up and down)
    ratings: list[dict[str, float | None]] | None = None  # [K]
    rationales: Sequence[dict[str, str | None] | None] | None = None  # [K]
    models: list[str | None] | None = None  # [K]
    id: str | None = None
    form: Form | None = None
    prompt_turns: str | None = None
    tools: str | None = None
    chat_template_kwargs: str | None = None


# Columns of a group whose prompt and responses do not say all that its row did; absent where no row of a dataset needs
# them.
#   form: "plain": prompt and responses are text without a chat template; "turns": each response is the JSON text of a
#       list of turns.
#   prompt_turns: JSON text of the prompt's turns, where they hold tool calls or other fields than text and images.
#   tools, chat_template_kwargs: JSON text of what the chat template is given for this row.
ROW_FORM = ("form", "prompt_turns", "tools", "chat_template_kwargs")
# All columns that are absent where no row of a dataset needs them.
OPTIONAL = {**{name: Value("string") for name in ROW_FORM}, "labels": List(Value("bool"))}


def group_features(aspects: Iterable[str] = ()) -> Features:
    """Column types of a preference-group dataset whose ratings carry `aspects` (no aspects: no `ratings` and
    `rationales` columns).

    Images stay encoded (bytes or a path) until `silkie.data.images.open_image` decodes them at use.
    """
    aspects = tuple(aspects)
    part = {"type": Value("string"), "text": Value("string")}
    features: dict[str, Any] = {
        "id": Value("string"),
        "images": List(Image(decode=False)),
        "prompt": List({"role": Value("string"), "content": List(part)}),
        "responses": List(Value("string")),
        "pairs": List(List(Value("int32"))),
        "pair_weights": List(Value("float32")),
        "models": List(Value("string")),
    }
    if aspects:
        # In float32 equal means would differ and become pairs
        features["ratings"] = List({aspect: Value("float64") for aspect in aspects})
        features["rationales"] = List({aspect: Value("string") for aspect in aspects})
    return Features(features)


def aspects_of(features: Features) -> tuple[str, ...]:
    """The rating aspects that a preference-group dataset carries, in column order; () where it has no ratings."""
    ratings = features.get("ratings")
    return tuple(ratings.feature) if ratings is not None else ()


def is_group_features(features: Features) -> bool:
    """True where `features` are exactly those of a dataset that `load_preferences` has written."""
    if not {"prompt", "responses", "pairs"} <= set(features):
        return False
    more = {name: kind for name, kind in OPTIONAL.items() if name in features}
    return features == Features({**group_features(aspects_of(features)), **more})


def user_turn(text: str, n_images: int = 0) -> dict[str, Any]:
    """A user message with `n_images` image parts: where `text` has `<image>` marks, in front of the text otherwise.

    Raises ValueError where the text has marks but not `n_images` of them.
    """
    pieces = text.split(IMAGE_PLACEHOLDER)
    if len(pieces) == 1:
        return {"role": "user", "content": [image_part() for _ in range(n_images)] + [text_part(text)]}
    if len(pieces) - 1 != n_images:
        raise ValueError(f"{len(pieces) - 1} {IMAGE_PLACEHOLDER} marks for {n_images} image(s)")
    content: list[dict[str, Any]] = []
    for index, piece in enumerate(pieces):
        if index:
            content.append(image_part())
        if piece := piece.strip("\n"):  # the line break beside a mark belongs to the mark, not to the question
            content.append(text_part(piece))
    return {"role": "user", "content": content}


def text_turn(role: str, text: str) -> dict[str, Any]:
    """A message of text alone."""
    return {"role": role, "content": [text_part(text)]}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def image_part() -> dict[str, Any]:
    return {"type": "image", "text": None}


def count_images(prompt: Conversation) -> int:
    """Number of image parts in a conversation."""
    return sum(part["type"] == "image" for turn in prompt for part in turn["content"])


def prompt_text(prompt: Conversation, roles: Sequence[str] = ROLES) -> str:
    """The text of a conversation, one line per turn, without image parts."""
    turns = (
        " ".join(part["text"] for part in turn["content"] if part["type"] == "text")
        for turn in prompt
        if turn["role"] in roles
    )
    return "\n".join(turns)


def to_messages(prompt: Conversation) -> Conversation:
    """The conversation as chat templates want it: image parts without the null `text` that Arrow adds to them."""
    return [
        {
            "role": turn["role"],
            "content": [{key: value for key, value in part.items() if value is not None} for part in turn["content"]],
        }
        for turn in prompt
    ]


def mean_rating(rating: Mapping[str, float | None] | None) -> float:
    """Mean of the aspects of one response; NaN where any of them is missing (the response then takes part in no
    pair)."""
    values = list(rating.values()) if rating else []
    if not values or any(value is None for value in values):
        return float("nan")
    return sum(values) / len(values)  # type: ignore[arg-type]
