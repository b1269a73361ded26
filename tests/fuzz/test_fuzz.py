"""Fuzzers: whatever comes in, the outcome is success or a typed error that names the place.

Seeded (hypothesis derandomized), so that a failure of one machine is a failure of all. CI runs 2,000 cases,
`make test-slow` 50,000: SHARES says how they are split."""

from __future__ import annotations

import asyncio
import copy
import importlib
import io
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from silkie.data import DataError, raw
from silkie.data.convert import Settings, _row
from silkie.data.images import ImageError, image_size, open_image
from silkie.data.pairs import PairOptions
from silkie.data.registry import SOURCES
from silkie.data.resolver import ImageResolver
from silkie.data.row import Row
from silkie.data.schema import group_features
from silkie.endpoint import client, transport
from silkie.endpoint.client import Endpoint
from silkie.endpoint.errors import AnswerError, ItemError, StopRun
from silkie.endpoint.retries import RetryPolicy, TransportError
from silkie.evaluation import score
from silkie.evaluation.records import ResultError, read_records
from silkie.feedback import default_rubric, parse_answer
from silkie.feedback.inputs import RecordError, read_items
from tests.support import preference_files as files
from tests.support.feedback import completion

SHARES = {"records": 800, "files": 500, "results": 400, "endpoint": 300}  # 2,000
SLOW = 25  # times as many: 50,000

HOSTILE = [
    None, True, False, 0, -1, 1.5, 1e308, float("nan"), float("inf"), 10**400, "", " ", "N/A", "1_0", "\0", "\ud83d",
    "<image>", "<image>" * 3, "../../x", "/dev/zero", "zip://x::/dev/zero", "zip://x", "http://x", "data:image/png;base64,A",
    "data:,", b"bytes", [], [[]], [None], [1, 2], {}, {"a": None}, {"\0": {}}, {"\ud800": 1}, {"type": "video"},
    {"bytes": b"x", "path": 3}, {"role": "user", "content": "x"}, {"from": "gpt", "value": 3}, [{"role": "system"}],
    [True, False], [[0, 1]], [[True, False]], {"Rating": "9"}, "x" * 10_000,
]  # fmt: skip
DEEP: Any = None
for _ in range(300):
    DEEP = [DEEP]
HOSTILE.append(DEEP)

leaves = st.sampled_from(HOSTILE) | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)

PAIR = {"prompt": "What?", "chosen": "good", "rejected": "bad"}
TURNS = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
SAMPLES: list[tuple[str, dict[str, Any]]] = [
    ("vlfeedback", {**files.vlfeedback(0), "image": {"bytes": files.png(0), "path": None}}),
    ("vlfeedback", {**files.vlfeedback(0, dict_of_lists=True), "image": {"bytes": files.png(0), "path": None}}),
    ("groups", files.group_record(images=[], pairs=[[0, 1]], pair_weights=[1.0], models=["a", "b"], rating_scale=[1, 5])),
    ("groups", files.group_record(images=[], prompt=TURNS, rationales=[{"Help": "x"}, None])),
    ("trl", PAIR),
    ("trl", {"chosen": [*TURNS, {"role": "assistant", "content": "a"}], "rejected": [*TURNS, {"role": "assistant", "content": "b"}]}),
    ("rlhf-v", {"text": json.dumps({"question": "q", "chosen": "a", "rejected": "b"}), "image": {"bytes": files.png(0), "path": None}}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}),
    ("alpaca", {"instruction": "q", "input": "x", "history": [["a", "b"]], "chosen": "a", "rejected": "b"}),
    ("mmpr", {"question": "q", "chosen": "a", "rejected": "b", "image": None}),
]  # fmt: skip


@st.composite
def damaged(draw, sample: Any) -> Any:
    """A value in which one to three places were removed or replaced."""
    value = copy.deepcopy(sample)
    for _ in range(draw(st.integers(1, 3))):
        place, key = None, None
        node = value
        while isinstance(node, dict | list) and node and (place is None or draw(st.integers(0, 3))):
            place, key = node, draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            node = place[key]
        if place is None:
            return copy.deepcopy(draw(values))
        if isinstance(place, dict) and not draw(st.integers(0, 3)):
            del place[key]
        else:
            place[key] = copy.deepcopy(draw(values))  # a sample of the strategy must not be changed
    return value


def fuzzer(count: int):
    """Runs a test on `count` seeded cases."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


ASPECTS = (*files.ASPECTS, "Help")
FEATURES = group_features(ASPECTS)
records = st.sampled_from(range(len(SAMPLES))).flatmap(
    lambda index: st.tuples(st.just(SAMPLES[index][0]), damaged(SAMPLES[index][1]))
)


def a_record(case: tuple[str, Any]) -> None:
    """A row that can be stored, or a RowError that names the line; on_error=skip never raises."""
    name, record = case
    source = SOURCES[name]
    for on_error in ("raise", "skip"):
        own = Settings(
            source=source,
            name="rows.jsonl",
            options=PairOptions(),
            aspects=ASPECTS,
            base="/nowhere",
            image_root=None,
            on_error=on_error,
            allow_remote=False,
            need_pairs=True,
            scale=source.scale,
        )
        columns = record if isinstance(record, dict) else {}
        row = Row(columns, own.name, "line 7", ImageResolver(None, "/nowhere"), own.scale)
        try:
            stored = _row(row, record, own)
        except DataError as error:
            assert on_error == "raise" and "rows.jsonl, line 7" in str(error)
            str(error).encode("utf-8", "backslashreplace")
        else:
            stored = {key: value for key, value in stored.items() if key in FEATURES}
            pa.Table.from_pylist([stored], schema=FEATURES.arrow_schema)


@pytest.mark.parametrize("count", [SHARES["records"], pytest.param(SLOW * SHARES["records"], marks=pytest.mark.slow)])
def test_records(count):
    fuzzer(count)(given(records)(a_record))()


# Files: bytes of a valid file of every kind, damaged


def valid_files() -> dict[str, bytes]:
    lines = b"".join(json.dumps(PAIR | {"prompt": f"{i}?"}).encode() + b"\n" for i in range(4))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.jsonl", lines)
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as archive:
        archive.writestr("rows.json", json.dumps([PAIR]))
        archive.writestr("0.png", files.png(0))
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([PAIR] * 3), table)
    meta = {"a": {"root": ".", "annotation": "rows.jsonl"}}
    return {
        "rows.jsonl": lines,
        "rows.json": json.dumps([PAIR, PAIR]).encode(),
        "a.zip": packed.getvalue(),
        "b.zip": stored.getvalue(),
        "rows.parquet": table.getvalue(),
        "meta.json": json.dumps(meta).encode(),
        "x.png": files.png(0),
    }


VALID = valid_files()
PIECES = [
    b"[" * 5000, b"1" * 5000, b"\xff\xfe", b"\0", b'"', b"\n", b"{", b"}", b"\\ud83d", b"null", b"\r\n\r\n", b"\xef\xbb\xbf",
    b'{"a": ' * 2000, b'{"root": 3}', b"PK\x01\x02", b"NaN", b"1e999",
]  # fmt: skip
edits = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 40), st.sampled_from(PIECES) | st.binary(max_size=8)),
    min_size=1,
    max_size=4,
)
broken_files = st.tuples(st.sampled_from(sorted(VALID)), edits, st.floats(0.2, 2))


def edited(data: bytes, changes: list[tuple[float, int, bytes]], cut: float) -> bytes:
    """`data` with pieces in the place of some of its bytes, and cut off in four of ten cases."""
    for place, length, piece in changes:
        start = int(place * len(data))
        data = data[:start] + piece + data[start + length :]
    return data[: int(cut * len(data))] if cut < 1 else data


def a_file(case: tuple[str, list, float]) -> None:
    """Records, or a DataError or ImageError that names the file."""
    name, changes, cut = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(edited(VALID[name], changes, cut))
        if name == "meta.json":
            Path(folder, "rows.jsonl").write_bytes(VALID["rows.jsonl"])
        if name == "x.png":
            for function in (open_image, image_size):
                try:
                    function({"bytes": None, "path": str(path)}, where="row 7")
                except ImageError as error:
                    assert str(error).startswith("row 7: ")
            return
        try:
            opened = raw.from_path(str(path), "train")
            for shard in opened.shards:
                for location, _ in raw.read(shard):
                    assert location.startswith(("row", "line"))
        except DataError as error:
            assert name in str(error) or "rows." in str(error), error
        if name.endswith(".zip"):
            try:
                open_image(f"zip://0.png::{path}", where="row 7")
            except ImageError as error:
                assert str(error).startswith("row 7: ")


@pytest.mark.parametrize("count", [SHARES["files"], pytest.param(SLOW * SHARES["files"], marks=pytest.mark.slow)])
def test_files(count):
    fuzzer(count)(given(broken_files)(a_file))()


# Result files and responses files

RESULTS: dict[str, list[dict[str, Any]]] = {
    "pope": [{"question_id": i, "image": f"{i}.jpg", "question": "q?", "label": "yes", "answer": "yes"} for i in range(3)],
    "chair": [{"image_id": i, "answer": "A cat.", "objects": ["cat"]} for i in range(2)],
    "mmhal": [{"id": i, "question": "q?", "rating": 3, "judge": "rating: 3"} for i in range(2)],
    "redteam": [{"id": i, "answer": "I cannot.", "category": "harm"} for i in range(2)],
    "items": [{"id": f"{i}", "prompt": "q", "image": None, "responses": [{"model": "m", "response": "r"}]} for i in range(2)],
}  # fmt: skip
results = st.sampled_from(sorted(RESULTS)).flatmap(
    lambda name: st.tuples(
        st.just(name), damaged(RESULTS[name]), st.sampled_from(["lines", "list", "pretty"]), edits | st.just([])
    )
)


def a_result_file(case: tuple[str, Any, str, list]) -> None:
    """A score, or a ResultError (RecordError) that names the file."""
    name, rows, form, changes = case
    encode = lambda value, **how: json.dumps(value, default=str, **how)  # noqa: E731
    listed = rows if isinstance(rows, list) else [rows]
    text = "\n".join(map(encode, listed)) if form == "lines" else encode(listed, indent=1 if form == "pretty" else None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "answers.jsonl")
        path.write_bytes(edited(text.encode("utf-8", "surrogatepass"), changes, 1))
        if name == "items":
            try:
                list(read_items(path))
            except RecordError as error:
                assert "answers.jsonl" in str(error)
            return
        for key in (None, "id"):
            try:
                read_records(path, key_field=key)
            except ResultError as error:
                assert error.path == path
        try:
            found = score(name, str(path))
        except ResultError as error:
            assert folder in str(error.path)
        else:
            repr(found.metrics).encode()
            json.dumps([item.answer for item in found.items], ensure_ascii=False).encode()


@pytest.mark.parametrize("count", [SHARES["results"], pytest.param(SLOW * SHARES["results"], marks=pytest.mark.slow)])
def test_result_files(count):
    fuzzer(count)(given(results)(a_result_file))()


# What an endpoint sends

ANSWER = completion("#### Helpfulness Assessment\n##### Output for Text 1\nRating: 4\nRationale: x")[2]
ENCODINGS = ["", "identity", "gzip", "deflate", "br", "\xff"]
bodies = damaged(ANSWER).map(lambda value: json.dumps(value, default=str).encode("utf-8", "surrogatepass"))
replies = st.tuples(
    st.sampled_from([200] * 6 + [204, 301, 307, 400, 401, 404, 408, 413, 422, 429, 500, 503]),
    bodies | st.binary(max_size=100) | st.tuples(bodies, edits).map(lambda case: edited(case[0], case[1], 1)),
    st.dictionaries(
        st.sampled_from(["content-encoding", "retry-after", "retry-after-ms", "location", "content-type"]),
        st.sampled_from(
            [*ENCODINGS, "nan", "1e99", "-1", "http://elsewhere/", "/v1/x", "text/html", "application/json"]
        ),
        max_size=3,
    ),
)
TYPED = (AnswerError, ItemError, TransportError, StopRun)
NO_WAIT = RetryPolicy(attempts=2, timeout_attempts=1, rate_limit_attempts=2, first_wait=0.0, longest_wait=0.0)


def test_endpoint_answers_ci(monkeypatch):
    endpoint_answers(SHARES["endpoint"], monkeypatch)


@pytest.mark.slow
def test_endpoint_answers_slow(monkeypatch):
    endpoint_answers(SLOW * SHARES["endpoint"], monkeypatch)


def endpoint_answers(count: int, monkeypatch) -> None:
    """An answer with its ratings or without, or an error of `silkie.endpoint.errors`, through the real client."""
    library = importlib.import_module(openai.DefaultAsyncHttpxClient.__mro__[1].__module__.split(".")[0])
    reply: list[Any] = [None]

    async def handler(request: Any) -> Any:
        status, body, headers = reply[0]
        encoded = [(key, value.encode("latin-1")) for key, value in headers.items()]

        async def stream():
            yield body

        return library.Response(status, headers=encoded, content=stream())

    def guarded(base_url: str, **options: Any) -> Any:
        return transport.guarded_client(base_url, **options, transport=library.MockTransport(handler))

    monkeypatch.setattr(client, "guarded_client", guarded)
    loop = asyncio.new_event_loop()

    async def no_sleep(_: float) -> None:
        return None

    def an_answer(case: tuple[int, bytes, dict[str, str]]) -> None:
        reply[0] = case
        endpoint = Endpoint("http://127.0.0.1:1/v1", "judge", retries=NO_WAIT, sleep=no_sleep)

        async def ask() -> Any:
            try:
                return await endpoint.chat([{"role": "user", "content": "x"}])
            finally:
                await endpoint.close()

        try:
            answer = loop.run_until_complete(ask())
            assert answer.usage.prompt_tokens >= 0 and answer.usage.completion_tokens >= 0
            answer.text.encode()
            parse_answer(answer.text, default_rubric(), 1)
        except TYPED as error:
            assert str(error)

    try:
        fuzzer(count)(given(replies)(an_answer))()
    finally:
        loop.close()
