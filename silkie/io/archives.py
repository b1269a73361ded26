"""Members of zip archives, read in place. What a member unpacks to is bounded, and every way in which an archive can be
damaged or hostile is one `ArchiveError`."""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO

from silkie.io.files import FileError, check_regular

__all__ = ["MAX_RATIO", "ArchiveError", "is_archive", "open_member", "read_member", "zip_archive"]

MAX_RATIO = 200  # unpacked to packed; text packs to a twentieth, deflate cannot do more than 1,032
FREE_RATIO_BYTES = 64 * 2**20  # up to this size a member may unpack to anything: it fits in memory
# bz2 and lzma unpack a whole block for the first byte of it, so that reading them cannot be bounded
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# What zipfile raises for damaged, encrypted and unknown members.
_DAMAGE = (zipfile.BadZipFile, RuntimeError, LookupError, ValueError, EOFError, struct.error, zlib.error, OverflowError)


class ArchiveError(FileError):
    """An archive, or a member of one, that cannot be read."""


_archives: dict[str, tuple[tuple[int, ...], zipfile.ZipFile]] = {}
_archives_lock = threading.Lock()


def is_archive(path: str) -> bool:
    """Whether a regular file is a zip archive."""
    check_regular(path)
    return zipfile.is_zipfile(path)


def zip_archive(path: str) -> zipfile.ZipFile:
    """An open zip file, kept per process: reading a large archive's index takes seconds, and a file offset must not be
    shared by a fork.

    A file that was replaced or changed since is opened again. Raises ArchiveError.
    """
    status = check_regular(path)
    stamp = (os.getpid(), status.st_ino, status.st_size, status.st_mtime_ns)
    with _archives_lock:
        known, archive = _archives.get(path, (None, None))
        if archive is None or known != stamp:
            with _damage(path):
                archive = zipfile.ZipFile(path)
            _archives[path] = (stamp, archive)
        return archive


def member_info(path: str, member: str, *, limit: int | None = None) -> zipfile.ZipInfo:
    """A member that may be read. Raises ArchiveError."""
    archive = zip_archive(path)
    with _damage(path, member):
        info = archive.getinfo(member)
    if info.compress_type not in METHODS:
        known = {zipfile.ZIP_BZIP2: "bzip2", zipfile.ZIP_LZMA: "lzma"}
        method = known.get(info.compress_type, f"method {info.compress_type}, which is not known")
        raise ArchiveError(
            f"{path!r}, member {member!r} is packed with {method}; pack it with deflate, or without compression"
        )
    if limit is not None and info.file_size > limit:
        raise ArchiveError(
            f"{path!r}, member {member!r} is {info.file_size:,} bytes, more than the {limit:,} allowed; a zip bomb?"
        )
    if info.file_size > max(FREE_RATIO_BYTES, MAX_RATIO * info.compress_size):
        raise ArchiveError(
            f"{path!r}, member {member!r} unpacks from {info.compress_size:,} to {info.file_size:,} bytes, more than"
            f" {MAX_RATIO} times its size: a zip bomb? Unpack it, if you trust it, and pass the file"
        )
    return info


def read_member(path: str, member: str, *, limit: int) -> bytes:
    """The whole of a member. Raises ArchiveError."""
    info = member_info(path, member, limit=limit)
    with _damage(path, member):
        return zip_archive(path).read(info)


@contextlib.contextmanager
def open_member(path: str, member: str) -> Iterator[IO[bytes]]:
    """A member, open for reading bytes. Raises ArchiveError, also where the damage is found while it is read."""
    info = member_info(path, member)
    with _damage(path, member), zip_archive(path).open(info) as file:
        yield file


@contextlib.contextmanager
def _damage(path: str, member: str | None = None) -> Iterator[None]:
    try:
        yield
    except FileError:
        raise
    except (*_DAMAGE, OSError) as error:  # OSError: an offset before the beginning of the file, say
        what = repr(path) if member is None else f"{path!r}, member {member!r}"
        raise ArchiveError(f"{what} cannot be read: {str(error) or type(error).__name__}") from error
