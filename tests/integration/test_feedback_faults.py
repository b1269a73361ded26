"""`rate` against a misbehaving endpoint over real sockets, killed with SIGKILL on the way: nothing lost, nothing paid
twice."""

from __future__ import annotations

import json
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.support.feedback import ROOT, command, judge_server, read_jsonl, run_command, true_ratings, write_responses
from tests.support.judge_server import FAULTS, PAID

# What an item ends as when its fault never goes away.
FINAL = {"missing_aspect": "missing_aspect", "refusal": "refused", "wrong_count": "wrong_count", "rejected": "rejected"}


def finished(journal: Path) -> set[str]:
    """Ids of the whole lines of a journal."""
    if not journal.exists():
        return set()
    return {json.loads(line)["id"] for line in journal.read_bytes().split(b"\n")[:-1]}


def run_with_kills(tmp_path: Path, count: int, *, kills: int, concurrency: int, timeout: float) -> dict:
    """Rate `count` items, killing the process `kills` times on the way; check every promise and return figures."""
    responses, journal = write_responses(tmp_path, count), tmp_path / "journal.jsonl"
    snapshots: list[tuple[float, set[str]]] = []
    with judge_server(tmp_path, "--faults", "--slots", str(concurrency), "--latency", "0.02") as server:
        arguments = ["rate", responses, "--base-url", server.url, "--model", "judge", "--journal", journal]
        arguments += ["--concurrency", concurrency, "--timeout", timeout, "--quiet"]
        for kill in range(kills):
            target = (kill + 1) * count // (kills + 1)
            with subprocess.Popen(
                command(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ) as process:
                while len(finished(journal)) < target:
                    assert process.poll() is None, "the run ended before it could be killed"
                    time.sleep(0.01)
                process.kill()
            snapshots.append((time.time(), finished(journal)))
        if kills:  # and a kill in the middle of a line
            with journal.open("ab") as file:
                file.write(b'{"id": "item-torn", "status": "ok", "ratings": [{"Help')
        began = time.time()
        result = run_command(*arguments)
        seconds = time.time() - began
        assert result.returncode == 0, result.stderr
        events = server.events()

    records = read_jsonl(journal)
    truth = true_ratings(responses)
    assert Counter(record["id"] for record in records) == Counter(list(truth)), "every item has one line"
    for record in records:
        fault, when = FAULTS.get(int(record["id"][-4:]) % 40, ("good", "always"))
        if when == "always" and fault in FINAL:
            assert (record["status"], record["error"]["kind"]) == ("failed", FINAL[fault]), record
            assert record["attempts"] and all(attempt["raw"] for attempt in record["attempts"])
        else:
            assert record["status"] == "ok", record
            assert [row["Visual Faithfulness"] for row in record["ratings"]] == truth[record["id"]], (
                "the shuffle is undone"
            )
    # Nothing is asked again about an item whose line was on disk when the process was killed.
    for moment, ids in snapshots:
        assert not [event for event in events if event["time"] > moment and event["item"] in ids]
    # An item that was never in flight at a kill got exactly one good answer; the others at most one per life of the
    # process.
    good = Counter(event["item"] for event in events if event["outcome"] == "good")
    repeated = {item: number for item, number in good.items() if number > 1}
    assert len(repeated) <= kills * concurrency
    assert all(number <= kills + 1 for number in repeated.values())
    if not kills:
        assert not repeated
    outcomes = Counter(event["outcome"] for event in events)
    assert set(outcomes) >= {fault for fault, _ in FAULTS.values()} | {"good"}, "every fault was met"
    paid = sum(outcomes[name] for name in PAID)
    return {
        "paid": paid,
        "good": sum(good.values()),
        "repeated": len(repeated),
        "seconds": seconds,
        "outcomes": dict(outcomes),
    }


def test_a_hundred_items_with_every_fault_and_three_kills(tmp_path):
    run_with_kills(tmp_path, 120, kills=3, concurrency=8, timeout=2)


@pytest.mark.slow
def test_a_thousand_items_with_every_fault_and_three_kills(tmp_path):
    figures = run_with_kills(tmp_path, 1000, kills=3, concurrency=16, timeout=3)
    print(figures)


@pytest.mark.slow
def test_a_thousand_items_with_every_fault_pay_each_answer_once(tmp_path):
    figures = run_with_kills(tmp_path, 1000, kills=0, concurrency=16, timeout=3)
    print(figures)


def measure_throughput(tmp_path: Path, count: int, slots: int, latency: float) -> tuple[int, str]:
    """Most requests that waited at the server at a time; answers per second from the first to the last, in words."""
    responses = write_responses(tmp_path, count)
    with judge_server(tmp_path, "--slots", str(slots), "--latency", str(latency)) as server:
        arguments = [
            "rate",
            responses,
            "--base-url",
            server.url,
            "--model",
            "judge",
            "--journal",
            tmp_path / "journal.jsonl",
        ]
        result = run_command(*arguments, "--concurrency", 2 * slots, "--structured", "markdown", "--quiet")
        assert result.returncode == 0, result.stderr
        events = [event for event in server.events() if event["outcome"] == "good"]
    assert len(events) == count
    times = [event["time"] for event in events]
    rate = (count - slots) / (max(times) - min(times))
    return events[-1]["most_open"], f"{rate:.1f} answers/s of {slots / latency:.1f}"


def test_the_endpoint_never_waits_for_requests(tmp_path):
    """Twice as many as it works on at a time, and no more: seconds would depend on what else the machine does."""
    most_open, _ = measure_throughput(tmp_path, 60, slots=4, latency=0.3)
    assert most_open == 8


@pytest.mark.slow
def test_the_endpoint_never_waits_for_requests_of_a_thousand_items(tmp_path):
    most_open, rate = measure_throughput(tmp_path, 1000, slots=32, latency=1.0)
    print(rate)
    assert most_open == 64
