"""`run`, `judge` and `compare` end to end: a tiny random Qwen2.5-VL with an adapter, and a local OpenAI-compatible
server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from silkie.evaluation import ResultError, get_benchmark
from silkie.evaluation.__main__ import main
from silkie.evaluation.answerers import LocalAnswerer
from silkie.evaluation.run import Task, answer_tasks, meta_path, question_tasks
from tests.support.tiny import tiny_model, tiny_processor


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A POPE release of 11 questions (so the last batch of 4 is a short one) about images of different sizes."""
    folder = tmp_path_factory.mktemp("pope")
    (folder / "images").mkdir()
    rows = []
    for i in range(11):
        Image.new("RGB", (56 + 28 * (i % 3), 56), ((i * 23) % 255, 40, 200)).save(folder / "images" / f"{i}.png")
        rows.append(
            {
                "question_id": i,
                "image": f"{i}.png",
                "text": f"is there a {('dog', 'cat', 'circle')[i % 3]} in the image",
                "label": ("yes", "no")[i % 2],
            }
        )
    (folder / "coco_pope_random.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> tuple[Path, Path]:
    """(base model directory, adapter directory): an adapter far enough from zero to change the answers."""
    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    model, processor = tiny_model(), tiny_processor()
    model.save_pretrained(base)
    processor.save_pretrained(base)
    torch.manual_seed(1)
    tuned = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    )
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    tuned.save_pretrained(adapter)
    return base, adapter


def run(data, policy, out: Path, *more: str) -> int:
    base, adapter = policy
    fixed = [
        "--data",
        str(data),
        "--model",
        str(base),
        "--adapter",
        str(adapter),
        "--batch-size",
        "4",
        "--max-new-tokens",
        "4",
        "--quiet",
    ]
    return main(
        ["run", "pope", *fixed, "--out", str(out / "trained.jsonl"), "--base-out", str(out / "base.jsonl"), *more]
    )


@pytest.fixture(scope="module")
def finished(data, policy, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    assert run(data, policy, out, "--workers", "0") == 0
    return out


def test_one_load_answers_with_the_adapter_on_and_off(finished, policy, data):
    trained, base = (
        [json.loads(line) for line in (finished / name).read_text().splitlines()]
        for name in ("trained.jsonl", "base.jsonl")
    )
    assert [row["id"] for row in trained] == [f"random/{i}" for i in range(11)]
    assert [row["answer"] for row in trained] != [row["answer"] for row in base]
    assert trained[3]["image"] == "images/3.png" and trained[3]["prompt"].endswith("Please answer yes or no.")
    # the base answers are those of the base model alone
    from silkie.inference import load_policy

    model, processor = load_policy(policy[0])
    benchmark = get_benchmark("pope")
    tasks = question_tasks(benchmark, benchmark.load_questions(data), data)
    answer_tasks(
        tasks,
        {finished / "alone.jsonl": LocalAnswerer(model, processor, max_new_tokens=4)},
        settings={},
        batch_size=4,
        workers=0,
        progress=False,
    )
    assert (finished / "alone.jsonl").read_bytes() == (finished / "base.jsonl").read_bytes()


@pytest.mark.parametrize("keep", ["one batch", "torn line", "uneven", "nothing"])
def test_a_resumed_run_gives_the_same_bytes(finished, data, policy, tmp_path, keep):
    """Cut off after whole batches, inside a line, inside a batch with the two files at different places, or before the
    first answer."""
    for name in ("trained.jsonl", "base.jsonl"):
        rows = (finished / name).read_bytes().splitlines(keepends=True)
        kept = {
            "one batch": rows[:4],
            "torn line": [*rows[:8], rows[8][:25]],
            "uneven": rows[:9] if name == "trained.jsonl" else rows[:4],
            "nothing": [],
        }[keep]
        (tmp_path / name).write_bytes(b"".join(kept))
        meta_path(tmp_path / name).write_bytes(meta_path(finished / name).read_bytes())
    assert run(data, policy, tmp_path, "--workers", "2" if keep == "uneven" else "0") == 0
    for name in ("trained.jsonl", "base.jsonl"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_workers_end_with_a_killed_run(tmp_path):
    """Decoded images fill the workers' pipes, where torch's own check for a lost parent does not run."""
    Image.new("RGB", (400, 400)).save(tmp_path / "a.png")
    script = f"""
import multiprocessing, time
from silkie.evaluation.run import Task, _decoded
tasks = [Task({{"id": str(i)}}, "q", ({str(tmp_path / "a.png")!r},)) for i in range(64)]
batches = [range(i, i + 4) for i in range(0, 64, 4)]
for _ in _decoded(tasks, batches, 2, True):
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    left = workers
    for _ in range(100):
        left = [pid for pid in left if running(pid)]
        if not left:
            break
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert len(workers) == 2 and not left


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # a zombie that nobody waits for has ended too
    return (
        Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        if Path(f"/proc/{pid}").exists()
        else False
    )


def test_a_run_with_other_settings_or_questions_is_not_continued(finished, data, policy, tmp_path, capsys):
    for name in ("trained.jsonl", "base.jsonl"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
        meta_path(tmp_path / name).write_bytes(meta_path(finished / name).read_bytes())
    assert run(data, policy, tmp_path, "--temperature", "1.0") == 2
    assert "temperature: 0.0 then, 1.0 now" in capsys.readouterr().err
    assert run(data, policy, tmp_path, "--limit", "5") == 2
    assert "questions: 11 then, 5 now" in capsys.readouterr().err
    assert run(data, policy, tmp_path, "--limit", "5", "--overwrite") == 0
    assert len((tmp_path / "trained.jsonl").read_text().splitlines()) == 5
    meta_path(tmp_path / "base.jsonl").unlink()
    assert run(data, policy, tmp_path, "--limit", "5") == 2
    assert "it was not written by `run`" in capsys.readouterr().err


def test_sampling_is_seeded(data, policy, tmp_path):
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(data, policy, tmp_path / name, "--temperature", "1.0", "--seed", str(seed), "--workers", "0") == 0
        texts.append((tmp_path / name / "trained.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_score_and_compare_read_what_run_wrote(finished, tmp_path, capsys):
    assert (
        main(["score", "pope", str(finished / "trained.jsonl"), "--json", "--items", str(tmp_path / "items.jsonl")])
        == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed["questions"] == 11 and set(printed["intervals"]) <= set(printed["metrics"])
    assert len((tmp_path / "items.jsonl").read_text().splitlines()) == 11
    page = tmp_path / "page.html"
    assert (
        main(["compare", str(finished / "base.jsonl"), str(finished / "trained.jsonl"), "--json", "--html", str(page)])
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    flips = result["flips"]["fixed"] + result["flips"]["broken"]
    assert result["benchmark"] == "pope" and flips == len(
        result["flips"]["fixed_questions"] + result["flips"]["broken_questions"]
    )
    assert page.read_text().count("data:image/") >= min(flips, 1)
    assert main(["compare", str(finished / "base.jsonl"), str(finished / "trained.jsonl"), "--benchmark", "mme"]) == 2
    assert "trained.jsonl:1:" in (error := capsys.readouterr().err) or "base.jsonl:1:" in error


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("limit", "-1"),
        ("batch-size", "0"),
        ("workers", "-1"),
        ("max-new-tokens", "0"),
        ("temperature", "nan"),
        ("top-p", "2"),
        ("dtype", "int8"),
    ],
)
def test_options_out_of_range_are_refused(data, tmp_path, capsys, option, value):
    with pytest.raises(SystemExit):
        main(
            [
                "run",
                "pope",
                "--data",
                str(data),
                "--model",
                "m",
                "--out",
                str(tmp_path / "a.jsonl"),
                f"--{option}",
                value,
            ]
        )
    assert f"argument --{option}: " in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_answers_of_two_kinds_do_not_go_into_one_file(data, policy, tmp_path, capsys):
    out = str(tmp_path / "a.jsonl")
    command = ["run", "pope", "--data", str(data), "--model", str(policy[0]), "--adapter", str(policy[1]), "--out", out]
    assert main([*command, "--base-out", f"{tmp_path}/./a.jsonl"]) == 2
    assert "--out and --base-out are one file" in capsys.readouterr().err
    assert main(["judge", "mmhal", out, "--out", out, "--base-url", "http://localhost:9/v1", "--model", "m"]) == 2
    assert "--out is the file of answers itself" in capsys.readouterr().err


def test_an_image_that_cannot_be_read_is_one_line(data, policy, tmp_path, capsys):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    (copy / "images" / "9.png").write_bytes(b"no image")
    assert run(copy, policy, tmp_path, "--workers", "2") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: question random/9: ") and "is not an image that Pillow can read" in error
    assert len((tmp_path / "base.jsonl").read_text().splitlines()) == 8, "the whole batches before it are kept"


def test_a_run_that_is_killed_while_it_begins_is_begun_again(tmp_path, monkeypatch):
    """Between the settings and the first answer there is no moment at which the next start is refused, or continues
    other answers."""
    tasks, out = [Task({"id": str(i)}, f"q{i}") for i in range(3)], tmp_path / "a.jsonl"
    answer_tasks(tasks, {out: _Echo()}, settings={"seed of the model": 1}, progress=False)

    class Killed(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise Killed

    for step in ("write_text", "touch"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, step, killed)
            answer_tasks(tasks, {out: _Echo()}, settings={"seed of the model": 2}, overwrite=True, progress=False)
        assert not out.exists()
    answer_tasks(tasks, {out: _Echo()}, settings={"seed of the model": 2}, progress=False)
    assert len(out.read_text().splitlines()) == 3


def test_errors_name_what_to_do(data, tmp_path, capsys):
    assert main(["run", "mme", "--model", "x", "--out", str(tmp_path / "o.jsonl")]) == 2
    assert "--data is missing" in capsys.readouterr().err
    assert main(["run", "pope", "--data", str(data), "--model", "x", "--out", "o", "--base-out", "b"]) == 2
    assert "--base-out needs --adapter" in capsys.readouterr().err
    assert main(["score", "pope", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "none.jsonl"), str(tmp_path / "none")]) == 2
    assert "none: no such file" in capsys.readouterr().err
    (tmp_path / "amber.json").write_text('[{"id": 1, "response": "Yes"}]')
    assert main(["compare", str(tmp_path / "amber.json"), str(tmp_path / "amber.json")]) == 2
    assert "does not say which benchmark it answers. Add --benchmark" in capsys.readouterr().err


class _Chat(BaseHTTPRequestHandler):
    """Answers with what it was asked; fails when the server's switch says so."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.requests.append(request)  # type: ignore[attr-defined]
        content = request["messages"][-1]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        if server.broken:  # type: ignore[attr-defined]
            self.send_response(404)
            self.end_headers()
            return
        reply = "Sound.\nRating: 5" if "Rating:" in text else ("Yes" if "dog" in text else "No")
        choice = {"index": 0, "message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}
        body = json.dumps(
            {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        return


@pytest.fixture
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Chat)
    server.requests, server.broken = [], False  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server, f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_endpoint_answers_and_a_broken_run_is_continued(data, endpoint, tmp_path, capsys):
    server, url = endpoint
    out = tmp_path / "a.jsonl"
    arguments = [
        "run",
        "pope",
        "--data",
        str(data),
        "--base-url",
        url,
        "--model",
        "m",
        "--batch-size",
        "4",
        "--quiet",
        "--out",
        str(out),
    ]
    server.broken = True
    assert main(arguments) == 2
    assert "knows no such model or path" in capsys.readouterr().err and out.read_text() == ""
    server.broken, server.requests = False, []
    assert main(arguments) == 0
    assert len(server.requests) == 11
    request = server.requests[0]
    assert request["temperature"] == 0.0 and request["max_tokens"] == 16 and request["model"] == "m"
    assert request["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row["answer"] == ("Yes" if "dog" in row["prompt"] else "No") for row in answers)
    assert main(arguments) == 0 and len(server.requests) == 11, "a finished run asks nothing again"


def test_a_judge_behind_an_endpoint_rates_answers(endpoint, tmp_path, capsys):
    _, url = endpoint
    rows = [
        {
            "benchmark": "mmhal",
            "id": str(i),
            "category": "counting",
            "prompt": "How many?",
            "gt_answer": "Two.",
            "answer": "Two.",
        }
        for i in range(3)
    ]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (
        main(
            [
                "judge",
                "mmhal",
                str(answers),
                "--out",
                str(tmp_path / "judged.jsonl"),
                "--base-url",
                url,
                "--model",
                "m",
                "--quiet",
            ]
        )
        == 0
    )
    assert "score" in capsys.readouterr().out
    assert get_benchmark("mmhal").score_results(str(tmp_path / "judged.jsonl")).metrics["score"] == 5
    assert (
        main(["judge", "pope", str(answers), "--out", str(tmp_path / "j.jsonl"), "--base-url", url, "--model", "m"])
        == 2
    )
    assert "needs no judge" in capsys.readouterr().err


class _Echo:
    wants_pixels = True

    def answer(self, prompts, images, *, seed):
        return [f"{prompt} {own[0].size if own else None} {seed}" for prompt, own in zip(prompts, images, strict=True)]


def test_foreign_or_reordered_files_are_not_touched(tmp_path):
    tasks = [Task({"id": str(i)}, f"q{i}") for i in range(5)]
    out = tmp_path / "a.jsonl"
    answer_tasks(tasks, {out: _Echo()}, settings={}, batch_size=2, progress=False)
    assert json.loads(out.read_text().splitlines()[4])["answer"] == "q4 None 4"
    rows = out.read_text().splitlines(keepends=True)
    out.write_text("".join([rows[1], rows[0]]))
    with pytest.raises(ResultError, match=r":1: answers question '1', expected '0'"):
        answer_tasks(tasks, {out: _Echo()}, settings={}, batch_size=2, progress=False)
    out.write_text(rows[0] + "garbage\n")
    with pytest.raises(ResultError, match=r":2: not an answer that `run` wrote"):
        answer_tasks(tasks, {out: _Echo()}, settings={}, batch_size=2, progress=False)
    assert out.read_text() == rows[0] + "garbage\n"
