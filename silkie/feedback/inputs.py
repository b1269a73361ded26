"""Read the JSON-lines files that people hand in: prompts to sample from, responses to rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from silkie.endpoint.errors import whole_text
from silkie.endpoint.media import resolve_image
from silkie.feedback.items import JudgeItem
from silkie.io.files import open_file
from silkie.io.jsonl import json_lines


class RecordError(ValueError):
    """A line of an input file that cannot be used: names file, line, column, what was found and what was expected."""


def _fail(where: str, column: str, found: Any, expected: str) -> RecordError:
    try:
        shown = f"{found!r:.120}"
    except (RecursionError, ValueError):
        shown = f"a {type(found).__name__} that is nested too deeply"
    return RecordError(f"{where}, {column!r}: found {shown}; expected {expected}")


def _images(value: Any, where: str) -> tuple[str, ...]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    for entry in values:
        if not isinstance(entry, str) or not entry:
            raise _fail(where, "image", value, "the path of an image, a list of paths, or null")
    return tuple(values)


def _responses(value: Any, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if not isinstance(value, list) or not value:
        raise _fail(where, "responses", value, 'a non-empty list of {"model", "response"}')
    for entry in value:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("response"), str):
            raise _fail(where, "responses", entry, '{"model": text, "response": text}')
    return tuple(entry["response"] for entry in value), tuple(str(entry.get("model") or "unknown") for entry in value)


def _is_conversation(value: Any) -> bool:
    def is_part(part: Any) -> bool:
        kind = part.get("type") if isinstance(part, Mapping) else None
        return kind == "image" or (kind == "text" and isinstance(part.get("text"), str))

    def is_turn(turn: Any) -> bool:
        content = turn.get("content") if isinstance(turn, Mapping) and isinstance(turn.get("role"), str) else None
        return isinstance(content, str) or (isinstance(content, list) and all(map(is_part, content)))

    return isinstance(value, list) and bool(value) and all(map(is_turn, value))


def parse_item(record: Any, where: str, *, need_responses: bool = True, default_id: str | None = None) -> JudgeItem:
    """The item in one decoded JSON line; images stay paths. Raises RecordError."""
    if not isinstance(record, Mapping):
        raise RecordError(
            f"{where}: found {type(record).__name__}; expected an object with id, image, prompt, responses"
        )
    item_id = record.get("id", default_id)
    if not isinstance(item_id, (str, int)) or isinstance(item_id, bool) or item_id == "":
        raise _fail(where, "id", item_id, "a text that is unique in the file")
    prompt: Any = record.get("prompt")
    if not ((isinstance(prompt, str) and prompt.strip()) or _is_conversation(prompt)):
        raise _fail(
            where,
            "prompt",
            prompt,
            "a text, or a conversation of {role, content} whose parts are of type text or image",
        )
    responses, models = _responses(record.get("responses"), where) if need_responses else ((), ())
    known = {"id", "prompt", "image", "responses"}
    return JudgeItem(
        id=str(item_id),
        given_id=item_id,
        prompt=prompt,
        images=_images(record.get("image"), where),
        responses=responses,
        models=models,
        meta={key: value for key, value in record.items() if key not in known},
    )


def read_items(path: str | Path, *, need_responses: bool = True) -> Iterator[JudgeItem]:
    """Items of a JSONL file, one at a time. Raises RecordError at the first line that cannot be used, and for an id
    that comes twice.

    Without responses (prompts to sample from) an `id` may be missing: it is then the line number.
    """
    path = Path(path)
    seen: dict[str, int] = {}
    try:
        # `json` reads bytes with a byte order mark as well, and a broken byte is an error of its line
        file = open_file(path)
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error}") from error
    with file:
        for line in json_lines(file):
            where, record = f"{path}, line {line.number}", line.value
            if line.error is not None:
                raise RecordError(f"{where}: not valid JSON: {line.error}") from line.error
            if b"\\ud" in line.raw.lower():
                record = _whole(record)
            item = parse_item(
                record, where, need_responses=need_responses, default_id=None if need_responses else str(line.number)
            )
            if item.id in seen:
                raise _fail(where, "id", item.id, f"an id that is unique in the file (line {seen[item.id]} has it too)")
            seen[item.id] = line.number
            yield item


def _whole(value: Any) -> Any:
    """A JSON value whose texts UTF-8 can hold."""
    if isinstance(value, str):
        return whole_text(value)
    if isinstance(value, dict):
        return {whole_text(key): _whole(entry) for key, entry in value.items()}
    return [_whole(entry) for entry in value] if isinstance(value, list) else value


def with_images(item: JudgeItem, image_root: str | Path | None, base: str | Path) -> JudgeItem:
    """The item with its image paths looked up below `image_root` (default: `base`). Raises ItemError("image")."""
    return replace(item, images=tuple(resolve_image(image, image_root, base) for image in item.images))
