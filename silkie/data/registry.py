"""Sources: one small adapter per data format, found by hub name or by the columns of the first record.

A new format is one function that turns a record into a `Group`:

    from silkie.data import Group, Row, register_source, user_turn

    @register_source("my-format", detect=lambda record: {"picture", "better", "worse"} <= record.keys())
    def my_format(row: Row) -> Group:
        return Group(
            images=[row.image("picture")],
            prompt=[user_turn(row.text("question"), n_images=1)],
            responses=[row.text("better"), row.text("worse")],
            pairs=[(0, 1)],
        )

`Row` checks what it hands out: a missing column, an empty text or an absent image becomes an error that names the
source, the row, the column, what was found and what was expected.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from silkie.data.images import ImageError, ImageResolver
from silkie.data.pairs import ANY_SCALE, check_rating
from silkie.data.schema import DataError, Group, ImageValue, RowError

Record = Mapping[str, Any]
Adapter = Callable[["Row"], Group]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A registered data format.

    Attributes:
        name: what `source_format=` takes.
        adapt: record -> group.
        detect: True for a record of this format (its keys are the columns).
        hub_names: dataset names on the hub that have this format.
        aspects: record -> names of the rating aspects in it, for formats with ratings.
        scale: worst and best rating of the format; ratings outside are refused. A record's own `rating_scale` wins.
        pair_rows: a record is one pair, so that records of the same image and prompt can be regrouped.
    """

    name: str
    adapt: Adapter
    detect: Callable[[Record], bool]
    hub_names: tuple[str, ...] = ()
    aspects: Callable[[Record], Iterable[str]] | None = None
    pair_rows: bool = True
    scale: tuple[float, float] = ANY_SCALE


SOURCES: dict[str, Source] = {}


def register_source(
    name: str,
    *,
    detect: Callable[[Record], bool],
    hub_names: Sequence[str] = (),
    aspects: Callable[[Record], Iterable[str]] | None = None,
    pair_rows: bool = True,
    scale: tuple[float, float] = ANY_SCALE,
) -> Callable[[Adapter], Adapter]:
    """Decorator that adds an adapter to the registry. Registering a name again replaces it (a notebook cell may run
    twice)."""

    def register(adapt: Adapter) -> Adapter:
        SOURCES[name] = Source(
            name=name,
            adapt=adapt,
            detect=detect,
            hub_names=tuple(hub_names),
            aspects=aspects,
            pair_rows=pair_rows,
            scale=scale,
        )
        return adapt

    return register


def source_for_hub_name(name: str) -> Source | None:
    """The source that lists this hub name, without regard to case."""
    return next((source for source in SOURCES.values() if name.casefold() in map(str.casefold, source.hub_names)), None)


def detect_source(record: Record, where: str) -> Source:
    """The one source whose schema a record has. Raises DataError where there is none, or more than one."""
    matches = [source for source in SOURCES.values() if source.detect(record)]
    if len(matches) == 1:
        return matches[0]
    columns = ", ".join(map(repr, record)) or "none"
    if matches:
        names = ", ".join(source.name for source in matches)
        raise DataError(
            f"{where}: its columns ({columns}) fit several formats: {names}. Pass source_format=NAME to choose one."
        )
    raise DataError(
        f"{where}: no known format has its columns ({columns}). Known formats: {', '.join(SOURCES)}. Pass"
        " source_format=NAME,"
        " rename the columns to prompt / chosen / rejected / image, or register a source of your own"
        " (silkie.data.register_source)."
    )


def get_source(name: str) -> Source:
    if name not in SOURCES:
        raise DataError(f"source_format={name!r} is not known; choose from {', '.join(SOURCES)}")
    return SOURCES[name]


def code_digest(source: Source | None = None, *, folders: Sequence[Path] = ()) -> str:
    """Hash of silkie's data code, of further code `folders` and of a source of the user's own, so that what an older
    version has cached is not reused."""
    digest = hashlib.blake2b(digest_size=8)
    room = Path(__file__).parent
    for file in (file for folder in (room, room.parent / "io", *folders) for file in sorted(folder.rglob("*.py"))):
        digest.update(file.read_bytes())
    if source is not None:
        with contextlib.suppress(
            OSError, TypeError
        ):  # typed at a prompt, or a callable object: the settings hashed beside this hold it
            digest.update(inspect.getsource(source.adapt).encode())
    return digest.hexdigest()


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
