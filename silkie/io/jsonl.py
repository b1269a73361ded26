"""The one reader of JSON and JSON lines. It says where a line is and what is wrong with it; what to do then is the
caller's policy: data loading reports the row and reads on, evaluation and feedback stop."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple, TypeGuard

__all__ = [
    "MAX_LINE_BYTES",
    "JsonError",
    "JsonLine",
    "bounded_lines",
    "decode",
    "json_document",
    "json_lines",
    "json_problem",
    "problem_line",
]

MAX_LINE_BYTES = 256 * 2**20  # a record with its images embedded as base64 has tens of megabytes at most
_BLOCK = 2**20
_TOO_DEEP = "nested too deeply to be read"
_LONGEST_NUMBER = 4300  # digits that Python reads
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]')


class JsonError(ValueError):
    """A text that is not JSON, or none that can be read: `FILE:LINE: why`."""


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
        text = self.raw[:400] if isinstance(self.raw, str) else self.raw[:400].decode(errors="replace")
        if isinstance(self.error, json.JSONDecodeError):
            return f"{self.error.msg} at column {self.error.colno} of {text[:80]!r}"
        return f"{self.error} in {text[:80]!r}"


class _LongLine(bytes):
    """The beginning of a line that is longer than allowed; the rest was passed over."""

    __slots__ = ()


def json_lines(lines: Iterable[bytes | str], *, first: int = 1, limit: int | None = None) -> Iterator[JsonLine]:
    """Decode the lines that are not blank, one at a time. A line of more than `limit` bytes (MAX_LINE_BYTES) is an
    error of that line, and is never in memory.

    Args:
        lines: an open binary file, or lines of text. Text must be split at "\\n" alone: a JSON string may hold other
            line separators (U+2028) as they are.
        first: number of the first line, for a reader that starts in the middle of a file.
    """
    limit = MAX_LINE_BYTES if limit is None else limit
    for number, raw in enumerate(bounded_lines(lines, limit=limit) if _is_file(lines) else lines, first):
        if isinstance(raw, _LongLine):
            yield JsonLine(
                number, bytes(raw), None, ValueError(f"a line of more than {limit:,} bytes, which are not read")
            )
        elif raw.strip():
            text = raw.rstrip("\r\n") if isinstance(raw, str) else raw.rstrip(b"\r\n")
            yield JsonLine(number, text, *decode(text))


def _is_file(lines: Any) -> TypeGuard[IO[bytes]]:
    return hasattr(lines, "readline")


def bounded_lines(file: IO[bytes], *, limit: int, stop: int | None = None) -> Iterator[bytes]:
    """The lines of a binary file, up to offset `stop`. Of a longer line its beginning comes, as a `_LongLine`."""
    while stop is None or file.tell() < stop:
        line = file.readline(limit + 1)
        if not line:
            return
        if len(line) <= limit or line.endswith(b"\n"):
            yield line
            continue
        start = _LongLine(line[:400])
        while line and not line.endswith(b"\n"):
            line = file.readline(_BLOCK)
        yield start


def decode(raw: bytes | str) -> tuple[Any, ValueError | None]:
    """(value, None), or (None, why the text is not JSON)."""
    try:
        return json.loads(raw), None
    except ValueError as error:
        return None, error
    except RecursionError:
        return None, ValueError(_TOO_DEEP)


def json_document(raw: bytes | str, where: str) -> Any:
    """The value of a whole JSON text; `where` names its file. Raises JsonError with the line."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise JsonError(f"{where}:{problem_line(raw, error)}: {json_problem(error)}") from None


def json_problem(error: Exception) -> str:
    """What is wrong with a JSON text, for any error that `json.loads` raises."""
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} (column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text"
    why = _TOO_DEEP if isinstance(error, RecursionError) else "a number of too many digits"
    return f"not JSON that can be read: {why}"


def problem_line(raw: bytes | str, error: Exception) -> int:
    """The line of a JSON text that an error of `json.loads` is about."""
    if isinstance(error, json.JSONDecodeError):
        return error.lineno
    if isinstance(error, UnicodeDecodeError) and isinstance(raw, bytes):
        return raw.count(b"\n", 0, error.start) + 1
    text = raw if isinstance(raw, str) else raw.decode(errors="replace")
    if isinstance(error, RecursionError):
        return _deepest_line(text)
    number = re.search(rf"\d{{{_LONGEST_NUMBER + 1}}}", text)
    return text.count("\n", 0, number.start()) + 1 if number else 1


def _deepest_line(text: str) -> int:
    """The line on which the brackets of a text are nested most deeply."""
    depth, deepest, place = 0, 0, 0
    for token in _TOKEN.finditer(text):
        if token[0] in "[{":
            depth += 1
            if depth > deepest:
                deepest, place = depth, token.start()
        elif token[0] in "]}":
            depth -= 1
    return text.count("\n", 0, place) + 1
