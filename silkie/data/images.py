"""Images of a preference group: found lazily, decoded only at use, always RGB.

A dataset stores an image as `{"bytes", "path"}` and never as pixels. `path` is a file, or `zip://MEMBER::ARCHIVE` for a
member of a zip file that is read in place. `open_image` is the one place where pixels are made."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import posixpath
import struct
import time
import urllib.request
import warnings
from collections.abc import Mapping
from functools import cache
from http.client import HTTPException
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from silkie.data.schema import DataError, ImageValue
from silkie.io.archives import is_archive, member_info, read_member, zip_archive
from silkie.io.files import check_regular, is_below, read_file

MAX_PIXELS = 89_478_485  # PIL's own warning limit: a quarter of a GiB as RGB
MAX_DOWNLOAD_BYTES = 64 * 2**20
MAX_DOWNLOAD_SECONDS = 300.0
MAX_FILE_BYTES = 512 * 2**20  # of an encoded image; a member of a zip file can unpack to a thousand times its size
REMOTE_SCHEMES = ("http://", "https://", "ftp://", "s3://", "gs://", "hf://")
BACKGROUND = (255, 255, 255)
# What pictures of data sets are stored in. Pillow knows more: it hands EPS to Ghostscript, and the rarely used decoders
# are the ones that nobody has looked at.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "ICO", "JPEG2000", "PPM", "TGA")
# What Pillow's decoders raise for damaged files, found by damaging files of every format; UnidentifiedImageError is an
# OSError.
DECODER_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    RuntimeError,
    LookupError,
    ArithmeticError,
    EOFError,
    MemoryError,
    struct.error,
    Image.DecompressionBombError,
)


class ImageError(DataError):
    """An image cannot be found or decoded."""


def open_image(value: Any, *, where: str = "image", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one image to RGB, upright, on a white background.

    Args:
        value: `{"bytes", "path"}` (a row's image), a path, encoded bytes, or a PIL image.
        where: named in every error, for example "row 12, image 0".
        max_pixels: larger images are refused before they are decoded (decompression bombs).

    EXIF orientation is applied; palettes, alpha, CMYK and 16-bit greys come out as the colours a viewer shows. Raises
    ImageError."""
    if isinstance(value, Image.Image):
        return to_rgb(value, where=where)
    data = read_bytes(value, where=where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check below is the stricter one
            image = Image.open(io.BytesIO(data), formats=readable_formats())
    except Image.DecompressionBombError as error:
        raise ImageError(f"{where}: {_describe(value)} is a decompression bomb: {error}") from error
    except DECODER_ERRORS as error:
        raise ImageError(
            f"{where}: {_describe(value)} is not an image that Pillow can read ({len(data)} bytes; read are"
            f" {', '.join(readable_formats())})"
        ) from error
    check_pixels(image.size, value, where, max_pixels)
    try:
        image.load()
    except DECODER_ERRORS as error:
        raise ImageError(f"{where}: {_describe(value)} is truncated or corrupt: {error}") from error
    return to_rgb(image, where=where)


@cache
def readable_formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow can read."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def check_pixels(size: tuple[int, int], value: Any, where: str, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse an image before it is decoded. Raises ImageError."""
    width, height = size
    if width * height > max_pixels:
        raise ImageError(
            f"{where}: {_describe(value)} would decode to {width} x {height} pixels, more than the {max_pixels:,}"
            " allowed; a decompression bomb, or an image to shrink first"
        )


def to_rgb(image: Image.Image, *, where: str = "image") -> Image.Image:
    """A PIL image of any mode as RGB: EXIF orientation applied, transparency over white, 16-bit greys scaled to 8
    bits."""
    image = _upright(image)
    if image.mode == "I" or image.mode == "F" or image.mode.startswith("I;16"):
        return _deep_grey_to_rgb(image, where)
    if image.has_transparency_data:
        return _over_background(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF blocks written by cameras are broken in many ways; the pixels are fine without them
        return image


def _over_background(image: Image.Image) -> Image.Image:
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    canvas = Image.new("RGB", rgba.size, BACKGROUND)
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    return canvas


def _deep_grey_to_rgb(image: Image.Image, where: str) -> Image.Image:
    """16-bit, 32-bit and float greys: PIL's own convert() clips them at 255, which turns most of the image white."""
    pixels = np.asarray(image).astype(np.float64)
    low, high = float(pixels.min()), float(pixels.max())  # NaN where any pixel is
    if image.mode.startswith("I;16") or (image.mode == "I" and 255 < high <= 65535 and low >= 0):
        pixels = pixels / 257.0
    elif image.mode == "F" and low >= 0 and high <= 1:
        pixels = pixels * 255.0
    elif not (low >= 0 and high <= 255):
        raise ImageError(
            f"{where}: pixel values from {low:g} to {high:g} in mode {image.mode!r}: no known scale; save the image"
            " with 8 or 16 bits"
        )
    return Image.fromarray(np.rint(pixels).astype(np.uint8)).convert("RGB")


def read_bytes(value: Any, *, where: str = "image") -> bytes:
    """The encoded bytes of an image value, without decoding them. Raises ImageError."""
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        if data is None and path is None:
            raise ImageError(f"{where}: the image has neither bytes nor a path")
        value = data if data is not None else path
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, (str, os.PathLike)):
        return _read_path(os.fspath(value), where)
    raise ImageError(
        f'{where}: found {type(value).__name__}, expected {{"bytes", "path"}}, a path, bytes or a PIL image'
    )


def encoded_size(value: ImageValue, *, where: str = "image") -> int:
    """Bytes of an encoded image, found without reading it. Raises ImageError."""
    data, path = value.get("bytes"), value.get("path")
    if data is not None or path is None or is_remote(path):
        return len(read_bytes(value, where=where))
    try:
        return _path_size(path, where)
    except OSError as error:
        raise ImageError(f"{where}: cannot read {path!r}: {error}") from error


def _path_size(path: str, where: str) -> int:
    """Raises ImageError where a file is too large to be an image."""
    if path.startswith("zip://"):
        member, _, archive = path.removeprefix("zip://").partition("::")
        size = member_info(archive, member).file_size
    else:
        size = check_regular(path).st_size
    check_file_size(size, path, where)
    return size


def _read_path(path: str, where: str) -> bytes:
    if is_remote(path):
        raise ImageError(
            f"{where}: {path!r} is a remote address; load the data with allow_remote_images=True to fetch such images"
            " once, at load time"
        )
    try:
        _path_size(path, where)
        if path.startswith("zip://"):
            member, _, archive = path.removeprefix("zip://").partition("::")
            return read_member(archive, member, limit=MAX_FILE_BYTES)
        return read_file(path, limit=MAX_FILE_BYTES)
    except OSError as error:
        raise ImageError(f"{where}: cannot read {path!r}: {error}") from error


def check_file_size(size: int, path: str, where: str) -> None:
    """Refuse a file before it is read. Raises ImageError."""
    if size > MAX_FILE_BYTES:
        raise ImageError(
            f"{where}: {path!r} is {size:,} bytes, more than the {MAX_FILE_BYTES:,} allowed; a zip bomb, or not an"
            " image"
        )


def image_size(value: Any, *, where: str = "image") -> tuple[int, int]:
    """(width, height) from the header of an encoded image, as stored (before EXIF rotation). Raises ImageError, for
    bombs as well."""
    if isinstance(value, Image.Image):
        return value.size
    path = value.get("path") if isinstance(value, Mapping) and value.get("bytes") is None else None
    file = path if isinstance(path, str) and not path.startswith("zip://") and not is_remote(path) else None
    try:
        if file is not None:
            check_regular(file)  # the header alone is read, by Pillow
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            source = io.BytesIO(read_bytes(value, where=where)) if file is None else file
            with Image.open(source, formats=readable_formats()) as image:
                size = image.size
        check_pixels(size, value, where)
    except ImageError:
        raise
    except DECODER_ERRORS as error:
        raise ImageError(f"{where}: {_describe(value)} is not an image that Pillow can read: {error}") from error
    return size


def image_digest(value: Any, *, where: str = "image") -> str:
    """Hash of an image's encoded bytes: equal for the same file under two names, and no pixel is decoded."""
    if isinstance(value, Image.Image):
        return hashlib.blake2b(repr((value.mode, value.size)).encode() + value.tobytes(), digest_size=16).hexdigest()
    return hashlib.blake2b(read_bytes(value, where=where), digest_size=16).hexdigest()


def is_remote(path: str) -> bool:
    return path.lower().startswith(REMOTE_SCHEMES)


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


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        value = value.get("path") or "embedded bytes"
    return (
        repr(value)
        if isinstance(value, str) and value != "embedded bytes"
        else "embedded image"
        if not isinstance(value, os.PathLike)
        else repr(str(value))
    )
