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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from silkie.data.pairs import ANY_SCALE
from silkie.data.row import Record, Row
from silkie.data.schema import DataError, Group

Adapter = Callable[[Row], Group]


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
        # Typed at a prompt, or a callable object: the settings hashed beside this hold it
        with contextlib.suppress(OSError, TypeError):
            digest.update(inspect.getsource(source.adapt).encode())
    return digest.hexdigest()
