"""An append-only journal of JSON lines that survives a kill at any moment.

A record is finished once its line has been written and flushed to the disk (`fsync`). Records that arrive while
a flush is under way go out together in the next one, so that the disk does not limit the number of calls. One process
writes a journal at a time; a second one gets an error instead of a mixed file.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from silkie.io.files import open_file
from silkie.io.journal import Appender, scan, sync_directory, truncate

logger = logging.getLogger(__name__)

Record = dict[str, Any]


class JournalError(RuntimeError):
    """A journal that cannot be used; the message says why and what to do."""


def encode_line(record: Mapping[str, Any]) -> bytes:
    """One JSON line. Half of a surrogate pair (models do emit them) is escaped rather than lost."""
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(record, allow_nan=False).encode() + b"\n"


def read_journal(path: str | Path) -> Iterator[Record]:
    """The records of a journal, in order. A torn last line is skipped; a broken line elsewhere raises JournalError
    with its number."""
    for record, _ in _scan(Path(path)):
        yield record


def _scan(path: Path) -> Iterator[tuple[Record, int]]:
    """Every record with the offset at which its line ends. A record without its line break is whole: its JSON object is
    closed."""
    broken: int | None = None
    for entry in scan(path):
        if broken is not None:
            raise JournalError(
                f"{path}: line {broken} is not a JSON object, and more lines follow. Journals are only appended to, so"
                " something else changed this file: restore it, or remove that line"
            )
        if entry.record is None:
            broken = entry.number
        else:
            yield entry.record, entry.end


def record_offsets(path: str | Path) -> dict[str, int]:
    """Where the last line of every id begins."""
    offsets: dict[str, int] = {}
    begin = 0
    for record, end in _scan(Path(path)):
        if "id" not in record:
            raise JournalError(
                f"{path}: the line at byte {begin} is no rating: not the journal of `rate`; pass another file"
            )
        offsets[str(record["id"])] = begin
        begin = end
    return offsets


class Journal:
    """The journal of one run; use as a context manager.

    Args:
        path: the file; its directory is made if need be. `path` + ".lock" guards it.
        on_record: called with every record that is already there, oldest first. Keep what you need of it: the journal
            keeps nothing.
    """

    def __init__(self, path: str | Path, *, on_record: Callable[[Record], None] | None = None) -> None:
        self.path = Path(path)
        self._on_record = on_record or (lambda record: None)
        self._lock = FileLock(str(self.path) + ".lock")
        self._file: Appender | None = None
        self._pending: list[tuple[bytes, asyncio.Future[None]]] = []
        self._flusher: asyncio.Task[None] | None = None

    def __enter__(self) -> Journal:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise JournalError(
                f"{self.path}: another process is writing this journal (it holds {self.path}.lock). Wait for it, or"
                " pass another journal."
            ) from error
        try:
            self._recover()
            self._file = Appender(self.path, sync=True)
            sync_directory(self.path.parent)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the file and its lock back; may be called again."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._lock.release()

    async def append(self, record: Mapping[str, Any]) -> None:
        """Write a record; returns once it is on the disk. Raises OSError (disk full, ...), after which the file ends at
        a whole line."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending.append((encode_line(record), future))
        if self._flusher is None:
            self._flusher = asyncio.create_task(self._flush())
        await asyncio.shield(future)

    async def _flush(self) -> None:
        while self._pending:
            batch, self._pending = self._pending, []
            try:
                await asyncio.to_thread(self._write, b"".join(line for line, _ in batch))
            except Exception as error:  # whoever waits must hear of it
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            else:
                for _, future in batch:
                    if not future.done():
                        future.set_result(None)
        self._flusher = None

    def _write(self, data: bytes) -> None:
        if self._file is None:
            raise JournalError(f"{self.path}: the journal is closed")
        self._file.write(data)

    def _recover(self) -> None:
        """Report every whole record, and remove what a kill or a power cut left of a last line."""
        if not self.path.exists():
            return
        end = 0
        for number, (record, end) in enumerate(_scan(self.path), 1):  # noqa: B007  (the last offset is what counts)
            try:
                self._on_record(record)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise JournalError(
                    f"{self.path}: line {number} is a JSON object of another kind ({error!r}): not the journal of such"
                    " a run. Pass another file"
                ) from error
        if not end and _first_line(self.path).strip(b"\0\n")[:1] not in (b"", b"{"):
            raise JournalError(f"{self.path} is not a journal: it holds no JSON line; pass another file")
        if torn := truncate(self.path, end):
            logger.warning(
                "%s: truncated an incomplete last line (%d bytes); its item will be retried", self.path, torn
            )


def _first_line(path: Path) -> bytes:
    with open_file(path) as file:
        return file.readline(2**16)
