"""The one reader of JSON lines. It says where a line is and what is wrong with it; what to do then is the caller's
policy: data loading reports the row and reads on, evaluation and feedback stop."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

__all__ = ["JsonLine", "decode", "json_lines"]


class JsonLine(NamedTuple):
    """One line of a file: its number (from 1), its text without the line break, and the value in it, or why there is
    none."""

    number: int
    raw: bytes | str
    value: Any
    error: ValueError | None

    @property
    def problem(self) -> str:
        """What is wrong with the line, with the column and the beginning of its text."""
        text = self.raw if isinstance(self.raw, str) else self.raw.decode(errors="replace")
        if isinstance(self.error, json.JSONDecodeError):
            return f"{self.error.msg} at column {self.error.colno} of {text[:80]!r}"
        return f"{self.error} in {text[:80]!r}"


def json_lines(lines: Iterable[bytes | str], *, first: int = 1) -> Iterator[JsonLine]:
    """Decode the lines that are not blank, one at a time.

    Args:
        lines: an open binary file, or lines of text. Text must be split at "\\n" alone: a JSON string may hold other
            line separators (U+2028) as they are.
        first: number of the first line, for a reader that starts in the middle of a file.
    """
    for number, raw in enumerate(lines, first):
        if raw.strip():
            text = raw.rstrip("\r\n") if isinstance(raw, str) else raw.rstrip(b"\r\n")
            yield JsonLine(number, text, *decode(text))


def decode(raw: bytes | str) -> tuple[Any, ValueError | None]:
    """(value, None), or (None, why the text is not JSON)."""
    try:
        return json.loads(raw), None
    except ValueError as error:
        return None, error
    except RecursionError:
        return None, ValueError("nested too deeply to be read")
