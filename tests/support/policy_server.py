"""An OpenAI-compatible server with two models: a policy that can load adapters while it runs, and a judge.

It answers nothing but what a script says: the policy writes a few words that depend on the seed and on the adapter, and
the judge rates a text by how many words it has. `events` keeps what was asked of whom.
"""

from __future__ import annotations

import http.server
import json
import random
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.judge_server import markdown, request_text
from tests.support.tiny import WORDS

BASE, JUDGE = "base-model", "judge"


class PolicyServer:
    """`url`; `events`: (what, model or adapter) in order; `adapters`: name -> directory."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.adapters: dict[str, str] = {}
        self.loads_adapters = True
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def get(self, path: str) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {
                "object": "list",
                "data": [{"id": n, "object": "model"} for n in (BASE, JUDGE, *self.adapters)],
            }
        return 404, {"error": {"message": "not found"}}

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/load_lora_adapter" and self.loads_adapters:
            name, folder = body["lora_name"], body["lora_path"]
            if not (Path(folder) / "adapter_model.safetensors").is_file():
                return 400, {"error": {"message": f"no adapter in {folder}"}}
            self.events.append(("load", name))
            self.adapters[name] = folder
            return 200, f"Success: LoRA adapter '{name}' added successfully."
        if path != "/v1/chat/completions":
            return 404, {"error": {"message": "Not Found"}}
        model = body["model"]
        if model not in (BASE, JUDGE, *self.adapters):
            return 404, {"error": {"message": f"the model {model} does not exist"}}
        text = request_text(body)
        self.events.append(("rate" if "# Texts" in text else "answer", model))
        return 200, completion(body, text)


def completion(body: dict[str, Any], text: str) -> dict[str, Any]:
    """What a model of the script answers to a request."""
    if "# Texts" in text:
        content = markdown([quality(own) for own in texts_of(text)])
    else:
        rng = random.Random(f"{body.get('seed')} {body['model']} {text}")
        content = " ".join(rng.choices(WORDS, k=rng.randint(2, 7)))
        if "yes or no" in text:
            content = rng.choice(["yes", "no"])
    message = {"role": "assistant", "content": content}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    answer = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "usage": usage}
    return answer | {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}


def texts_of(request: str) -> list[str]:
    """The texts that a request wants rated."""
    found = re.findall(r"<<< (\w+) text \d+\n(.*?)\n>>> \1 text \d+", request, re.DOTALL)
    return [text for _, text in found]


def quality(text: str) -> int:
    """A rating from 1 to 5."""
    return 1 + len(text.split()) % 5


def _handler(server: PolicyServer) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(*server.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self.answer(*server.post(self.path, body))

        def answer(self, status: int, content: Any) -> None:
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-type", "text/plain" if isinstance(content, str) else "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@contextmanager
def policy_server() -> Iterator[PolicyServer]:
    """The server, in a thread."""
    server = PolicyServer()
    thread = threading.Thread(target=server._server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server._server.shutdown()
        server._server.server_close()
