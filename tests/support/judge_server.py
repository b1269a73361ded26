"""A judge behind a real socket, built to misbehave: `python -m tests.support.judge_server --log FILE --faults`.

It answers `/v1/chat/completions` in the Markdown form (or in JSON, where a schema is asked for and `--json`), rating
every text by the "quality=N" it contains; a request without texts to rate gets a short answer. Items are recognised by
"item-NNNN" in the request. With `--faults` the item's number decides what goes wrong: see `FAULTS`. At most `--slots`
requests are worked on at a time, `--latency` seconds each, so that the server's capacity is known: slots / latency
requests per second. Every event is one line of the log, written before the answer goes out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ASPECTS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")

# item number modulo 40 -> what goes wrong. "x1": only the first request of an item; "always": every one.
FAULTS: dict[int, tuple[str, str]] = {
    1: ("rate_limit", "x1"),
    3: ("error_500", "x1"),
    5: ("hang", "x1"),
    7: ("reset", "x1"),
    9: ("bad_http_json", "x1"),
    11: ("missing_aspect", "x1"),
    13: ("wrong_count", "x1"),
    15: ("refusal", "x1"),
    17: ("truncated", "x1"),
    19: ("half_body", "x1"),
    21: ("invalid_json", "x1"),
    23: ("missing_aspect", "always"),
    27: ("refusal", "always"),
    31: ("wrong_count", "always"),
    35: ("rejected", "always"),
}
PAID = ("good", "missing_aspect", "wrong_count", "refusal", "truncated", "invalid_json", "bad_http_json")


def markdown(qualities: list[int], *, aspects: tuple[str, ...] = ASPECTS) -> str:
    blocks = []
    for aspect in aspects:
        blocks.append(f"#### {aspect} Assessment")
        for i, quality in enumerate(qualities, 1):
            blocks.append(f"##### Output for Text {i}\nRating: {quality}\nRationale: It says quality={quality}.")
    return "\n".join(blocks)


def as_json(qualities: list[int]) -> str:
    texts = {f"text_{i}": {"rationale": f"It says quality={q}.", "rating": q} for i, q in enumerate(qualities, 1)}
    return json.dumps(dict.fromkeys(ASPECTS, texts))


def request_text(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    return (
        content if isinstance(content, str) else "\n".join(part["text"] for part in content if part["type"] == "text")
    )


class JudgeServer:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.slots = asyncio.Semaphore(arguments.slots)
        self.seen: Counter[str] = Counter()
        self.open = self.most_open = 0  # requests that wait for their answer
        self.log = Path(arguments.log).open("a", encoding="utf-8")

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self.one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client was killed or gave up
        finally:
            writer.close()

    async def one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; False when the connection is to be closed."""
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)[1])  # type: ignore[index]
        body = json.loads(await reader.readexactly(length))
        text = request_text(body)
        item = re.search(r"item-(\d+)", text)[0]  # type: ignore[index]
        if body.get("response_format") and not self.arguments.json:
            return await self.send(
                writer, item, 400, {"error": {"message": "response_format is not supported"}}, "no_schema"
            )
        self.seen[item] += 1
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        async with self.slots:
            await asyncio.sleep(self.arguments.latency)
        self.open -= 1
        fault = self.fault(item)
        qualities = [int(q) for q in re.findall(r"quality=(\d)", text.split("# Texts")[-1])]
        if fault == "reset":
            self.note(item, fault)
            writer.transport.abort()
            return False
        if fault == "half_body":
            self.note(item, fault)
            writer.write(
                b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 5000\r\n\r\n{"choices": ['
            )
            await writer.drain()
            return False
        if fault == "hang":
            self.note(item, fault)
            await reader.read()  # until the client gives up
            return False
        if fault == "rate_limit":
            return await self.send(writer, item, 429, {"error": {"message": "slow down"}}, fault, {"retry-after": "1"})
        if fault == "error_500":
            return await self.send(writer, item, 500, {"error": {"message": "internal error"}}, fault)
        if fault == "rejected":
            return await self.send(writer, item, 400, {"error": {"message": "this image is not allowed"}}, fault)
        if fault == "bad_http_json":
            return await self.send(writer, item, 200, b'{"choices": [{"mess', fault)
        content, finish = markdown(qualities), "stop"
        if body.get("response_format"):
            content = as_json(qualities)
        if (
            "# Texts" not in text
        ):  # a prompt to be answered, not texts to be rated; few different answers, so that draws repeat
            content = f"answer {body.get('seed', 0) % 5} at {body.get('temperature')}"
        if fault == "missing_aspect":
            content = markdown(qualities, aspects=ASPECTS[:2])
        if fault == "wrong_count":
            content = markdown(qualities[:-1])
        if fault == "refusal":
            content = "I'm sorry, but I can't help with rating these texts."
        if fault == "invalid_json":
            content = '{"Helpfulness": {"text_1": {"rating": 4,'
        if fault == "truncated":
            content, finish = content[: len(content) // 2], "length"
        usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
        message = {"role": "assistant", "content": content}
        answer = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "usage": usage}
        return await self.send(
            writer, item, 200, answer | {"choices": [{"index": 0, "finish_reason": finish, "message": message}]}, fault
        )

    def fault(self, item: str) -> str:
        if not self.arguments.faults:
            return "good"
        name, when = FAULTS.get(int(item.removeprefix("item-")) % 40, ("good", "always"))
        asked = self.seen[item]
        return name if when == "always" or asked == 1 else "good"

    def note(self, item: str, outcome: str) -> None:
        self.log.write(
            json.dumps({"time": time.time(), "item": item, "outcome": outcome, "most_open": self.most_open}) + "\n"
        )
        self.log.flush()

    async def send(
        self,
        writer: asyncio.StreamWriter,
        item: str,
        status: int,
        body: dict[str, Any] | bytes,
        outcome: str,
        headers: dict[str, str] | None = None,
    ) -> bool:
        self.note(item, outcome)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} X", "content-type: application/json", f"content-length: {len(data)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
        await writer.drain()
        return True


async def serve(arguments: argparse.Namespace) -> None:
    judge = JudgeServer(arguments)
    server = await asyncio.start_server(judge.handle, "127.0.0.1", arguments.port, limit=1 << 24)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", required=True)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--json", action="store_true")
    try:
        asyncio.run(serve(parser.parse_args()))
    except KeyboardInterrupt:
        sys.exit(0)
