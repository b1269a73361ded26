"""One record of a source, with checked access to its columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from silkie.data.images import ImageError
from silkie.data.pairs import ANY_SCALE, check_rating
from silkie.data.resolver import ImageResolver
from silkie.data.schema import ImageValue, RowError

Record = Mapping[str, Any]


@dataclass(slots=True)
class Row:
    """One record and where it comes from, with checked access to its columns."""

    record: Record
    source: str  # format and file or dataset name
    location: str  # "row 12" or "line 12"
    resolver: ImageResolver
    scale: tuple[float, float] = ANY_SCALE  # of the ratings, from worst to best
    lacking: str | None = None  # the path or address of an image that was not found
    read: set[str] = field(default_factory=set)  # columns that were asked for

    def error(self, column: str, found: Any, expected: str, hint: str = "") -> RowError:
        """The error for a broken column. `found` is shown as a short repr, or verbatim where it is a `Found`."""
        return RowError(
            self.source, self.location, column, found if isinstance(found, Found) else short_repr(found), expected, hint
        )

    def get(self, column: str, default: Any = None) -> Any:
        self.read.add(column)
        return self.record.get(column, default)

    def require(self, column: str, kind: type | tuple[type, ...], expected: str) -> Any:
        """The value of a column that must be there and of a type."""
        self.read.add(column)
        if column not in self.record:
            raise self.error(
                column, Found(f"no such column (there are: {', '.join(map(repr, self.record)) or 'none'})"), expected
            )
        value = self.record[column]
        if not isinstance(value, kind):
            raise self.error(column, value, expected)
        return value

    def text(self, column: str) -> str:
        """A non-empty string column."""
        return self.check_text(self.require(column, str, "a non-empty string"), column)

    def check_text(self, value: Any, column: str) -> str:
        """`value`, which must be a string with more than white space in it."""
        if not isinstance(value, str) or not value.strip():
            raise self.error(column, value, "a non-empty string")
        return value

    def rating(self, value: Any, column: str) -> float | None:
        """A rating on the scale of the source, or of the record where it has a `rating_scale`; None for no rating."""
        try:
            return check_rating(value, self._scale())
        except ValueError as error:
            raise self.error(
                column,
                value,
                str(error),
                "Another scale: add a column rating_scale with [lowest, highest] to the rows, or pass rating_scale=.",
            ) from None

    def _scale(self) -> tuple[float, float]:
        own = self.record.get("rating_scale")
        if own is None:
            return self.scale
        bounds = own if isinstance(own, (list, tuple)) else []
        if len(bounds) != 2 or not all(isinstance(b, (int, float)) and abs(b) <= ANY_SCALE[1] for b in bounds):
            raise self.error("rating_scale", own, "[lowest, highest], two numbers")
        return float(bounds[0]), float(bounds[1])

    def image(self, column: str) -> ImageValue:
        """The image in a column: bytes, a path, or what `datasets` stores."""
        if self.get(column) is None:
            self.require(column, object, "an image")
            raise self.error(column, None, "an image")
        return self.resolve(self.record[column], column)

    def images(self, *columns: str) -> list[ImageValue]:
        """The images in the first of `columns` that is filled: one image or a list; [] where none is filled."""
        for column in columns:
            value = self.get(column)
            if value is None or value == []:
                continue
            if isinstance(value, (list, tuple)):
                return [self.resolve(item, f"{column}[{index}]") for index, item in enumerate(value)]
            return [self.resolve(value, column)]
        return []

    def resolve(self, value: Any, column: str) -> ImageValue:
        try:
            return self.resolver.resolve(value)
        except ImageError as error:
            named = value.get("path") if isinstance(value, Mapping) else value
            if isinstance(named, str) and not named.startswith("data:"):
                self.lacking = named
            raise self.error(column, Found(str(error)), "an image (bytes, or a path below image_root)") from error


class Found(str):
    """Text for the `found` part of an error that is already in words."""

    __slots__ = ()


def short_repr(value: Any, limit: int = 80) -> str:
    """A short repr for error messages."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested, or a number, beyond what Python prints
        text = f"{type(value).__name__} that is nested too deeply, or too large, to be shown"
    return text if len(text) <= limit else f"{type(value).__name__} {text[:limit]}..."
