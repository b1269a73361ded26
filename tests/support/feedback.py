"""What the feedback tests share: a responses file whose true ratings are known, and the misbehaving judge as a process."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
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
            responses = [{"model": f"model-{m}", "response": f"quality={q} " + "word " * m} for m, q in enumerate(qualities)]
            record = {"id": f"item-{i:04d}", "image": "red.png", "prompt": f"item-{i:04d}: what is it?", "responses": responses}
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


def run_command(*arguments: Any, environment: dict[str, str] | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    import os

    merged = {**os.environ, **(environment or {})}
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, env=merged, timeout=timeout)
