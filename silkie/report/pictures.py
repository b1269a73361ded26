"""Images inside the page: small, encoded once each, as data URIs."""

from __future__ import annotations

import base64
import hashlib
import io
from typing import Any

__all__ = ["PictureBook"]

LONGEST_SIDE = 420


class PictureBook:
    """Turns images into data URIs; an image that is used again is recognised by its content."""

    def __init__(self, longest_side: int = LONGEST_SIDE) -> None:
        self.longest_side = longest_side
        self.uris: dict[str, str] = {}

    def add(self, image: Any, *, where: str = "image") -> str:
        """The key in `uris` of an image in any form that `open_image` takes. Small flat pictures stay PNG; photographs
        become JPEG. Raises ImageError naming `where`."""
        from silkie.data.images import open_image

        picture = open_image(image, where=where)
        picture.thumbnail((self.longest_side, self.longest_side))
        png = _encoded(picture, "PNG", optimize=True)
        jpeg = _encoded(picture, "JPEG", quality=85)
        data, kind = (png, "png") if len(png) <= len(jpeg) else (jpeg, "jpeg")
        key = hashlib.sha256(data).hexdigest()[:12]
        self.uris.setdefault(key, f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}")
        return key


def _encoded(picture: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()
