"""Pools and draws: who draws what, repeated texts, resumption, and the responses file."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from silkie.endpoint.errors import ItemError
from silkie.feedback import sample
from silkie.feedback.inputs import read_items
from silkie.feedback.items import JudgeItem
from silkie.feedback.journal import JournalError, read_journal
from silkie.feedback.pool import (
    Member,
    Pool,
    PoolError,
    accepted_slots,
    draw_seed,
    load_pool,
    normalised,
    sampler_of,
    samplers,
)
from silkie.feedback.prompting import endpoint_messages, prompt_turns
from silkie.feedback.sample import SampleOptions, sample_file
from tests.support.feedback import ScriptedServer, completion, error, read_jsonl


def members(*names: str, **changes) -> Pool:
    return Pool(tuple(Member(name=name, base_url="http://localhost:1/v1", model=name, **changes) for name in names))


def test_k_draws_come_from_k_members_and_all_are_used_alike():
    pool = members("a", "b", "c", "d", "e")
    used: Counter[str] = Counter()
    for i in range(2000):
        names = [sampler_of(pool, f"item {i}", slot, 0, 4, 0).member.name for slot in range(4)]
        assert len(set(names)) == 4
        used.update(names)
    assert all(1500 < used[name] < 1700 for name in used), "4 of 5 each: 1600"


def test_weights_decide_how_often_a_member_is_chosen():
    pool = Pool((*members("often", weight=3.0).members, *members("rare").members))
    first = Counter(sampler_of(pool, f"item {i}", 0, 0, 1, 0).member.name for i in range(4000))
    assert 0.72 < first["often"] / 4000 < 0.78


def test_one_member_draws_at_all_its_temperatures():
    pool = members("a", temperatures=(0.2, 0.7, 1.2))
    assert [sampler_of(pool, "x", slot, 0, 4, 0).temperature for slot in range(4)] == [0.2, 0.7, 1.2, 0.2]
    assert [sampler.temperature for sampler in samplers(pool, "x", 0)] == [0.2, 0.7, 1.2]


def test_a_repeated_draw_moves_on_to_voices_that_no_slot_used():
    pool = members("a", "b", "c", "d", "e")
    first = {sampler_of(pool, "x", slot, 0, 4, 0).member.name for slot in range(4)}
    assert sampler_of(pool, "x", 0, 1, 4, 0).member.name not in first


def test_seeds_depend_on_every_part():
    seeds = {
        draw_seed(0, "a", 0, 0),
        draw_seed(1, "a", 0, 0),
        draw_seed(0, "b", 0, 0),
        draw_seed(0, "a", 1, 0),
        draw_seed(0, "a", 0, 1),
    }
    assert len(seeds) == 5 and all(0 <= seed < 2**31 for seed in seeds)
    assert draw_seed(0, "a", 0, 0) == draw_seed(0, "a", 0, 0)


def test_the_same_text_counts_once():
    assert normalised(" A  Cat. ") == normalised("a cat")
    assert accepted_slots(["A cat.", "a cat", None, "", "A dog."]) == [True, False, False, False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("members: []", "one or more pool members"),
        ("[1]", "list `members`"),
        ("members: [x]", r"`members\[0\]`: expected an element of a list of mappings with `name`, found 'x'"),
        ("members: [{name: a}]", "either `base_url`"),
        ("members: [{name: a, base_url: 'http://h/v1', local: d, model: m}]", "either `base_url`"),
        ("members: [{name: a, base_url: 'http://h/v1'}]", "needs `model`"),
        ("members: [{name: a, local: d, temperature: 1}]", r"unknown field `temperature` of `members\[0\]`"),
        (
            "members: [{name: a, local: d, temperatures: [-1]}]",
            r"`members\[0\]\.temperatures\[0\]`: expected an element of one or more temperatures >= 0, found -1",
        ),
        (
            "members: [{name: a, local: d, temperatures: [hot]}]",
            r"temperatures\[0\]`: expected an element of one or more temperatures >= 0, found 'hot'",
        ),
        (
            "members: [{name: a, local: d, max_tokens: '9'}]",
            r"`members\[0\]\.max_tokens`: expected a whole number of 1 or more, found '9'",
        ),
        ("members: [{name: a, local: d, concurrency: 0}]", "concurrency of 1 or more"),
        ("members: [{name: a, local: d}, {name: a, local: e}]", "distinct names"),
        ("members: [", "cannot read the pool"),
    ],
)
def test_a_broken_pool_is_explained(tmp_path, text, message):
    (tmp_path / "pool.yaml").write_text(text)
    with pytest.raises(PoolError, match=message):
        load_pool(tmp_path / "pool.yaml")


def test_prompts_become_chat_messages_with_their_images_in_place():
    item = JudgeItem(id="a", prompt="<image>Before. <image> After.", responses=(), images=("1", "2"))
    content = endpoint_messages(prompt_turns(item), iter(["url 1", "url 2"]))[0]["content"]
    assert [part.get("text") or part["image_url"]["url"] for part in content] == [
        "url 1",
        "Before. ",
        "url 2",
        " After.",
    ]
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    ]
    messages = endpoint_messages(
        prompt_turns(JudgeItem(id="a", prompt=turns, responses=(), images=("1",))), iter(["url"])
    )
    assert [message["role"] for message in messages] == ["system", "user"]
    with pytest.raises(ItemError, match="1 image parts, the item 0 images"):
        prompt_turns(JudgeItem(id="a", prompt=turns, responses=()))


def write_prompts(folder: Path, count: int) -> Path:
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    path = folder / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"image": "a.png", "prompt": f"question {i}", "topic": i % 2}) + "\n" for i in range(count))
    )
    return path


def question(body: dict) -> str:
    return next(part["text"] for part in body["messages"][0]["content"] if part["type"] == "text")


def pool_of(server: ScriptedServer, *names: str, **changes) -> Pool:
    return Pool(tuple(Member(name=name, base_url=server.url, model=name, **changes) for name in names))


OPTIONS = SampleOptions(k=3, concurrency=4, progress=False)


def test_every_prompt_gets_k_distinct_responses_in_the_order_of_the_input(tmp_path):
    def reply(n, body):
        return completion(f"{body['model']} says {body['seed'] % 3} to {question(body)}")

    prompts, out = write_prompts(tmp_path, 12), tmp_path / "out" / "responses.jsonl"
    out.parent.mkdir()
    with ScriptedServer(reply) as server:
        summary = sample_file(prompts, pool_of(server, "a", "b"), out, OPTIONS)
        assert (summary.complete, summary.short, summary.dropped, summary.stopped) == (12, 0, [], None)
        asked = len(server.requests)
        again = sample_file(prompts, pool_of(server, "a", "b"), out, OPTIONS)
        assert (again.complete, len(server.requests)) == (12, asked), "a finished run asks nothing"
    assert asked == summary.draws > 36, "some draws repeated a text and were drawn again"
    records = read_jsonl(out)
    assert [record["id"] for record in records] == [str(i) for i in range(1, 13)]
    assert records[3]["topic"] == 1, "further columns are kept"
    for record in records:
        texts = [response["response"] for response in record["responses"]]
        assert len(set(texts)) == 3
        assert all(
            text.startswith(response["model"]) for text, response in zip(texts, record["responses"], strict=True)
        )
    assert all(
        body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
        for body in server.requests
    )
    item = next(read_items(out))
    assert (out.parent / item.images[0]).exists(), "the image is found from the responses file as well"


def test_a_model_that_says_one_thing_gives_short_items_and_those_are_left_out(tmp_path):
    with ScriptedServer(
        lambda n, body: completion("Yes." if "question 0" in question(body) else f"{body['seed']}")
    ) as server:
        summary = sample_file(write_prompts(tmp_path, 3), pool_of(server, "a"), tmp_path / "r.jsonl", OPTIONS)
    assert (summary.complete, summary.dropped) == (2, ["1"])
    slots = [record for record in read_journal(tmp_path / "r.jsonl.journal") if record["id"] == "1"]
    assert len(slots) == 1 + 2 * (1 + OPTIONS.redraws), "one slot keeps the text, two are drawn again to the limit"


def test_a_failed_draw_is_drawn_again_and_recorded(tmp_path):
    def reply(n, body):
        return completion(None, refusal="I will not") if n < 2 else completion(f"{body['seed']}")

    with ScriptedServer(reply) as server:
        summary = sample_file(write_prompts(tmp_path, 2), pool_of(server, "a"), tmp_path / "r.jsonl", OPTIONS)
    assert summary.complete == 2
    failed = [record for record in read_journal(tmp_path / "r.jsonl.journal") if "error" in record]
    assert [record["error"]["kind"] for record in failed] == ["refused", "refused"]
    assert summary.spent.calls == 8 == summary.draws


def test_a_missing_image_is_told_and_drawn_once_it_is_there(tmp_path):
    prompts, out = write_prompts(tmp_path, 2), tmp_path / "r.jsonl"
    prompts.write_text(prompts.read_text().replace("a.png", "gone.png", 1))
    with ScriptedServer(lambda n, body: completion(f"{body['seed']}")) as server:
        first = sample_file(prompts, pool_of(server, "a"), out, OPTIONS)
        assert (first.complete, first.dropped, first.draws) == (1, ["1"], OPTIONS.k)
        assert "image, 1 item, the first of them '1': found 'gone.png'" in first.text()
        (tmp_path / "gone.png").write_bytes((tmp_path / "a.png").read_bytes())
        assert sample_file(prompts, pool_of(server, "a"), out, OPTIONS).complete == 2


def test_what_failed_is_told_with_an_example(tmp_path):
    with ScriptedServer(lambda n, body: completion(None, refusal="I will not")) as server:
        summary = sample_file(write_prompts(tmp_path, 2), pool_of(server, "a"), tmp_path / "r.jsonl", OPTIONS)
    assert "skipped, refused, 2 items, the first of them '1': " in summary.text()


def test_a_file_without_prompts_is_an_error(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with ScriptedServer(lambda n, body: completion("x")) as server, pytest.raises(ValueError, match="holds no prompts"):
        sample_file(tmp_path / "empty.jsonl", pool_of(server, "a"), tmp_path / "r.jsonl", OPTIONS)


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    limited = SampleOptions(k=2, concurrency=2, progress=False, max_tokens=1200)
    prompts, out = write_prompts(tmp_path, 10), tmp_path / "r.jsonl"
    with ScriptedServer(lambda n, body: completion(f"{body['seed']}")) as server:
        first = sample_file(prompts, pool_of(server, "a"), out, limited)
        assert first.stopped is not None and "token budget" in first.stopped and first.draws == 8
        second = sample_file(prompts, pool_of(server, "a"), out, SampleOptions(k=2, concurrency=2, progress=False))
        assert (second.complete, second.draws, len(server.requests)) == (10, 20, 20)


def test_a_wrong_key_stops_the_run_and_loses_nothing(tmp_path):
    def reply(n, body):
        return error(401, "bad key") if n >= 5 else completion(f"{body['seed']}")

    with ScriptedServer(reply) as server:
        summary = sample_file(write_prompts(tmp_path, 10), pool_of(server, "a"), tmp_path / "r.jsonl", OPTIONS)
    assert summary.stopped is not None and "rejects the key" in summary.stopped
    assert summary.draws == 5


def test_another_pool_seed_or_prompt_is_not_mixed_in(tmp_path):
    prompts, out = write_prompts(tmp_path, 2), tmp_path / "r.jsonl"
    with ScriptedServer(lambda n, body: completion(f"{body['seed']}")) as server:
        sample_file(prompts, pool_of(server, "a"), out, OPTIONS)
        with pytest.raises(JournalError, match="another pool, seed or k"):
            sample_file(prompts, pool_of(server, "b"), out, OPTIONS)
        prompts.write_text(prompts.read_text().replace("question 1", "question 9"))
        with pytest.raises(JournalError, match="another prompt"):
            sample_file(prompts, pool_of(server, "a"), out, OPTIONS)


def test_a_server_that_moved_is_the_same_pool(tmp_path):
    prompts, out = write_prompts(tmp_path, 2), tmp_path / "r.jsonl"
    for _ in range(2):
        with ScriptedServer(lambda n, body: completion(f"{body['seed']}")) as server:
            summary = sample_file(prompts, pool_of(server, "a"), out, OPTIONS)
    assert summary.draws == 6 and not server.requests


def test_an_error_of_one_member_keeps_the_answers_of_another(tmp_path, monkeypatch):
    prompts, out = write_prompts(tmp_path, 1), tmp_path / "r.jsonl"
    ask = sample.SampleRun._ask

    async def broken(self, draw):
        if draw.sampler.member.name == "b":
            raise OSError("disk on fire")
        await asyncio.sleep(0.05)
        return await ask(self, draw)

    monkeypatch.setattr(sample.SampleRun, "_ask", broken)
    with ScriptedServer(lambda n, body: completion("an answer")) as server:
        with pytest.raises(OSError, match="disk on fire"):
            sample_file(prompts, pool_of(server, "a", "b"), out, OPTIONS)
        assert {record["member"] for record in read_journal(tmp_path / "r.jsonl.journal")} == {"a"}


def test_the_prompts_are_not_written_over(tmp_path):
    prompts = write_prompts(tmp_path, 1)
    with (
        ScriptedServer(lambda n, body: completion("x")) as server,
        pytest.raises(ValueError, match="would replace the prompts"),
    ):
        sample_file(prompts, pool_of(server, "a"), tmp_path / "." / "prompts.jsonl", OPTIONS)
    assert not server.requests and "question 0" in prompts.read_text()
