"""The command line: exit codes, messages, keys, and stopping a run from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest

from silkie.feedback.__main__ import main
from tests.support.feedback import (
    ROOT,
    ScriptedServer,
    command,
    completion,
    error,
    judge_server,
    read_jsonl,
    true_ratings,
    write_responses,
)
from tests.support.judge_server import markdown


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch):
    monkeypatch.delenv("SILKIE_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def reply(n, body):
    """The judge of `tests.support.judge_server` in this process."""
    import re

    text = body["messages"][0]["content"][-1]["text"]
    return completion(markdown([int(q) for q in re.findall(r"quality=(\d)", text)]))


def rate(folder, server, *options) -> int:
    base = [
        "rate",
        str(folder / "responses.jsonl"),
        "--base-url",
        server.url,
        "--model",
        "judge",
        "--journal",
        str(folder / "j.jsonl"),
    ]
    return main([*base, "--quiet", *map(str, options)])


def status(run) -> int:
    """The exit status, whether the parser or the command found the fault."""
    try:
        return run()
    except SystemExit as end:
        return end.code


def test_rate_then_build(tmp_path, capsys):
    responses = write_responses(tmp_path, 6)
    with ScriptedServer(reply) as server:
        assert rate(tmp_path, server, "--price-prompt", 1, "--price-completion", 2, "--max-cost", 5) == 0
    assert "6 items: 6 rated, 0 failed, 0 open" in (printed := capsys.readouterr().out)
    assert "6 answers, 900 tokens, cost 0.0012" in printed
    truth = true_ratings(responses)
    for record in read_jsonl(tmp_path / "j.jsonl"):
        assert [row["Helpfulness"] for row in record["ratings"]] == truth[record["id"]]
        assert record["usage"]["cost"] == pytest.approx((100 * 1 + 50 * 2) / 1e6)
    built = ["build", str(responses), "--journal", str(tmp_path / "j.jsonl"), "--out", str(tmp_path / "set")]
    assert main([*built, "--pairs", "best_vs_worst", "--reference", str(tmp_path / "j.jsonl")]) == 0
    assert "6 items, 6 pairs" in (printed := capsys.readouterr().out) and "## Agreement with the reference" in printed
    assert main(built) == 2
    assert "already holds" in capsys.readouterr().err


def test_the_image_and_all_responses_go_out_in_one_call(tmp_path):
    write_responses(tmp_path, 1)
    with ScriptedServer(reply) as server:
        assert rate(tmp_path, server) == 0
    content = server.requests[0]["messages"][0]["content"]
    assert len(server.requests) == 1
    assert sum(part["type"] == "image_url" for part in content) == 1
    assert all(f"### Text {i}" in content[-1]["text"] for i in (1, 2, 3, 4))
    assert server.requests[0]["response_format"]["json_schema"]["strict"] is True


def test_several_votes_show_every_response_at_several_places(tmp_path):
    write_responses(tmp_path, 2)
    with ScriptedServer(reply) as server:
        assert rate(tmp_path, server, "--votes", 4) == 0
    assert len(server.requests) == 8 and server.requests[0]["temperature"] == 0.7
    record = read_jsonl(tmp_path / "j.jsonl")[0]
    assert {order[0] for order in record["orders"]} == {0, 1, 2, 3}
    assert record["spread"][0]["Helpfulness"] == 0


def test_the_key_is_sent_but_never_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-in-no-file")
    write_responses(tmp_path, 3)

    def leaky(n, body):
        return (
            error(400, "denied for sk-secret-in-no-file")
            if n == 0
            else completion("I cannot help, sk-secret-in-no-file")
        )

    with ScriptedServer(leaky) as server:
        assert rate(tmp_path, server, "--structured", "markdown", "--concurrency", 1) == 1, "every item failed"
    assert server.headers[0]["authorization"] == "Bearer sk-secret-in-no-file"
    output = capsys.readouterr()
    written = "".join(path.read_text() for path in tmp_path.iterdir() if path.suffix != ".png")
    assert "sk-secret" not in written + output.out + output.err
    assert "[key]" in written


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--concurrency", 0], "--concurrency: expected a whole number of at least 1, found '0'"),
        (["--votes", 0], "--votes: expected a whole number of at least 1, found '0'"),
        (["--max-image-side", 0], "--max-image-side: expected a whole number of at least 1"),
        (["--timeout", 0], "--timeout: expected a number of more than 0, found '0'"),
        (["--timeout", "nan"], "expected a number of more than 0"),
        (["--temperature", -1], "--temperature: expected a number of at least 0, found '-1'"),
        (["--max-cost", 1], "needs prices"),
        (["--rubric", "none.yaml"], "cannot read the rubric"),
        (["--key-variable", "NOT_SET_AT_ALL"], "NOT_SET_AT_ALL is not set"),
        (["--local", "dir"], "two judges"),
    ],
)
def test_wrong_options_are_explained(tmp_path, capsys, options, message):
    write_responses(tmp_path, 1)
    with ScriptedServer(reply) as server:
        assert status(lambda: rate(tmp_path, server, *options)) == 2
    assert message in capsys.readouterr().err
    assert not server.requests


def test_sample_needs_one_source(tmp_path, capsys):
    assert main(["sample", "p.jsonl", "--out", str(tmp_path / "r.jsonl")]) == 2
    assert "exactly one of" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--temperatures", "0.5"], ["--max-answer-tokens", "9"], ["--price-prompt", "1"]])
def test_options_that_a_pool_decides_are_refused_beside_it(tmp_path, capsys, option):
    (tmp_path / "pool.yaml").write_text("members: [{name: a, local: d}]")
    assert (
        main(["sample", "p.jsonl", "--out", str(tmp_path / "r.jsonl"), "--pool", str(tmp_path / "pool.yaml"), *option])
        == 2
    )
    assert f"{option[0]} is an option of one member" in capsys.readouterr().err


def test_options_of_an_endpoint_are_refused_for_a_local_judge(tmp_path, capsys):
    base = ["rate", "r.jsonl", "--journal", str(tmp_path / "j.jsonl"), "--local", "d"]
    assert main([*base, "--max-budget-tokens", "9"]) == 2
    assert "--max-budget-tokens is an option of an endpoint" in capsys.readouterr().err


def test_sample_from_one_endpoint(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Say something."}\n')
    with ScriptedServer(lambda n, body: completion(f"{body['seed']} at {body['temperature']}")) as server:
        options = ["--base-url", server.url, "--model", "m", "--k", "3", "--temperatures", "0.5", "1.0", "--quiet"]
        assert main(["sample", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "r.jsonl"), *options]) == 0
    assert "1 items: 1 complete" in capsys.readouterr().out
    assert sorted(body["temperature"] for body in server.requests) == [0.5, 0.5, 1.0]
    assert len(read_jsonl(tmp_path / "r.jsonl")[0]["responses"]) == 3


def test_sigterm_ends_cleanly_and_a_second_process_is_kept_out(tmp_path):
    responses, journal = write_responses(tmp_path, 60), tmp_path / "j.jsonl"
    with judge_server(tmp_path, "--slots", "4", "--latency", "0.2") as server:
        arguments = [
            "rate",
            responses,
            "--base-url",
            server.url,
            "--model",
            "judge",
            "--journal",
            journal,
            "--concurrency",
            "4",
        ]
        with subprocess.Popen(
            command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            while not (journal.exists() and journal.stat().st_size):
                assert process.poll() is None
                time.sleep(0.02)
            assert main([*map(str, arguments), "--quiet"]) == 2, "two writers"
            os.kill(process.pid, signal.SIGTERM)
            output, errors = process.communicate(timeout=60)
        assert process.returncode == 3, errors
        assert "stopped by SIGTERM" in output and "run the same command again" in output
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        answered = {event["item"] for event in server.events() if event["outcome"] == "good"}
        assert {line["id"] for line in lines} == answered, "answers under way were kept"
        assert 0 < len(lines) < 60
        assert main([*map(str, arguments), "--quiet"]) == 0
        assert len(read_jsonl(journal)) == 60
        good = [event["item"] for event in server.events() if event["outcome"] == "good"]
        assert len(good) == len(set(good)) == 60


def test_a_repeated_question_gets_more_room_where_the_server_has_it(tmp_path):
    """The first answer is cut. A server whose context holds no more than the room of the first question is asked with
    that room again."""
    write_responses(tmp_path, 1)

    def small_context(n, body):
        if body["max_tokens"] > 2048:
            return error(400, "maximum context length is 4096 tokens, you requested 5000")
        return completion("#### Helpfulness Assessment", finish="length") if n == 0 else reply(n, body)

    with ScriptedServer(small_context) as server:
        assert rate(tmp_path, server, "--structured", "markdown") == 0
    assert [body["max_tokens"] for body in server.requests] == [2048, 4096, 2048]
    record = read_jsonl(tmp_path / "j.jsonl")[0]
    assert record["status"] == "ok" and record["usage"]["calls"] == 2, "the cut answer was paid for as well"
