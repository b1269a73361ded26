"""The file behind the image value of a record: found beside the data or below its root, or fetched where asked for."""

from __future__ import annotations

import base64
import io
import os
import posixpath
import time
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any

from PIL import Image

from silkie.data.images import ImageError, is_remote, to_rgb
from silkie.data.schema import DataError, ImageValue
from silkie.io.archives import is_archive, member_info, zip_archive
from silkie.io.files import is_below

MAX_DOWNLOAD_BYTES = 64 * 2**20
MAX_DOWNLOAD_SECONDS = 300.0


def fetch(url: str, *, where: str = "image", timeout: float = 30.0) -> bytes:
    """Download one http(s) image of at most MAX_DOWNLOAD_BYTES within MAX_DOWNLOAD_SECONDS. Raises ImageError.

    timeout: seconds that the server may be silent.
    """
    if not url.lower().startswith(("http://", "https://")):
        raise ImageError(f"{where}: {url!r}: only http and https addresses can be fetched")
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            data, began = bytearray(), time.monotonic()
            while len(data) <= MAX_DOWNLOAD_BYTES and (block := response.read1(2**16)):
                data += block
                if time.monotonic() - began > MAX_DOWNLOAD_SECONDS:
                    raise TimeoutError(f"it takes more than {MAX_DOWNLOAD_SECONDS:g} s")
    except (OSError, HTTPException, ValueError) as error:  # ValueError: an address that is none
        raise ImageError(f"{where}: cannot fetch {url!r}: {error}") from error
    if len(data) > MAX_DOWNLOAD_BYTES:
        raise ImageError(f"{where}: {url!r} is larger than {MAX_DOWNLOAD_BYTES:,} bytes")
    return bytes(data)


class ImageResolver:
    """Finds the file behind the image value of a record.

    Args:
        root: directory or zip file that holds the images; None: the directory of the data file (`base`).
        base: where the data file lies, for relative paths when there is no root.
        allow_remote: fetch http(s) addresses at once and store their bytes, so that training never needs the network.

    Nothing outside the root (`root`, else `base`) is ever read, links followed: a row cannot name a file of this
    machine that the data did not come with. Without either, rows of a loaded dataset may name any regular file.

    A path is looked up as written: in the directory `beside` (of the data file that is being read, in the archive where
    the root is one), then below the root, then by its file name alone (VLFeedback's `img_path` names a directory of its
    authors)."""

    def __init__(self, root: str | None, base: str | None, *, allow_remote: bool = False) -> None:
        self.root = root if root is not None else base
        self.explicit_root = root
        self.beside: str | None = None
        self.allow_remote = allow_remote
        self.is_zip = bool(self.root) and os.path.isfile(self.root or "") and is_archive(self.root or "")
        if root is not None and not os.path.exists(root):
            raise DataError(f"image_root {root!r} does not exist")
        if root is not None and os.path.isfile(root) and not self.is_zip:
            raise DataError(f"image_root {root!r} is a file but not a zip archive; expected a directory or a .zip")
        self._by_name: dict[str, list[str]] | None = None

    def resolve(self, value: Any) -> ImageValue:
        """The stored form of a record's image value. Raises ImageError with what was found."""
        if isinstance(value, Mapping):
            data, path = value.get("bytes"), value.get("path")
            if isinstance(data, (bytes, bytearray)) and isinstance(path, (str, type(None))):
                return {"bytes": bytes(data), "path": path}
            if data is not None:
                raise ImageError(f"an image object of bytes {type(data).__name__!r} and path {type(path).__name__!r}")
            value = path
        if isinstance(value, (bytes, bytearray)):
            return {"bytes": bytes(value), "path": None}
        if isinstance(value, Image.Image):
            buffer = io.BytesIO()
            to_rgb(value).save(buffer, format="PNG")
            return {"bytes": buffer.getvalue(), "path": None}
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str) or not value:
            raise ImageError(f"no image ({value!r})")
        if value.startswith("data:"):
            return {"bytes": _data_uri(value), "path": None}
        if value.startswith("zip://"):
            return {"bytes": None, "path": self._member(value)}
        if is_remote(value):
            if not self.allow_remote:
                raise ImageError(
                    f"remote image {value!r}, refused; pass allow_remote_images=True to fetch it at load time"
                )
            return {"bytes": fetch(value), "path": value}
        return {"bytes": None, "path": self._find(value)}

    def _member(self, address: str) -> str:
        """A `zip://MEMBER::ARCHIVE` address, as stored groups have it, of a member that exists."""
        member, _, archive = address.removeprefix("zip://").partition("::")
        if os.path.exists(archive) and not self._allowed(archive):
            raise ImageError(f"{address!r}, an archive that is {self._outside}")
        try:
            member_info(archive, member)
        except OSError as error:
            raise ImageError(f"{address!r}, which cannot be read: {error}") from error
        return address

    def _allowed(self, path: str) -> bool:
        return self.root is None or is_below(path, self.root)

    @property
    def _outside(self) -> str:
        if self.explicit_root is not None:
            return f"not below image_root {self.explicit_root!r}"
        return f"not below the directory of the data, {self.root!r}; pass image_root=DIRECTORY to read images elsewhere"

    def _find(self, path: str) -> str:
        folders = [folder for folder in (self.beside, "" if self.is_zip else self.root) if folder is not None]
        if self.is_zip:
            assert self.root is not None
            members = zip_archive(self.root).NameToInfo
            candidates = [posixpath.normpath(posixpath.join(folder, path)) for folder in folders]
            member = next(
                (candidate for candidate in [*candidates, path] if candidate in members), None
            ) or self._unique(path)
            return f"zip://{member}::{os.path.abspath(self.root)}"
        if self.root is not None:
            candidates = [os.path.join(folder, name) for folder in folders for name in (path, path.lstrip("/"))]
            found = [candidate for candidate in dict.fromkeys(map(os.path.abspath, candidates)) if _is_file(candidate)]
            if inside := next(filter(self._allowed, found), None):
                return inside
            return self._unique(path, outside=bool(found))
        if _is_file(path):
            return os.path.abspath(path)
        raise ImageError(f"{path!r}, which is not a file here; pass image_root=DIRECTORY_OR_ZIP")

    def _unique(self, path: str, *, outside: bool = False) -> str:
        """Look up by file name alone. `outside`: there is such a file outside the root."""
        name = path.replace("\\", "/").rsplit("/", 1)[-1]
        found = [
            match for match in self._names().get(name, []) if self.is_zip or (_is_file(match) and self._allowed(match))
        ]
        if len(found) == 1:
            return found[0]
        if self.explicit_root is None:
            where, hint = f"beside the data in {self.root!r}", "; pass image_root=DIRECTORY_OR_ZIP"
        else:
            where, hint = f"below image_root {self.root!r}", ""
        if outside and not found and self.explicit_root is None:
            raise ImageError(f"{path!r}, a file that is {self._outside}")
        if not found:
            raise ImageError(f"{path!r}, and no file of that name {where}{hint}")
        raise ImageError(
            f"{path!r}, and {len(found)} files of that name {where} ({', '.join(map(repr, sorted(found)[:3]))}); write"
            f" the paths out{hint}"
        )

    def _names(self) -> dict[str, list[str]]:
        """File name -> paths below the root. Read once, and only when a path does not exist as written."""
        if self._by_name is None:
            self._by_name = {}
            assert self.root is not None
            if self.is_zip:
                members = (name for name in zip_archive(self.root).namelist() if not name.endswith("/"))
            else:
                members = (
                    os.path.abspath(os.path.join(folder, name))
                    for folder, _, names in os.walk(self.root)
                    for name in names
                )
            for member in members:
                self._by_name.setdefault(member.replace("\\", "/").rsplit("/", 1)[-1], []).append(member)
        return self._by_name


def _is_file(path: str) -> bool:
    """False for a name that cannot be one, too (os.path.isfile raises for a NUL on some systems)."""
    try:
        return os.path.isfile(path)
    except ValueError:
        return False


def _data_uri(value: str) -> bytes:
    header, _, payload = value.partition(",")
    if not header.endswith(";base64"):
        raise ImageError(f"a data URI that is not base64 ({header[:40]!r})")
    try:
        return base64.b64decode(payload, validate=True)
    except ValueError as error:
        raise ImageError(f"a data URI whose base64 is broken: {error}") from error
