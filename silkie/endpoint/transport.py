"""What an endpoint may send: no more than a limit, unpacked, and nothing that sends a prompt to another host.

The client's own HTTP library unpacks a megabyte of gzip into gigabytes before anybody can look, and follows 307 and 308
with the whole request."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import openai

__all__ = ["MAX_BODY_BYTES", "BodyTooLarge", "OtherHost", "guarded_client"]

MAX_BODY_BYTES = 8 * 2**20  # of an answer, unpacked; the longest answers of models are a few hundred kilobytes
_BLOCK = 2**16
_GZIP_OR_ZLIB = 47  # zlib's name for "look at the header"


class BodyTooLarge(Exception):
    """A body that is larger than allowed, or packed in a way that cannot be bounded."""


class OtherHost(Exception):
    """A redirect to another host."""


def guarded_client(base_url: str, **options: Any) -> Any:
    """The client's own asynchronous HTTP client with two checks of ours: `options` are its arguments."""
    return openai.DefaultAsyncHttpxClient(
        event_hooks={"request": [_same_host(base_url)], "response": [_bounded]},
        headers={"accept-encoding": "identity"},
        **options,
    )


def _same_host(base_url: str) -> Callable[[Any], Any]:
    """Called before every request, those of a redirect included."""
    home = urlsplit(base_url)

    async def check(request: Any) -> None:
        there = urlsplit(str(request.url))
        same = there.hostname == home.hostname and _port(there) == _port(home) and there.scheme == home.scheme
        upgraded = there.hostname == home.hostname and (home.scheme, there.scheme) == ("http", "https")
        if not (same or upgraded):
            raise OtherHost(f"{there.scheme}://{there.netloc}")

    return check


def _port(parts: Any) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


async def _bounded(response: Any) -> None:
    """Called before the body is read: puts a stream that counts and unpacks in the place of the response's own."""
    packed = response.headers.get("content-encoding", "identity").strip().lower()
    if packed not in ("identity", "", "gzip", "x-gzip", "deflate"):
        await response.aclose()
        raise BodyTooLarge(f"a body packed with {packed[:40]!r}, which was not asked for")
    if "content-encoding" in response.headers:
        del response.headers["content-encoding"]
    unpacker = zlib.decompressobj(_GZIP_OR_ZLIB) if packed not in ("identity", "") else None
    response.stream = _stream_class()(response.stream, unpacker)


def _stream_class() -> type:
    """A stream of the HTTP library that `openai` brings (it has changed before)."""
    library: Any = importlib.import_module(openai.DefaultAsyncHttpxClient.__mro__[1].__module__.split(".")[0])
    base: Any = library.AsyncByteStream

    class Bounded(base):
        def __init__(self, stream: Any, unpacker: Any) -> None:
            self.stream, self.unpacker = stream, unpacker

        async def __aiter__(self) -> AsyncIterator[bytes]:
            total = 0
            async for block in self.stream:
                for part in self.unpacked(block):
                    total += len(part)
                    if total > MAX_BODY_BYTES:
                        raise BodyTooLarge(f"a body of more than {MAX_BODY_BYTES:,} bytes")
                    yield part

        def unpacked(self, block: bytes) -> Any:
            if self.unpacker is None:
                yield block
                return
            try:
                while block:
                    yield self.unpacker.decompress(block, _BLOCK)
                    block = self.unpacker.unconsumed_tail
            except zlib.error as error:
                raise BodyTooLarge(f"a body that cannot be unpacked: {error}") from error

        async def aclose(self) -> None:
            await self.stream.aclose()

    return Bounded
