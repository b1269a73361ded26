"""The one place that opens a file which a user, or a file of a user's, names.

Only regular files are opened (a FIFO or a device, also behind a link, would hang or never end), never more than a limit
is read, and a path that must stay below a folder is compared after its links are followed.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

__all__ = [
    "MAX_DOCUMENT_BYTES",
    "MAX_SETTINGS_BYTES",
    "FileError",
    "check_regular",
    "is_below",
    "open_file",
    "read_file",
]

MAX_DOCUMENT_BYTES = 2 * 2**30  # of a file that is read whole: JSON data, results of a benchmark
MAX_SETTINGS_BYTES = 16 * 2**20  # of a file that people write: YAML, an index, a state file

Name = str | os.PathLike[str]


class FileError(OSError):
    """A file that is not read; the message names it, says why and what to do. An OSError, so that code which handles
    missing files handles these as well."""


def check_regular(path: Name, *, limit: int | None = None) -> os.stat_result:
    """The status of a regular file of at most `limit` bytes, links followed.

    Raises FileError for anything else, and the operating system's own OSError where there is nothing."""
    return _checked(_stat(path), path, limit)


def open_file(path: Name, *, limit: int | None = None) -> BinaryIO:
    """A regular file, open for reading bytes. Raises as `check_regular` does.

    What was opened is checked, not the name: the file may be replaced between two looks at it.
    """
    try:
        # without O_NONBLOCK, opening a FIFO waits for somebody to write to it
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:
        raise _not_a_name(path, error) from None
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise FileError(f"{os.fspath(path)!r} is no regular file") from None
        raise
    try:
        _checked(os.fstat(descriptor), path, limit)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_file(path: Name, *, limit: int = MAX_DOCUMENT_BYTES) -> bytes:
    """The bytes of a regular file. Raises as `check_regular` does; a file that grows while it is read ends at the
    limit, too."""
    with open_file(path, limit=limit) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise _too_large(path, len(data), limit)
    return data


def is_below(path: Name, *roots: Name) -> bool:
    """Whether a path lies in one of some folders (or is one), links followed.

    The hub's cache holds a data set as a folder of links into a folder `blobs` beside it: that one belongs to it.
    """
    real = os.path.realpath(path)
    return any(real == root or real.startswith(root.rstrip(os.sep) + os.sep) for root in map(str, _real_roots(roots)))


def _real_roots(roots: tuple[Name, ...]) -> list[str]:
    found = []
    for root in map(os.path.realpath, roots):
        found.append(root)
        parts = Path(root).parts
        if "snapshots" in parts:
            repository = Path(*parts[: len(parts) - parts[::-1].index("snapshots") - 1])
            if repository.name.startswith(("datasets--", "models--")):
                found.append(str(repository / "blobs"))
    return found


def _stat(path: Name) -> os.stat_result:
    try:
        return os.stat(path)
    except ValueError as error:
        raise _not_a_name(path, error) from None


def _not_a_name(path: Name, error: ValueError) -> FileError:
    """For a name that holds a NUL, or half of a surrogate pair."""
    return FileError(f"{os.fspath(path)!r} cannot name a file: {error}")


def _checked(status: os.stat_result, path: Name, limit: int | None) -> os.stat_result:
    if not stat.S_ISREG(status.st_mode):
        raise FileError(
            f"{os.fspath(path)!r} is {_kind(status.st_mode)}, not a regular file; copy what it holds into one"
        )
    if limit is not None and status.st_size > limit:
        raise _too_large(path, status.st_size, limit)
    return status


def _too_large(path: Name, size: int, limit: int) -> FileError:
    return FileError(f"{os.fspath(path)!r} is {size:,} bytes, more than the {limit:,} allowed")


def _kind(mode: int) -> str:
    kinds = {
        "a directory": stat.S_ISDIR,
        "a FIFO": stat.S_ISFIFO,
        "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
        "a socket": stat.S_ISSOCK,
    }
    return next((name for name, test in kinds.items() if test(mode)), "something special")
