"""Files of JSON lines that are only appended to and survive a kill at any moment: read, cut off a torn end, append.

A kill can leave the beginning of a last line. What to do with it differs: the feedback journal removes it and refuses
damage elsewhere, an evaluation run cuts back to whole batches, and the reference store skips every broken line. These
policies live with their callers; here is what they share.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from silkie.io.files import open_file
from silkie.io.jsonl import MAX_LINE_BYTES, bounded_lines, decode

__all__ = ["Appender", "Entry", "scan", "sync_directory", "truncate"]


class Entry(NamedTuple):
    """One line of a journal: its number (from 1), its JSON object (None: it holds none), whether its line break was
    written, and the offset at which it ends."""

    number: int
    record: dict[str, Any] | None
    ended: bool
    end: int


def scan(path: Path) -> Iterator[Entry]:
    """Every line of a journal, one at a time."""
    with open_file(path) as file:
        for number, line in enumerate(bounded_lines(file, limit=MAX_LINE_BYTES), 1):
            value, _ = decode(line)
            yield Entry(number, value if isinstance(value, dict) else None, line.endswith(b"\n"), file.tell())


def truncate(path: Path, end: int) -> int:
    """Cut a journal off behind byte `end` and write the change to the disk; returns the number of bytes removed."""
    with path.open("r+b") as file:
        removed = file.seek(0, os.SEEK_END) - end
        if removed:
            file.truncate(end)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":  # a whole record whose line break was cut off
                file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())
    return removed


class Appender:
    """Appends to a journal; the file is made if need be, its directory must exist.

    Args:
        path: of the file.
        sync: whether `write` returns only once the lines are on the disk and survive a power cut. Without it they
            survive a kill of the process.
    """

    def __init__(self, path: Path, *, sync: bool) -> None:
        self.path, self.sync = path, sync
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self._descriptor).st_size

    def write(self, lines: bytes) -> None:
        """Append whole lines. Raises OSError naming the file (disk full, ...), after which it ends where it did."""
        before, rest = self.size, memoryview(lines)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            if self.sync:
                os.fsync(self._descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):  # what cannot be written to (a device) may refuse to be cut off, too
                os.ftruncate(self._descriptor, before)
            error.filename = str(self.path)
            raise

    def close(self) -> None:
        os.close(self._descriptor)


def sync_directory(directory: Path) -> None:
    """Make a new or renamed file's name durable (POSIX only: other systems cannot open a directory)."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
