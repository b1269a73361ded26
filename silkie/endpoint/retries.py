"""When to repeat a call that failed, and when to give up. The retry loop is tenacity's."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from silkie.endpoint.errors import ItemError

__all__ = ["TRANSPORT_KINDS", "RetryPolicy", "Transient", "TransportError", "retry_after_seconds", "with_retries"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When to give up on a call.

    attempts: tries in all when the server fails (5xx), drops the connection or cannot be reached. timeout_attempts:
    tries in all of a call that hangs (each costs `timeout` seconds, and may have been paid for). rate_limit_seconds:
    how long a call waits in all for a server that answers 429; one that asks for a longer wait stops the run.
    rate_limit_attempts: tries in all of a call that gets nothing but 429 (some servers answer so to a request that is
    larger than their limit; about four minutes with the waits below). first_wait, longest_wait: exponential backoff
    with full jitter, in seconds; a Retry-After that asks for more wins."""

    attempts: int = 6
    timeout_attempts: int = 3
    rate_limit_seconds: float = 900.0
    rate_limit_attempts: int = 20
    first_wait: float = 0.5
    longest_wait: float = 30.0


TRANSPORT_KINDS = frozenset({"timeout", "connection", "server_error", "rate_limited"})


class TransportError(ItemError):
    """No answer, after all retries: kind is one of TRANSPORT_KINDS. Nothing was answered, so nothing
    usable was paid for."""


class Transient(Exception):
    """A failed attempt that may be repeated. `retry_after` is what the server asked for, in seconds."""

    def __init__(self, kind: str, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.kind, self.retry_after = kind, retry_after


def retry_after_seconds(headers: Mapping[str, str], now: float | None = None) -> float:
    """Seconds that `retry-after-ms` or `Retry-After` (seconds or an HTTP date) ask to wait; 0 where there is none that
    can be read."""
    try:
        return max(0.0, float(headers["retry-after-ms"]) / 1000)
    except (KeyError, ValueError):
        pass
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - (time.time() if now is None else now))
    except (TypeError, ValueError):
        return 0.0


async def with_retries(
    attempt: Callable[[], Awaitable[T]], policy: RetryPolicy, sleep: Callable[[float], Awaitable[None]]
) -> T:
    """What `attempt` returns in the end.

    Args:
        attempt: one try; raises `Transient` where it may be repeated, and anything else where not.
        sleep: waits between two tries.

    Raises:
        TransportError: no answer after all retries.
    """
    counts = {"attempts": 0, "timeout": 0, "rate_limited": 0}
    began = time.monotonic()
    backoff = wait_random_exponential(multiplier=policy.first_wait, max=policy.longest_wait)

    def wait(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.retry_after if isinstance(error, Transient) else 0.0
        jitter = backoff(state)
        # a little more than asked, and not all clients at the same moment
        return max(asked + min(jitter, 0.1 * asked + 0.05), jitter) if asked else jitter

    def stop(state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        assert isinstance(error, Transient)
        # 429 says "later", not "broken": it is waited out by time and does not use up the other attempts
        if error.kind == "rate_limited":
            counts["rate_limited"] += 1
            waited = time.monotonic() - began
            return (
                waited + error.retry_after > policy.rate_limit_seconds
                or counts["rate_limited"] >= policy.rate_limit_attempts
            )
        counts["attempts"] += 1
        counts["timeout"] += error.kind == "timeout"
        return counts["attempts"] >= policy.attempts or counts["timeout"] >= policy.timeout_attempts

    retrying = AsyncRetrying(sleep=sleep, wait=wait, stop=stop, retry=retry_if_exception_type(Transient), reraise=True)
    try:
        return await retrying(attempt)
    except Transient as error:
        tries = (
            f"after {counts['attempts']} attempts" if counts["attempts"] else f"after {time.monotonic() - began:.0f} s"
        )
        raise TransportError(error.kind, f"{error} ({tries})") from error
