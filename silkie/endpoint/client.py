"""One OpenAI-compatible chat endpoint: what each of its failures means, and which optional parameters it takes.

The transport is `openai.AsyncOpenAI` with its own retries off, because a run must know of every attempt
(`silkie.endpoint.retries`)."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote, urlsplit

import openai

from silkie.endpoint.budget import Prices
from silkie.endpoint.errors import AnswerError, ItemError, StopRun, Usage, whole_text
from silkie.endpoint.retries import RetryPolicy, Transient, TransportError, retry_after_seconds, with_retries
from silkie.endpoint.transport import BodyTooLarge, OtherHost, guarded_client

logger = logging.getLogger(__name__)

KEY_VARIABLES = ("SILKIE_API_KEY", "OPENAI_API_KEY")
MOST_TOKENS = 10**9  # of one call; a larger count is none
_NO_KEY = "none"  # local servers ignore it, and the client insists on one
# Shorter ones ("x", "EMPTY", "test") are words given to servers that ask for none, and may stand in any answer
_SHORTEST_KEY = 8


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """The text of an answer and what it used. Truncated and refused answers never get here: they raise AnswerError."""

    text: str
    usage: Usage


# Optional parameters, in the order in which they are given up when a server answers 400 or 422, and what replaces them.
_OPTIONAL: tuple[tuple[str, str | None], ...] = (
    ("response_format", None),
    ("seed", None),
    ("max_tokens", "max_completion_tokens"),
    ("temperature", None),
)


def api_key_from_environment(variable: str | None = None) -> str:
    """The key in `variable`, or in the first of KEY_VARIABLES that is set; a placeholder where there is none (local
    servers need no key).

    Raises ValueError where a variable was named and is not set.
    """
    if variable is not None and not os.environ.get(variable):
        raise ValueError(f"the environment variable {variable} is not set; expected the endpoint's API key in it")
    names = (variable,) if variable is not None else KEY_VARIABLES
    return next((os.environ[name] for name in names if os.environ.get(name)), _NO_KEY)


class Endpoint:
    """A model behind an OpenAI-compatible `/chat/completions`.

    Args:
        base_url: for example http://localhost:8000/v1. Where it has no path and the server knows no /chat/completions,
            /v1 is tried.
        model: the name the server knows it by.
        timeout: seconds for one call, connection and reading included.
        prices: to fill in costs.
        key_variable: environment variable that holds the key; default the first of KEY_VARIABLES that is set.
        sleep: waits between attempts; a run passes one that raises StopRun when the run is asked to stop.
        extra_body: further request fields that this server understands.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        timeout: float = 60.0,
        retries: RetryPolicy | None = None,
        prices: Prices | None = None,
        key_variable: str | None = None,
        connections: int = 64,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"base URL {base_url!r}: expected http:// or https:// and a host, for example http://localhost:8000/v1"
            )
        if parts.username or parts.password:
            raise ValueError(
                "the base URL holds a user name or password; pass a key in the environment instead (SILKIE_API_KEY)"
            )
        self.model, self.timeout, self.sleep = model, timeout, sleep
        self.retries = retries or RetryPolicy()
        self.prices = prices or Prices()
        self.extra_body = dict(extra_body or {})
        self._key = api_key_from_environment(key_variable)
        self._unsupported: set[str] = set()
        self._structured_works = False
        self._base_url = base_url.rstrip("/").removesuffix("/chat/completions")
        self._local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        self._connections = connections
        self._opened: tuple[asyncio.AbstractEventLoop, openai.AsyncOpenAI] | None = None

    @property
    def _client(self) -> openai.AsyncOpenAI:
        """The client of the running event loop: its connections live and die with one, an endpoint may be used in
        several."""
        loop = asyncio.get_running_loop()
        if self._opened is None or self._opened[0] is not loop:
            http_client = guarded_client(
                self._base_url,
                trust_env=not self._local,  # a proxy of the environment cannot reach a server on this machine
                timeout=self.timeout,
                limits=_limits(self._connections),
            )
            client = openai.AsyncOpenAI(
                base_url=self._base_url, api_key=self._key, max_retries=0, timeout=self.timeout, http_client=http_client
            )
            self._opened = (loop, client)
        return self._opened[1]

    async def close(self) -> None:
        """Close the connections of the running event loop; a later call opens new ones."""
        if self._opened is not None and self._opened[0] is asyncio.get_running_loop():
            await self._opened[1].close()
            self._opened = None

    def supports(self, parameter: str) -> bool:
        """False once the server has refused an optional parameter and taken the same request without it."""
        return parameter not in self._unsupported

    def redact(self, text: str) -> str:
        """`text` without the key, should a server echo it: as it is, or as JSON, Python or an address write it. Redact
        before cutting: half of a key is not found any more."""
        if self._key == _NO_KEY or len(self._key) < _SHORTEST_KEY:
            return text
        written = {self._key, json.dumps(self._key)[1:-1], repr(self._key)[1:-1], quote(self._key, safe="")}
        written.add(json.dumps(self._key)[1:-1].replace("/", "\\/"))
        for form in sorted(written, key=len, reverse=True):
            text = text.replace(form, "[key]")
        return text

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], *, keep_truncated: bool = False, **parameters: Any
    ) -> ChatAnswer:
        """One answer. Optional parameters that the server refuses are given up, once and for all, if the request works
        without them.

        Raises:
            AnswerError: an answer came but is empty, refused, truncated (unless `keep_truncated`) or no chat
                completion.
            TransportError: no answer after all retries.
            ItemError("rejected"): the server refuses this very request (400, 413, 422).
            StopRun: the key, the model name or the quota is wrong, so that no request can work.
        """
        wanted = {key: value for key, value in parameters.items() if value is not None}
        given_up: list[str] = []
        while True:
            request = self._adapted(wanted, given_up)
            try:
                raw = await with_retries(partial(self._attempt, messages, request), self.retries, self.sleep)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                candidate = self._next_to_give_up(str(error), request)
                if candidate is None:
                    message = self.redact(f"the endpoint refuses the request ({error.status_code}): {error.message}")
                    raise ItemError("rejected", message, raw=self.redact(error.response.text)) from error
                given_up.append(candidate)
                continue
            except TransportError as error:
                if error.kind != "server_error" or self._structured_works or "response_format" not in request:
                    raise
                given_up.append("response_format")  # some servers fail on a schema that they cannot compile
                continue
            self._structured_works |= "response_format" in request
            for name in given_up:
                if name not in self._unsupported:
                    self._unsupported.add(name)
                    logger.warning("%s: the endpoint does not take `%s`; continuing without it", self.model, name)
            return self._read(raw, keep_truncated)

    def _adapted(self, wanted: Mapping[str, Any], given_up: Sequence[str]) -> dict[str, Any]:
        request = dict(wanted)
        for name, replacement in _OPTIONAL:
            if name in request and (name in self._unsupported or name in given_up):
                value = request.pop(name)
                if replacement:
                    request[replacement] = value
        return request

    def _next_to_give_up(self, message: str, request: Mapping[str, Any]) -> str | None:
        """The optional parameter that an error names, else the first that the request still holds."""
        present = [name for name, _ in _OPTIONAL if name in request]
        named = [name for name in present if name in message]
        return next(iter(named or [name for name in present if name in ("response_format", "seed")]), None)

    async def _attempt(self, messages: Any, request: Mapping[str, Any]) -> Any:
        """One HTTP request; failures sorted into those worth repeating, those of this request, and those of the whole
        run."""
        create = self._client.chat.completions.with_raw_response.create
        url = self._client.base_url
        try:
            async with asyncio.timeout(self.timeout):
                # As `extra_body` the request skips the client's walk over every nested field, a fifth of its time per
                # call.
                return await create(
                    model=self.model, messages=[], extra_body={"messages": messages, **request, **self.extra_body}
                )
        except (TimeoutError, openai.APITimeoutError) as error:
            raise Transient("timeout", f"no answer within {self.timeout:g} s") from error
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            if isinstance(cause, BodyTooLarge | OtherHost):  # older clients wrap what a hook raises
                raise self._refused(cause) from error
            raise Transient(
                "connection", f"connection failed: {type(cause).__name__}: {self.redact(str(cause))}"
            ) from error
        except (BodyTooLarge, OtherHost) as error:
            raise self._refused(error) from error
        except openai.RateLimitError as error:
            if error.code == "insufficient_quota":
                raise StopRun(self.redact(f"the account's quota is used up: {error.message}")) from error
            raise Transient("rate_limited", "the endpoint answers 429", self._requested_wait(error)) from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise StopRun(
                self.redact(f"the endpoint rejects the key ({error.status_code}): {error.message}")
            ) from error
        except openai.NotFoundError as error:
            if self._moved_to_v1(url):
                return await self._attempt(messages, request)
            raise StopRun(self.redact(f"the endpoint knows no such model or path (404): {error.message}")) from error
        except openai.APIStatusError as error:
            if error.status_code in (408, 409) or error.status_code >= 500:
                message = f"the endpoint answers {error.status_code}: {self.redact(error.response.text)[:200]}"
                raise Transient("server_error", message, self._requested_wait(error)) from error
            if isinstance(error, (openai.BadRequestError, openai.UnprocessableEntityError)):
                raise
            message = self.redact(f"the endpoint answers {error.status_code}: {error.message}")
            if error.status_code in (402, 405):  # no credit left; an address that takes no chat requests
                raise StopRun(message) from error
            raise ItemError("rejected", message, raw=self.redact(error.response.text)) from error

    def _refused(self, cause: BodyTooLarge | OtherHost) -> AnswerError | StopRun:
        """What a refusal of ours (`silkie.endpoint.transport`) means for the run."""
        if isinstance(cause, BodyTooLarge):
            return AnswerError("bad_response", f"the endpoint sends {cause}", usage=Usage(calls=1))
        return StopRun(
            f"the endpoint redirects to {self.redact(str(cause))}, and the prompt and its images would go there; where"
            " that is right, pass it as the base URL"
        )

    def _moved_to_v1(self, used: Any) -> bool:
        """After a 404 at `used`: True where the same request may work below /v1, because that has not been tried."""
        if used == self._client.base_url and used.path == "/":
            self._client.base_url = used.join("v1/")
            self._base_url = str(self._client.base_url)
            logger.warning(
                "the endpoint knows no %schat/completions; trying %schat/completions", used, self._client.base_url
            )
        return used != self._client.base_url

    def _requested_wait(self, error: openai.APIStatusError) -> float:
        """Seconds the server asks to wait. Raises StopRun where that is longer than a call may wait (a daily limit,
        say)."""
        asked = retry_after_seconds(error.response.headers)
        if asked > self.retries.rate_limit_seconds:
            raise StopRun(f"the endpoint asks to come back in {asked:.0f} s; run the command again then") from error
        return asked

    def _read(self, raw: Any, keep_truncated: bool) -> ChatAnswer:
        """The text of a chat completion. Whatever is odd about it becomes an AnswerError with the body as raw text."""
        body = self.redact(raw.text)
        usage = Usage(calls=1)
        try:
            completion = raw.parse()
            usage = self.prices.of(_usage(completion))
            choice = completion.choices[0]
            content, refusal, reason = (
                choice.message.content,
                getattr(choice.message, "refusal", None),
                choice.finish_reason,
            )
        except Exception as error:  # the client builds whatever object the body describes; any access may fail
            message = f"the body is no chat completion: {type(error).__name__}: {error}"
            raise AnswerError("bad_response", message, raw=body, usage=usage) from error
        if refusal or reason == "content_filter":
            raise AnswerError("refused", f"the endpoint declined: {refusal or reason}", raw=body, usage=usage)
        if not isinstance(content, str) or not content.strip():
            raise AnswerError("empty", f"the answer holds no text (finish reason {reason!r})", raw=body, usage=usage)
        if reason == "length" and not keep_truncated:
            raise AnswerError(
                "truncated", "the answer was cut at the token limit", raw=self.redact(content), usage=usage
            )
        return ChatAnswer(whole_text(self.redact(content)), usage)


def _usage(completion: Any) -> Usage:
    """What the endpoint says an answer used. It decides nothing about the answer: what is no count is 0."""

    def count(name: str) -> int:
        value = getattr(getattr(completion, "usage", None), name, None)
        return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST_TOKENS else 0

    return Usage(1, count("prompt_tokens"), count("completion_tokens"))


def _limits(connections: int) -> Any:
    """Connection limits of the client's own HTTP library, whichever that is."""
    default = openai.DEFAULT_CONNECTION_LIMITS
    return type(default)(max_connections=connections, max_keepalive_connections=connections)
