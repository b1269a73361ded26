"""Images of an item: found through `silkie.data`, sent as base64 data URLs, embedded as bytes."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

from PIL import Image

from silkie.data.images import MAX_PIXELS, ImageError, open_image, read_bytes, readable_formats
from silkie.data.resolver import ImageResolver
from silkie.endpoint.errors import ItemError

# What chat endpoints accept as they are; everything else is sent as PNG.
_SENT_AS_IS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}
_EXIF_ORIENTATION = 0x0112


def load_image(source: Any, *, where: str = "image", max_side: int | None = None) -> Image.Image:
    """RGB pixels of a path, bytes or PIL image, scaled down to `max_side`. Raises ItemError("image")."""
    try:
        image = open_image(source, where=where)
    except ImageError as error:
        raise ItemError("image", str(error)) from error
    if max_side is not None:
        image.thumbnail((max_side, max_side))
    return image


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def encoded_image(source: Any, *, where: str = "image", max_side: int | None = None) -> tuple[bytes, str]:
    """Bytes and MIME type of an image for an endpoint. Raises ItemError("image").

    A JPEG, PNG, WEBP or GIF that is upright and no larger than `max_side` pixels on either side goes out byte for byte;
    anything else is decoded and sent as PNG. A file that is no image is never sent, whatever the item says its path is.
    """
    if not isinstance(source, Image.Image):
        try:
            data = read_bytes(source, where=where)
            with Image.open(io.BytesIO(data), formats=readable_formats()) as header:
                mime = _SENT_AS_IS.get(header.format or "")
                upright = header.getexif().get(_EXIF_ORIENTATION, 1) == 1
                if (
                    mime
                    and upright
                    and math.prod(header.size) <= MAX_PIXELS
                    and (max_side is None or max(header.size) <= max_side)
                ):
                    return data, mime
        except ImageError as error:
            raise ItemError("image", str(error)) from error
        except Exception as error:  # Pillow raises many kinds for damaged files; the decoder below words the error
            load_image(source, where=where)
            raise ItemError("image", f"{where}: {error}") from error
    return _png(load_image(source, where=where, max_side=max_side)), "image/png"


def data_url(source: Any, *, where: str = "image", max_side: int | None = None) -> str:
    """`data:image/...;base64,...` of an image. Raises ItemError("image")."""
    data, mime = encoded_image(source, where=where, max_side=max_side)
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def image_bytes(source: Any, *, where: str = "image") -> bytes:
    """The encoded bytes of an image, as they are on disk where it has any (PNG of a PIL image). Raises
    ItemError("image")."""
    image = load_image(source, where=where)  # a dataset with an unreadable image would only fail later, in training
    return _png(image) if isinstance(source, Image.Image) else read_bytes(source, where=where)


def resolve_image(value: str, image_root: str | Path | None, base: str | Path) -> Any:
    """The image of a record below `image_root` (a directory or zip; default: beside the records file). Raises
    ItemError("image")."""
    resolver = _resolver(None if image_root is None else str(image_root), str(base))
    try:
        return resolver.resolve(value)
    except ImageError as error:
        raise ItemError("image", f"found {error}; expected an image file below {image_root or base}") from error


_resolvers: dict[tuple[str | None, str], ImageResolver] = {}


def _resolver(image_root: str | None, base: str) -> ImageResolver:
    """One resolver per place: it may hold the index of a large directory."""
    key = (image_root, base)
    if key not in _resolvers:
        _resolvers[key] = ImageResolver(*key)
    return _resolvers[key]
