"""`silkie loop`: two rounds on a tiny model with a scripted judge, in process and served; killed in every stage."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.policy_server import BASE, JUDGE, PolicyServer, policy_server
from tests.support.tiny import image, tiny_model, tiny_processor

ROOT = Path(__file__).parents[2]
PATIENCE = 900  # seconds for a stage to begin; a busy machine takes minutes to import torch a few times
STAGES = ("sample", "rate", "build", "train", "evaluate-looks")


@pytest.fixture(scope="module")
def server() -> Iterator[PolicyServer]:
    with policy_server() as running:
        yield running


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A model, six prompts, and a benchmark of two questions."""
    root = tmp_path_factory.mktemp("loop")
    tiny_model().save_pretrained(root / "model")
    tiny_processor().save_pretrained(root / "model")
    for n in range(6):
        image(n).save(root / f"{n}.png")
    prompts = [{"image": f"{n}.png", "prompt": f"what is in image {n} ?"} for n in range(6)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    questions = [{"id": n, "image": f"{n}.png", "question": "is there a cat ?", "label": "yes"} for n in range(2)]
    benchmark = {"name": "looks", "kind": "yesno", "questions": questions, "images": ".", "max_new_tokens": 4}
    benchmark["prompt"] = "{question} yes or no"
    (root / "looks.yaml").write_text(yaml.safe_dump(benchmark))
    return root


def loop_file(inputs: Path, out: Path, server: PolicyServer, *, served: bool = False, **changed: Any) -> Path:
    loop = {
        "model": str(inputs / "model"),
        "prompts": str(inputs / "prompts.jsonl"),
        "output_dir": str(out),
        "rounds": 2,
        "prompts_per_round": 3,
        # one draw a batch: its seed depends on the draw alone, so a killed run draws what it would have drawn
        "sample": {"k": 3, "max_answer_tokens": 6, "batch_size": 1, "redraws": 1, "quiet": True},
        "rate": {"base_url": server.url, "model": JUDGE, "structured": "markdown", "quiet": True},
        "train": {
            "dtype": "float32",
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "per_device_train_batch_size": 1,
            "num_train_epochs": 1,
            "learning_rate": 0.01,
            "lr_scheduler_type": "constant",
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_steps": 1,
            "disable_tqdm": True,
        },
        "evaluate": [{"benchmark": str(inputs / "looks.yaml"), "quiet": True, "workers": 0, "batch_size": 1}],
        **changed,
    }
    if served:
        loop["serve"] = {"base_url": server.url, "model": BASE}
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(loop))
    return file


def start(file: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "silkie", "loop", str(file), *words]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(file: Path, *words: str) -> str:
    process = start(file, *words)
    said = process.communicate()[0]
    assert process.returncode == 0, said[-4000:]
    return said


def losses(out: Path, number: int) -> list[float]:
    state = json.loads((out / f"round-{number}" / "adapter" / "trainer_state.json").read_text())
    return [entry["loss/sigmoid"] for entry in state["log_history"] if "loss/sigmoid" in entry]


def same_adapters(a: Path, b: Path) -> bool:
    files = [(folder / "round-2" / "adapter" / "adapter_model.safetensors") for folder in (a, b)]
    one, other = map(load_file, files)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(inputs, server, tmp_path_factory) -> tuple[Path, str]:
    """A loop that nobody killed, and what it said."""
    out = tmp_path_factory.mktemp("whole") / "loop"
    return out, finish(loop_file(inputs, out, server))


@pytest.mark.slow
def test_two_rounds_in_process(inputs, server, whole):
    out, said = whole
    done = json.loads((out / "loop.json").read_text())["done"]
    assert list(done) == ["base/evaluate-looks", *(f"round-{n}/{stage}" for n in (1, 2) for stage in STAGES)]
    assert "Round 2" in said and "mean rating of the responses" in said and (out / "report.html").is_file()

    ids = [{row["id"] for row in map(json.loads, (out / f"round-{n}" / "prompts.jsonl").open())} for n in (1, 2)]
    assert ids == [{"1", "2", "3"}, {"4", "5", "6"}], "fresh prompts"
    assert losses(out, 2)[0] == pytest.approx(math.log(2), abs=1e-6), "round 2 starts as its reference"
    first, copy = (
        load_file(f / "adapter_model.safetensors") for f in (out / "round-1/adapter", out / "round-2/adapter/ref")
    )
    assert all(torch.equal(first[name], copy[name]) for name in first), "the reference is the policy of round 1"
    pool = yaml.safe_load((out / "round-2" / "pool.yaml").read_text())["members"][0]
    assert pool["local"] == str(out / "round-1" / "adapter")
    page = (out / "report.html").read_text()
    assert "Round 1" in page and "Round 2" in page and "Base" in page

    before = {path: path.stat().st_mtime_ns for path in out.glob("round-*/**/*") if path.is_file()}
    assert "===" not in finish(loop_file(inputs, out, server)), "nothing is done twice"
    assert {path: path.stat().st_mtime_ns for path in before} == before

    other = start(loop_file(inputs, out, server, seed=1)).communicate()[0]
    assert "error: " in other and "seed: 0 then, 1 now" in other


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_with_the_same_weights(inputs, server, whole, tmp_path):
    killed = tmp_path / "killed"
    file = loop_file(inputs, killed, server)
    for stage in ("round-1/sample", "round-1/rate", "round-1/build", "round-2/train", "round-2/evaluate-looks"):
        kill_in(file, killed, stage)
    finish(file)
    assert same_adapters(whole[0], killed)
    for name in ("round-2/responses.jsonl", "round-2/looks.answers.jsonl", "round-2/dataset/pairs.csv"):
        assert (whole[0] / name).read_bytes() == (killed / name).read_bytes(), name


def kill_in(file: Path, out: Path, stage: str) -> None:
    """Start the loop, wait until `stage` runs and has begun its work, and kill the stage and the loop with SIGKILL."""
    process = start(file)
    try:
        child = wait_for_stage(process, out, stage)
        time.sleep(0.3)
        process.kill()
        os.kill(child, signal.SIGKILL)
    finally:
        process.terminate()  # where it is still alive, it ends its stage, too
        process.communicate()
    assert stage not in json.loads((out / "loop.json").read_text())["done"]


def wait_for_stage(process: subprocess.Popen[str], out: Path, stage: str) -> int:
    """The number of the stage's process, once it has written its first file."""
    begun = {
        "sample": "responses.jsonl.journal",
        "rate": "ratings.jsonl",
        "build": "dataset.partial",
        "train": "adapter/_silkie_run.lock",
        "evaluate-looks": "looks.answers.jsonl",
    }[stage.partition("/")[2]]
    first = out / stage.partition("/")[0] / begun
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        note = (out / "loop.lock").read_text() if (out / "loop.lock").exists() else ""
        done = json.loads((out / "loop.json").read_text())["done"] if (out / "loop.json").exists() else {}
        assert stage not in done, f"{stage} was too fast to be killed"
        assert process.poll() is None, process.communicate()[0][-3000:]
        if first.exists() and "silkie" in note and stage_of(note) == stage.partition("/")[2].partition("-")[0]:
            return int(note.split()[1].rstrip(":"))
        time.sleep(0.02)
    raise AssertionError(f"{stage} never began")


def stage_of(note: str) -> str:
    words = note.split(": silkie ")[1].split()
    return {"feedback": words[1], "train": "train", "eval": "evaluate"}[words[0]]


@pytest.mark.slow
def test_a_served_policy_and_a_signal(inputs, server, tmp_path):
    out = tmp_path / "served"
    server.events.clear()
    file = loop_file(inputs, out, server, served=True)
    process = start(file)
    wait_for_stage(process, out, "round-1/train")
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode == 75 and "start the same command again" in said, said[-3000:]
    finish(file)
    first, second = sorted(name for name in server.adapters if "round" in name)
    assert [event for event in server.events if event[0] == "load"] == [("load", first), ("load", second)]
    asked = list(dict.fromkeys(model for what, model in server.events if what == "answer"))
    assert asked == [BASE, first, second], "the base answers first, then each round's adapter"
    assert server.adapters[second] == str(out / "round-2" / "adapter")
    assert {model for what, model in server.events if what == "rate"} == {JUDGE}
