"""Cache keys for work on image files that a dataset refers to by path: the key changes when a file does."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.fingerprint import Hasher

BATCH = 1000  # rows


def fingerprint_of(dataset: datasets.Dataset) -> str:
    """What changes with a dataset's rows and stays over processes. Private in `datasets`, whose cache has it as key."""
    return dataset._fingerprint


def image_fingerprint(dataset: datasets.Dataset, column: str | None, *work: Any) -> str:
    """Fingerprint of `work` (a name and its options) on the images of `dataset`: of its rows, and of size and time of
    every file they name.

    Why: `datasets` keys its cache by the rows alone, so an image that was fixed would still be reported as broken.
    A file that was rewritten with equal size and its old time is not seen (`touch` it). The time of the inode would
    show it, but chmod, a hard link and a copy to a node's own disk (`tar x`, `cp -a`) change that one too, and every
    job that begins with such a copy would decode all images again.
    """
    return Hasher.hash([fingerprint_of(dataset), work, None if column is None else image_stamp(dataset, column)])


def image_stamp(dataset: datasets.Dataset, column: str) -> str:
    """Hash over size and modification time of the files, or of the zip archives, that an image column names."""
    digest, archives = hashlib.blake2b(digest_size=16), {}
    for batch in dataset.select_columns([column]).with_format("arrow").iter(batch_size=BATCH):
        for path in _paths(batch[column]):
            if path.startswith("zip://"):
                archive = path.partition("::")[2]
                if archive not in archives:
                    archives[archive] = _stamp(archive)
            else:
                digest.update(_stamp(path))
    digest.update(repr(archives).encode())
    return digest.hexdigest()


def _paths(column: pa.ChunkedArray) -> Iterator[str]:
    """Paths of the images that have no bytes, from a column of images or of lists of them."""
    while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = pc.list_flatten(column)
    if pa.types.is_struct(column.type) and {"bytes", "path"} <= {field.name for field in column.type}:
        column = pc.struct_field(column, "path").filter(pc.is_null(pc.struct_field(column, "bytes")))
    if pa.types.is_string(column.type):
        yield from (path for path in column.to_pylist() if path is not None)


def _stamp(path: str) -> bytes:
    try:
        status = os.stat(path)
    except OSError:
        return b"missing"
    return f"{status.st_size}:{status.st_mtime_ns};".encode()
