"""From images and questions to preference groups, with real (tiny) VLMs behind `transformers serve` on loopback and in
this process."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from PIL import Image

from silkie.data import load_preferences, open_image
from silkie.feedback.build import build_dataset
from silkie.feedback.journal import read_journal
from silkie.feedback.pool import load_pool
from silkie.feedback.sample import SampleOptions, sample_file
from tests.support.feedback import ROOT, read_jsonl, run_command
from tests.support.tiny import tiny_model, tiny_processor
from tests.support.tiny_judge import COLOURS, RATINGS, RUBRIC, save_judge

pytest.importorskip("fastapi", reason="`transformers serve` needs fastapi and uvicorn")
pytest.importorskip("uvicorn", reason="`transformers serve` needs fastapi and uvicorn")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A judge that has learnt the form, and a policy that answers at random."""
    folder = tmp_path_factory.mktemp("models")
    assert save_judge(folder / "judge") < 0.05
    tiny_model(seed=1).save_pretrained(folder / "policy")
    tiny_processor().save_pretrained(folder / "policy")
    return folder


@pytest.fixture(scope="module")
def base_url(tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path_factory.mktemp("serve") / "log").open("w")
    command = [sys.executable, "-m", "tests.support.serve_vlm", "--port", str(port)]
    with log, subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT) as process:
        try:
            for _ in range(600):
                assert process.poll() is None, Path(log.name).read_text()
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                    break
                except OSError:
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()


def write_rubric(path: Path) -> Path:
    path.write_text(
        yaml.safe_dump({"name": RUBRIC.name, "introduction": RUBRIC.introduction, "aspects": list(RUBRIC.aspect_names)})
    )
    return path


def test_images_and_questions_become_preference_groups(tmp_path, models, base_url):
    (tmp_path / "images").mkdir()
    with (tmp_path / "questions.jsonl").open("w") as file:
        for colour in COLOURS:
            Image.new("RGB", (56, 56), colour).save(tmp_path / "images" / f"{colour}.png")
            file.write(
                json.dumps({"id": colour, "image": f"images/{colour}.png", "prompt": "what is in the image ?"}) + "\n"
            )
    pool = {
        "members": [
            {
                "name": "served",
                "base_url": base_url,
                "model": str(models / "policy"),
                "temperatures": [1.0],
                "max_tokens": 10,
            },
            {"name": "local", "local": str(models / "policy"), "temperatures": [1.5], "max_tokens": 10},
        ]
    }
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump(pool))

    responses = tmp_path / "responses.jsonl"
    sampled = sample_file(
        tmp_path / "questions.jsonl",
        load_pool(tmp_path / "pool.yaml"),
        responses,
        SampleOptions(k=2, concurrency=2, progress=False),
    )
    assert (sampled.complete, sampled.dropped, sampled.stopped) == (4, [], None)
    for record in read_jsonl(responses):
        assert {response["model"] for response in record["responses"]} == {"served", "local"}
        assert all(response["response"] for response in record["responses"])

    journal = tmp_path / "journal.jsonl"
    arguments = ["rate", responses, "--base-url", base_url, "--model", models / "judge", "--journal", journal]
    arguments += [
        "--rubric",
        write_rubric(tmp_path / "rubric.yaml"),
        "--concurrency",
        "2",
        "--max-answer-tokens",
        "150",
        "--quiet",
    ]
    result = run_command(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    records = list(read_journal(journal))
    assert {record["status"] for record in records} == {"ok"}, [
        record for record in records if record["status"] != "ok"
    ]
    for (
        record
    ) in records:  # this judge looks at the place of a text only, so its ratings tell the order in which it saw them
        by_place = [record["ratings"][response]["Helpfulness"] for response in record["orders"][0]]
        assert by_place == list(RATINGS)
        assert record["usage"]["prompt_tokens"] > 0

    built = build_dataset(responses, journal, tmp_path / "dataset")
    assert (built.items, built.pairs) == (4, 4)
    bias = built.quality["position_bias"]["first_minus_last"]
    assert bias["mean"] == bias["low"] == RATINGS[0] - RATINGS[1], "the report finds the bias"
    groups = load_preferences(tmp_path / "dataset", cache_dir=tmp_path / "cache")
    assert len(groups) == 4
    for group in groups:
        chosen, rejected = group["pairs"][0]
        assert group["ratings"][chosen]["Helpfulness"] == 4 and group["ratings"][rejected]["Helpfulness"] == 2
        colour = open_image(group["images"][0]).getpixel((0, 0))
        assert colour == Image.new("RGB", (1, 1), group["id"]).getpixel((0, 0))


def test_two_votes_cancel_the_position_bias_of_a_local_judge(tmp_path, models):
    from silkie.feedback import JudgeItem, LocalJudge, rate_items
    from silkie.inference import load_policy

    judge = LocalJudge(*load_policy(models / "judge"), rubric=RUBRIC, max_new_tokens=150)
    item = JudgeItem(
        id="a",
        prompt="what is it ?",
        responses=("a red circle", "a green square"),
        images=(Image.new("RGB", (56, 56), "red"),),
    )
    one, two = rate_items([item], judge)[0], rate_items([item], judge, votes=2)[0]
    assert sorted(row["Helpfulness"] for row in one.ratings) == [2, 4]
    assert [row["Helpfulness"] for row in two.ratings] == [3, 3]
    assert two.spread[0]["Helpfulness"] == 1
