"""An endpoint over a real socket: what is retried, how long is waited, which parameters are given up, and what never
leaves the process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time

import pytest

from silkie.endpoint.budget import Budget, Prices
from silkie.endpoint.client import Endpoint, api_key_from_environment
from silkie.endpoint.errors import AnswerError, ItemError, StopRun, Usage
from silkie.endpoint.retries import RetryPolicy, TransportError, retry_after_seconds
from tests.support.feedback import ScriptedServer, completion, error

FAST = RetryPolicy(attempts=3, timeout_attempts=2, rate_limit_seconds=30, first_wait=0.01, longest_wait=0.02)
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch):
    monkeypatch.delenv("SILKIE_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def ask(
    server: ScriptedServer, *, waits: list[float] | None = None, endpoint_options: dict | None = None, **parameters
):
    """One call; with `waits` nothing is slept and the waits asked for are collected."""

    async def run():
        async def sleep(seconds: float) -> None:
            if waits is not None:
                waits.append(seconds)

        options = {"timeout": 5.0, "retries": FAST, **(endpoint_options or {})}
        if waits is not None:
            options["sleep"] = sleep
        endpoint = Endpoint(server.url, "judge", **options)
        try:
            return await endpoint.chat(MESSAGES, **parameters), endpoint
        finally:
            await endpoint.close()

    return asyncio.run(run())


def test_an_answer_with_its_usage_and_cost():
    with ScriptedServer(lambda n, body: completion("hi")) as server:
        answer, _ = ask(
            server, endpoint_options={"prices": Prices(prompt=2.0, completion=10.0)}, temperature=0.0, max_tokens=7
        )
    assert answer.text == "hi"
    assert answer.usage == Usage(1, 100, 50, (100 * 2 + 50 * 10) / 1e6)
    assert server.requests[0] == {"model": "judge", "messages": MESSAGES, "temperature": 0.0, "max_tokens": 7}


@pytest.mark.parametrize(
    "failure",
    [error(500), error(503), error(408), None, (200, {"content-length": "500", "connection": "close"}, '{"cut')],
)
def test_a_failing_server_is_asked_again(failure):
    with ScriptedServer(lambda n, body: failure if n < 2 else completion("hi")) as server:
        answer, _ = ask(server)
    assert answer.text == "hi"
    assert len(server.requests) == 3


@pytest.mark.parametrize(("failure", "kind"), [(error(500), "server_error"), (None, "connection")])
def test_retries_end(failure, kind):
    with ScriptedServer(lambda n, body: failure) as server, pytest.raises(TransportError) as caught:
        ask(server)
    assert caught.value.kind == kind
    assert len(server.requests) == FAST.attempts


def test_a_call_that_hangs_is_given_up():
    with ScriptedServer(lambda n, body: 1.5) as server:
        began = time.monotonic()
        with pytest.raises(TransportError, match=r"no answer within 0\.2 s") as caught:
            ask(server, endpoint_options={"timeout": 0.2})
        assert caught.value.kind == "timeout"
        assert len(server.requests) == FAST.timeout_attempts
        assert time.monotonic() - began < 1.4


def test_a_server_that_drips_forever_is_given_up_as_well():
    """The client's own timeout starts anew with every byte; the one that counts is for the whole call."""

    def drip(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.sendall(
                        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 1000000\r\n\r\n"
                    )
                    for _ in range(100):
                        connection.sendall(b" ")
                        time.sleep(0.05)

    async def run(url: str) -> None:
        endpoint = Endpoint(url, "judge", timeout=0.3, retries=RetryPolicy(timeout_attempts=1))
        try:
            await endpoint.chat(MESSAGES)
        finally:
            await endpoint.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=drip, args=(listener,), daemon=True).start()
        began = time.monotonic()
        with pytest.raises(TransportError, match="no answer within"):
            asyncio.run(run(f"http://127.0.0.1:{listener.getsockname()[1]}/v1"))
        assert time.monotonic() - began < 3


def test_retry_after_is_honoured_and_jittered():
    waits: list[float] = []
    with ScriptedServer(
        lambda n, body: error(429, headers={"retry-after": "3"}) if n < 5 else completion("hi")
    ) as server:
        ask(server, waits=waits)
    assert len(waits) == 5, "429 answers do not count against the attempts"
    assert all(3 <= wait <= 3.5 for wait in waits)


def test_waiting_for_a_rate_limit_ends():
    policy = RetryPolicy(attempts=2, rate_limit_seconds=1.0, first_wait=0.05, longest_wait=0.1)
    with ScriptedServer(lambda n, body: error(429)) as server, pytest.raises(TransportError) as caught:
        ask(server, endpoint_options={"retries": policy})
    assert caught.value.kind == "rate_limited"
    assert len(server.requests) > policy.attempts


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (error(401, "bad key"), "rejects the key"),
        (error(403, "not yours"), "rejects the key"),
        (error(404, "no such model"), "no such model"),
        (error(402, "no credit left"), "no credit left"),
        (error(405), "answers 405"),
        (error(429, "pay first", code="insufficient_quota"), "quota is used up"),
        (error(429, headers={"retry-after": "86400"}), "come back in 86400 s"),
        (error(503, headers={"retry-after": "86400"}), "come back in 86400 s"),
    ],
)
def test_what_no_retry_can_mend_stops_the_run(failure, message):
    with ScriptedServer(lambda n, body: failure) as server, pytest.raises(StopRun, match=message):
        ask(server)
    assert len(server.requests) == 1


def test_an_endpoint_without_structured_output_is_asked_without_it_from_then_on(caplog):
    def reply(n, body):
        return error(400, "response_format is not supported") if "response_format" in body else completion("hi")

    async def run(url):
        endpoint = Endpoint(url, "judge", retries=FAST)
        for _ in range(3):
            await endpoint.chat(MESSAGES, response_format={"type": "json_object"})
        await endpoint.close()
        return endpoint

    with ScriptedServer(reply) as server, caplog.at_level(logging.WARNING):
        endpoint = asyncio.run(run(server.url))
    assert ["response_format" in body for body in server.requests] == [True, False, False, False]
    assert not endpoint.supports("response_format")
    assert len([record for record in caplog.records if "response_format" in record.message]) == 1


def test_one_request_that_is_refused_does_not_cost_the_others_their_structure():
    def reply(n, body):
        return error(400, "this image is not allowed") if n < 2 else completion("{}")

    async def run(url):
        endpoint = Endpoint(url, "judge", retries=FAST)
        with pytest.raises(ItemError, match="not allowed") as caught:
            await endpoint.chat(MESSAGES, response_format={"type": "json_object"})
        await endpoint.chat(MESSAGES, response_format={"type": "json_object"})
        await endpoint.close()
        return endpoint, caught.value

    with ScriptedServer(reply) as server:
        endpoint, refused = asyncio.run(run(server.url))
    assert endpoint.supports("response_format")
    assert refused.kind == "rejected" and "not allowed" in refused.raw
    assert "response_format" in server.requests[2]


def test_a_renamed_parameter_is_renamed():
    def reply(n, body):
        return (
            error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'.")
            if "max_tokens" in body
            else completion("hi")
        )

    with ScriptedServer(reply) as server:
        ask(server, max_tokens=9)
    assert server.requests[-1]["max_completion_tokens"] == 9


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (completion(None), "empty"),
        (completion("  "), "empty"),
        (completion("I will not", refusal="I will not"), "refused"),
        (completion("x", finish="content_filter"), "refused"),
        (completion("#### Helpful", finish="length"), "truncated"),
        ((200, {}, {"choices": []}), "bad_response"),
        ((200, {}, {"error": "overloaded"}), "bad_response"),
        ((200, {}, '{"choices": [{"mess'), "bad_response"),
        ((200, {"content-type": "text/html"}, "<html>busy</html>"), "bad_response"),
        ((200, {}, "[]"), "bad_response"),
    ],
)
def test_an_answer_that_is_none_is_an_answer_error_with_its_text(answer, kind):
    with ScriptedServer(lambda n, body: answer) as server, pytest.raises(AnswerError) as caught:
        ask(server)
    assert caught.value.kind == kind
    assert caught.value.raw and caught.value.usage.calls == 1
    assert len(server.requests) == 1, "whether to ask again is not the endpoint's decision"


def test_half_a_surrogate_pair_becomes_a_character_that_can_be_written():
    with ScriptedServer(lambda n, body: completion("broken \ud83d end")) as server:
        assert ask(server)[0].text == "broken \ufffd end"


def test_a_cut_answer_may_be_kept():
    with ScriptedServer(lambda n, body: completion("A long", finish="length")) as server:
        assert ask(server, keep_truncated=True)[0].text == "A long"


def test_a_placeholder_for_a_key_does_not_rewrite_answers(monkeypatch):
    """A server on this machine asks for no key, and people write "x" or "test"."""
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    with ScriptedServer(lambda n, body: completion("Text 1: a box")) as server:
        assert ask(server)[0].text == "Text 1: a box"


def test_the_key_goes_to_the_server_and_nowhere_else(monkeypatch, caplog):
    monkeypatch.setenv("SILKIE_API_KEY", "sk-very-secret")
    echo = error(400, "your key sk-very-secret may not do that")
    with (
        caplog.at_level(logging.DEBUG),
        ScriptedServer(lambda n, body: echo) as server,
        pytest.raises(ItemError) as caught,
    ):
        ask(server)
    assert server.headers[0]["authorization"] == "Bearer sk-very-secret"
    assert "sk-very-secret" not in str(caught.value) + caught.value.raw
    assert "[key]" in caught.value.raw
    assert not [
        record
        for record in caplog.records
        if record.name.startswith("silkie") and "sk-very-secret" in record.getMessage()
    ]


def test_where_the_key_comes_from(monkeypatch):
    assert api_key_from_environment() == "none"
    monkeypatch.setenv("OPENAI_API_KEY", "b")
    assert api_key_from_environment() == "b"
    monkeypatch.setenv("SILKIE_API_KEY", "a")
    assert api_key_from_environment() == "a"
    with pytest.raises(ValueError, match="MY_KEY is not set"):
        api_key_from_environment("MY_KEY")


def test_a_proxy_of_the_environment_is_not_used_for_this_machine(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with ScriptedServer(lambda n, body: completion("hi")) as server:
        assert ask(server)[0].text == "hi"


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "http://", "http://user:password@host/v1"])
def test_a_wrong_base_url_is_explained(url):
    with pytest.raises(ValueError, match="base URL"):
        Endpoint(url, "judge")


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"retry-after": "2.5"}, 2.5),
        ({"retry-after": "-4"}, 0),
        ({"retry-after": "soon"}, 0),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "Thu, 01 Jan 2026 00:00:20 GMT"}, 20),
        ({"retry-after": "Wed, 31 Dec 2025 00:00:00 GMT"}, 0),
    ],
)
def test_retry_after_in_all_its_forms(headers, seconds):
    assert retry_after_seconds(headers, now=1767225600.0) == pytest.approx(seconds)


def test_a_budget_leaves_room_for_what_is_in_flight():
    budget = Budget(max_tokens=1000)
    budget.start()
    budget.finish(Usage(1, 80, 20))
    started = 0
    with pytest.raises(StopRun, match="token budget"):
        for _ in range(100):
            budget.start()
            started += 1
    assert started == 9, "100 are spent and every item in flight will cost about 100"


def test_a_budget_counts_earlier_runs_and_cost():
    with pytest.raises(StopRun, match="cost budget"):
        Budget(max_cost=1.0, spent=Usage(5, 10, 10, 1.0), items=5).start()
    Budget(max_cost=1.0, spent=Usage(5, 10, 10, 0.5), items=5).start()
    Budget().start()


def test_a_budget_needs_an_endpoint_that_counts():
    budget = Budget(max_tokens=1000)
    budget.start()
    with pytest.raises(StopRun, match="reports no token usage"):
        budget.finish(Usage(1, 0, 0))
    unlimited = Budget()
    unlimited.start()
    unlimited.finish(Usage(1, 0, 0))


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_the_base_url_may_come_with_or_without_v1(suffix):
    """As people copy it: the server's root, its API, or the whole address of the call."""
    paths = []

    def reply(n, body):
        return error(404, "Not Found") if "/v1/" not in server.paths[n] else completion("hi")

    with ScriptedServer(reply) as server:

        async def run():
            endpoint = Endpoint(server.url.removesuffix("/v1") + suffix, "judge", timeout=5.0, retries=FAST)
            try:
                return await asyncio.gather(*(endpoint.chat(MESSAGES) for _ in range(4)))
            finally:
                await endpoint.close()

        answers = asyncio.run(run())
        paths += server.paths
    assert [answer.text for answer in answers] == ["hi"] * 4
    assert paths.count("/v1/chat/completions") == 4
    assert set(paths) <= {"/v1/chat/completions", "/chat/completions"}


def test_a_server_that_fails_on_a_schema_is_asked_without_it():
    with ScriptedServer(lambda n, body: error(500) if "response_format" in body else completion("hi")) as server:
        answer, endpoint = ask(server, waits=[], response_format={"type": "json_schema"})
    assert answer.text == "hi" and len(server.requests) == FAST.attempts + 1
    assert not endpoint.supports("response_format")


def test_a_failing_server_that_takes_schemas_keeps_them():
    with ScriptedServer(lambda n, body: completion("hi") if n == 0 else error(500)) as server:

        async def run():
            endpoint = Endpoint(server.url, "judge", timeout=5.0, retries=FAST)
            try:
                await endpoint.chat(MESSAGES, response_format={"type": "json_schema"})
                with pytest.raises(TransportError):
                    await endpoint.chat(MESSAGES, response_format={"type": "json_schema"})
            finally:
                await endpoint.close()

        asyncio.run(run())
    assert all("response_format" in body for body in server.requests)
    assert len(server.requests) == 1 + FAST.attempts


def test_a_request_that_is_only_ever_rate_limited_is_given_up():
    """Some servers answer 429 to a request that is larger than their limit: waiting does not help it."""
    waits: list[float] = []
    with ScriptedServer(lambda n, body: error(429)) as server, pytest.raises(TransportError) as caught:
        ask(server, waits=waits, endpoint_options={"retries": RetryPolicy()})
    assert caught.value.kind == "rate_limited"
    assert len(server.requests) == RetryPolicy().rate_limit_attempts
    assert 60 < sum(waits) < 900, "given up after minutes, not at once and not after a quarter of an hour"
