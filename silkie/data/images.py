"""Images of a preference group: read and decoded only at use, always RGB.

A dataset stores an image as `{"bytes", "path"}` and never as pixels. `path` is a file, or `zip://MEMBER::ARCHIVE` for a
member of a zip file that is read in place. `open_image` is the one place where pixels are made."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from silkie.data.schema import DataError, ImageValue
from silkie.io.archives import member_info, read_member
from silkie.io.files import check_regular, read_file

MAX_PIXELS = 89_478_485  # PIL's own warning limit: a quarter of a GiB as RGB
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
