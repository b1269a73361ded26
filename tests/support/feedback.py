"""What the feedback tests share: a responses file whose true ratings are known, and the misbehaving judge as a
process."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[2]


def write_responses(folder: Path, count: int, k: int = 4) -> Path:
    """`count` items with k responses each; the response text tells its quality, and qualities differ within an item."""
    Image.new("RGB", (32, 32), (200, 30, 30)).save(folder / "red.png")
    path = folder / "responses.jsonl"
    with path.open("w") as file:
        for i in range(count):
            qualities = random.Random(i).sample(range(1, 6), k)
            responses = [
                {"model": f"model-{m}", "response": f"quality={q} " + "word " * m} for m, q in enumerate(qualities)
            ]
            record = {
                "id": f"item-{i:04d}",
                "image": "red.png",
                "prompt": f"item-{i:04d}: what is it?",
                "responses": responses,
            }
            file.write(json.dumps(record) + "\n")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def true_ratings(path: Path) -> dict[str, list[int]]:
    return {r["id"]: [int(x["response"][len("quality=")]) for x in r["responses"]] for r in read_jsonl(path)}


class Server:
    """A running judge server: `url`, and `events` so far."""

    def __init__(self, port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"
        self.log = log

    def events(self) -> list[dict[str, Any]]:
        return read_jsonl(self.log)


@contextlib.contextmanager
def judge_server(folder: Path, *options: str) -> Iterator[Server]:
    """`tests.support.judge_server` in a process of its own."""
    log = folder / "server.log"
    command = [sys.executable, "-m", "tests.support.judge_server", "--log", str(log), *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Server(int(process.stdout.readline()), log)
        finally:
            process.send_signal(signal.SIGTERM)


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "silkie.feedback", *map(str, arguments)]


def run_command(
    *arguments: Any, environment: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    merged = {**os.environ, **(environment or {})}
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, env=merged, timeout=timeout)


class ScriptedServer:
    """An endpoint in a thread that answers by `reply(request number, body) -> (status, headers, body or text)`;
    `requests` keeps what came.

    A reply of None closes the connection without an answer; a number sleeps that many seconds first and then closes it.
    """

    def __init__(self, reply: Callable[[int, dict[str, Any]], Any]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer._lock:
                    number = len(outer.requests)
                    outer.requests.append(body)
                    outer.paths.append(self.path)
                    outer.headers.append({key.lower(): value for key, value in self.headers.items()})
                answer = reply(number, body)
                if answer is None or isinstance(answer, (int, float)):
                    time.sleep(answer or 0)
                    self.close_connection = True
                    return
                status, headers, content = answer
                text = content if isinstance(content, str | bytes) else json.dumps(content)
                data = text.encode() if isinstance(text, str) else text
                self.send_response(status)
                for key, value in {
                    "content-type": "application/json",
                    "content-length": str(len(data)),
                    **headers,
                }.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: Any) -> None:
                pass

        self._lock = threading.Lock()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> ScriptedServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def completion(
    content: Any, *, finish: str = "stop", usage: tuple[int, int] | None = (100, 50), **message: Any
) -> tuple[int, dict, dict]:
    """A 200 answer with a chat completion."""
    body: dict[str, Any] = {"id": "x", "object": "chat.completion", "created": 0, "model": "judge"}
    body["choices"] = [
        {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}
    ]
    if usage is not None:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return 200, {}, body


def error(
    status: int, message: str = "no", headers: dict[str, str] | None = None, code: str | None = None
) -> tuple[int, dict, dict]:
    """An answer with an error status."""
    return status, headers or {}, {"error": {"message": message, "code": code}}
