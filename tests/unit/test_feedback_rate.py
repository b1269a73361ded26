"""Rating items with any judge: order, votes, repeated questions; and whole runs of `rate_file` with what stops them."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from silkie.endpoint.errors import ItemError, StopRun
from silkie.feedback import (
    AnswerError,
    AspectRating,
    Endpoint,
    JudgeItem,
    OpenAIJudge,
    OracleJudge,
    Usage,
    Verdict,
    default_rubric,
    rate_item,
    rate_items,
)
from silkie.feedback.build import build_dataset
from silkie.feedback.inputs import RecordError, read_items
from silkie.feedback.items import instruction_text
from silkie.feedback.journal import JournalError, read_journal
from silkie.feedback.rate import UnusableAnswers, shown_order, unshuffle
from silkie.feedback.rate_run import RateOptions, rate_file
from tests.support.feedback import ScriptedServer, completion, true_ratings, write_responses
from tests.support.judge_server import markdown

NAMES = default_rubric().aspect_names
ITEM = JudgeItem(
    id="a",
    prompt="What?",
    responses=("one", "two", "three", "four"),
    models=("m1", "m2", "m3", "m4"),
    meta={"best": "three"},
)


def by_length(item: JudgeItem):
    return [dict.fromkeys(NAMES, float(len(text))) for text in item.responses]


class ScriptedJudge:
    """Answers by `script(item, attempt)`, which may raise; counts its calls."""

    name = "scripted"
    rubric = default_rubric()

    def __init__(self, script):
        self.script = script
        self.calls: list[tuple[str, int]] = []

    def rate(self, item, *, attempt=0):
        self.calls.append((item.id, attempt))
        rows = self.script(item, attempt)
        return Verdict(
            ratings=tuple({name: AspectRating(value) for name, value in row.items()} for row in rows),
            usage=Usage(1, 10, 5),
        )

    async def arate(self, item, *, attempt=0):
        await asyncio.sleep(0)
        return self.rate(item, attempt=attempt)


def quality(item, attempt):
    return [dict.fromkeys(NAMES, float(text[len("quality=")])) for text in item.responses]


def test_ratings_belong_to_their_responses_whatever_the_order_shown():
    shown: list[tuple[str, ...]] = []

    def fn(item):
        shown.append(item.responses)
        assert dict(zip(item.responses, item.models, strict=True)) == dict(
            zip(ITEM.responses, ITEM.models, strict=True)
        )
        return by_length(item)

    for seed in range(6):
        rated = asyncio.run(rate_item(ITEM, OracleJudge(fn), seed=seed))
        assert [row["Helpfulness"] for row in rated.ratings] == [3, 3, 5, 4]
        assert tuple(ITEM.responses[i] for i in rated.orders[0]) == shown[-1]
    assert len(set(shown)) > 1


def test_texts_that_a_rationale_names_are_renamed_with_the_order():
    why = "Text 1 beats texts 2, 3 and 4; text_9, Text 12 and answer 2 are something else."
    shown = Verdict(ratings=tuple({NAMES[0]: AspectRating(5, why)} for _ in range(4)))
    renamed = "Text 3 beats texts 1, 4 and 2; text_9, Text 12 and answer 2 are something else."
    assert {row[NAMES[0]].rationale for row in unshuffle(shown, (2, 0, 3, 1))} == {renamed}


def test_orders_are_seeded_fair_and_balanced_over_votes():
    assert shown_order("x", 4, seed=1) == shown_order("x", 4, seed=1)
    counts = Counter(
        (response, position) for i in range(4000) for position, response in enumerate(shown_order(f"item {i}", 4))
    )
    assert all(850 < counts[response, position] < 1150 for response in range(4) for position in range(4))
    for position in range(4):  # four votes show every response at every position
        assert {shown_order("x", 4, vote=vote)[position] for vote in range(4)} == {0, 1, 2, 3}
    assert len({shown_order("x", 5, attempt=attempt) for attempt in range(8)}) > 1


def test_a_position_bias_cancels_over_as_many_votes_as_responses():
    judge = OracleJudge(lambda item: [dict.fromkeys(NAMES, 5.0 - position) for position in range(len(item.responses))])
    rated = rate_items([ITEM], judge, votes=4)[0]
    assert [row["Helpfulness"] for row in rated.ratings] == [3.5] * 4
    assert rated.spread[0]["Helpfulness"] == pytest.approx(1.25**0.5)


def test_votes_give_mean_spread_and_the_nearest_rationale():
    script = iter([(1.0, "low"), (4.0, "mid"), (4.0, "mid 2")])

    def fn(item):
        value, why = next(script)
        return [{name: AspectRating(value, why) for name in NAMES} for _ in item.responses]

    rated = asyncio.run(rate_item(ITEM, OracleJudge(fn), votes=3))
    assert rated.ratings[0]["Helpfulness"] == 3.0
    assert rated.spread[0]["Helpfulness"] == pytest.approx(2**0.5)
    assert rated.rationales[0]["Helpfulness"] == "mid"
    assert [vote[0]["Helpfulness"] for vote in rated.vote_ratings] == [1, 4, 4]


def test_a_rating_that_is_not_applicable_stays_none():
    rated = rate_items([ITEM], OracleJudge(lambda item: [dict.fromkeys(NAMES) for _ in item.responses]), votes=2)[0]
    assert rated.ratings[0] == dict.fromkeys(NAMES)
    assert rated.spread[0] == dict.fromkeys(NAMES)


def test_an_unusable_answer_is_asked_again_in_another_order():
    orders = []

    def script(item, attempt):
        orders.append(item.responses)
        if attempt < 2:
            raise AnswerError("malformed", "no", raw=f"answer {attempt}", usage=Usage(1, 7, 3))
        return by_length(item)

    rated = asyncio.run(rate_item(ITEM, ScriptedJudge(script)))
    assert rated.usage == Usage(3, 24, 11), "the unusable answers were paid for"
    assert len(set(orders)) > 1
    assert [row["Helpfulness"] for row in rated.ratings] == [3, 3, 5, 4]


def test_after_all_attempts_every_raw_text_is_there():
    def script(item, attempt):
        raise AnswerError("refused", "no", raw=f"answer {attempt}")

    with pytest.raises(UnusableAnswers) as caught:
        asyncio.run(rate_item(ITEM, ScriptedJudge(script), attempts=2))
    assert [error.raw for error in caught.value.errors] == ["answer 0", "answer 1"]


def test_an_oracle_that_breaks_the_rules_is_explained():
    with pytest.raises(ValueError, match="expected 4 ratings"):
        rate_items([ITEM], OracleJudge(lambda item: []))
    with pytest.raises(ValueError, match="expected the aspects"):
        rate_items([ITEM], OracleJudge(lambda item: [{"Fun": 1.0}] * 4))
    with pytest.raises(ValueError, match="the scale is 1 to 5"):
        rate_items([ITEM], OracleJudge(lambda item: [dict.fromkeys(NAMES, 9.0)] * 4))


def test_prompts_as_text_and_as_conversation():
    assert instruction_text("<image>\nWhat?") == "What?"
    assert (
        instruction_text([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}])
        == "What?"
    )
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "What?"},
    ]
    assert instruction_text(turns) == "User: Hi\n\nAssistant: Yes?\n\nUser: What?"


QUIET = RateOptions(progress=False, concurrency=4)


def options(**changes) -> RateOptions:
    return RateOptions(**{"progress": False, "concurrency": 4, **changes})


def test_a_run_and_its_resumption(tmp_path):
    responses, journal = write_responses(tmp_path, 30), tmp_path / "j.jsonl"
    judge = ScriptedJudge(quality)
    summary = rate_file(responses, judge, journal, QUIET)
    assert (summary.items, summary.rated, summary.open, summary.stopped) == (30, 30, 0, None)
    assert {r["id"]: [row["Helpfulness"] for row in r["ratings"]] for r in read_journal(journal)} == true_ratings(
        responses
    )
    again = rate_file(responses, judge, journal, QUIET)
    assert (again.rated, again.done_now, len(judge.calls)) == (30, 0, 30)


def test_more_items_later_cost_only_the_new_ones(tmp_path):
    judge, journal = ScriptedJudge(quality), tmp_path / "j.jsonl"
    rate_file(write_responses(tmp_path, 10), judge, journal, QUIET)
    summary = rate_file(write_responses(tmp_path, 15), judge, journal, QUIET)
    assert (summary.rated, summary.done_now, len(judge.calls)) == (15, 5, 15)


def test_failures_are_recorded_once_and_retried_only_on_request(tmp_path):
    responses, journal = write_responses(tmp_path, 6), tmp_path / "j.jsonl"
    broken = {"item-0002", "item-0004"}

    def script(item, attempt):
        if item.id in broken:
            raise AnswerError("refused", "I will not", raw="I'm sorry", usage=Usage(1, 10, 1))
        return quality(item, attempt)

    judge = ScriptedJudge(script)
    summary = rate_file(responses, judge, journal, QUIET)
    assert (summary.rated, summary.failures, summary.open) == (4, {"refused": 2}, 0)
    failed = [record for record in read_journal(journal) if record["status"] == "failed"]
    assert {record["id"] for record in failed} == broken
    assert all(
        [attempt["raw"] for attempt in record["attempts"]] == ["I'm sorry"] * 3 and record["usage"]["calls"] == 3
        for record in failed
    )
    before = len(judge.calls)
    assert rate_file(responses, judge, journal, QUIET).failures == {"refused": 2}
    assert len(judge.calls) == before
    broken.clear()
    healed = rate_file(responses, judge, journal, options(retry_failed=True))
    assert (healed.rated, healed.failures, healed.done_now) == (6, {}, 2)
    assert healed.spent.calls == 4 + 6 + 2, "what the failed answers cost is not forgotten"


def test_a_missing_image_fails_its_item_without_a_call(tmp_path):
    responses, journal = write_responses(tmp_path, 3), tmp_path / "j.jsonl"
    lines = responses.read_text().splitlines()
    responses.write_text("\n".join([lines[0], lines[1].replace("red.png", "gone.png"), lines[2]]))
    judge = ScriptedJudge(quality)
    summary = rate_file(responses, judge, journal, QUIET)
    assert summary.failures == {"image": 1}
    assert "image, 1 item, the first of them '" in summary.text() and "gone.png" in summary.text()
    assert len(judge.calls) == 2
    record = next(record for record in read_journal(journal) if record["status"] == "failed")
    assert "gone.png" in record["error"]["message"]


def test_a_file_without_responses_is_an_error(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no responses"):
        rate_file(tmp_path / "empty.jsonl", ScriptedJudge(quality), tmp_path / "j.jsonl", QUIET)


def test_images_are_found_below_the_root(tmp_path):
    (tmp_path / "images").mkdir()
    responses = write_responses(tmp_path, 1)
    (tmp_path / "red.png").rename(tmp_path / "images" / "red.png")
    seen = []
    judge = ScriptedJudge(lambda item, attempt: seen.append(item.images) or quality(item, attempt))
    assert rate_file(responses, judge, tmp_path / "j.jsonl", options(image_root=str(tmp_path / "images"))).rated == 1
    assert seen[0][0]["path"].endswith("images/red.png")


def test_a_budget_stops_the_run_and_holds_for_the_next(tmp_path):
    responses, journal = write_responses(tmp_path, 40), tmp_path / "j.jsonl"
    judge = ScriptedJudge(quality)
    summary = rate_file(responses, judge, journal, options(max_tokens=150))
    assert summary.stopped is not None and "token budget" in summary.stopped
    assert summary.spent.tokens == 150 and summary.rated == 10 and summary.open == 30
    assert rate_file(responses, judge, journal, options(max_tokens=150)).done_now == 0
    assert rate_file(responses, judge, journal, QUIET).rated == 40
    assert len(judge.calls) == 40


def test_a_stop_keeps_what_is_done_and_nothing_else(tmp_path):
    responses, journal = write_responses(tmp_path, 20), tmp_path / "j.jsonl"

    def script(item, attempt):
        if item.id == "item-0010":
            raise StopRun("the key was rejected")
        return quality(item, attempt)

    summary = rate_file(responses, ScriptedJudge(script), journal, QUIET)
    assert summary.stopped == "the key was rejected"
    assert summary.open == 20 - summary.rated and 9 <= summary.rated <= 14
    finish = rate_file(responses, ScriptedJudge(quality), journal, QUIET)
    assert finish.rated == 20 and finish.stopped is None


def test_an_outage_stops_the_run_instead_of_failing_everything(tmp_path):
    responses, journal = write_responses(tmp_path, 60), tmp_path / "j.jsonl"

    def script(item, attempt):
        if item.id >= "item-0005":
            raise ItemError("connection", "refused")
        return quality(item, attempt)

    summary = rate_file(
        responses, ScriptedJudge(script), journal, options(concurrency=1)
    )  # in order: an answer in between would clear the row
    assert summary.stopped is not None and "in a row" in summary.stopped
    assert (summary.rated, summary.failures) == (5, {}), "unanswered items stay open"
    assert rate_file(responses, ScriptedJudge(quality), journal, QUIET).rated == 60


def test_single_unanswered_items_are_failures(tmp_path):
    responses, journal = write_responses(tmp_path, 60), tmp_path / "j.jsonl"

    def script(item, attempt):
        if item.id.endswith("5"):
            raise ItemError("timeout", "no answer")
        return quality(item, attempt)

    summary = rate_file(responses, ScriptedJudge(script), journal, QUIET)
    assert (summary.rated, summary.failures, summary.open, summary.stopped) == (54, {"timeout": 6}, 0, None)


def test_votes_survive_a_stop_between_them(tmp_path):
    responses, journal = write_responses(tmp_path, 1), tmp_path / "j.jsonl"
    count = 0

    def script(item, attempt):
        nonlocal count
        count += 1
        if count == 3:
            raise StopRun("killed")
        return quality(item, attempt)

    judge = ScriptedJudge(script)
    first = rate_file(responses, judge, journal, options(votes=3))
    assert (first.rated, len(judge.calls)) == (0, 3)
    second = rate_file(responses, judge, journal, options(votes=3))
    assert (second.rated, len(judge.calls)) == (1, 4), "two votes were on the disk, one was asked for"
    record = next(iter(read_journal(journal)))
    assert len(record["orders"]) == len(record["vote_ratings"]) == 3
    assert record["usage"]["calls"] == 3
    assert not list(tmp_path.glob("j.jsonl.parts*"))


def test_no_file_is_removed_while_it_is_open(tmp_path, monkeypatch):
    """Windows refuses that."""
    removed, remove = [], Path.unlink

    def closed(self, **options):
        opened = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        assert str(self) not in opened
        removed.append(self.name)
        remove(self, **options)

    monkeypatch.setattr(Path, "unlink", closed)
    rate_file(write_responses(tmp_path, 1), ScriptedJudge(quality), tmp_path / "j.jsonl", options(votes=3))
    assert "j.jsonl.parts" in removed


def test_unusable_answers_survive_a_stop_and_are_not_paid_for_again(tmp_path):
    responses, journal = write_responses(tmp_path, 1), tmp_path / "j.jsonl"

    def script(item, attempt):
        if len(judge.calls) == 3:
            raise StopRun("killed")
        raise AnswerError("malformed", "no", raw=f"text {attempt}", usage=Usage(1, 10, 5))

    judge = ScriptedJudge(script)
    assert rate_file(responses, judge, journal, QUIET).stopped == "killed"
    assert rate_file(responses, judge, journal, QUIET).failures == {"malformed": 1}
    assert [attempt for _, attempt in judge.calls] == [0, 1, 2, 2], "two answers were on the disk"
    record = next(read_journal(journal))
    assert [entry["raw"] for entry in record["attempts"]] == ["text 0", "text 1", "text 2"]
    assert record["usage"]["calls"] == 3
    judge.calls.clear()
    rate_file(responses, judge, journal, options(retry_failed=True))
    assert [attempt for _, attempt in judge.calls][:2] == [0, 1], "a new go begins anew"


def test_the_unusable_answers_before_a_lost_endpoint_keep_their_texts(tmp_path):
    responses, journal = write_responses(tmp_path, 1), tmp_path / "j.jsonl"

    def script(item, attempt):
        if attempt == 0:
            raise AnswerError("malformed", "no", raw="paid for", usage=Usage(1, 10, 5))
        raise ItemError("server_error", "gone")

    rate_file(responses, ScriptedJudge(script), journal, QUIET)
    record = next(read_journal(journal))
    assert (record["error"]["kind"], [entry["raw"] for entry in record["attempts"]]) == ("server_error", ["paid for"])
    assert record["usage"]["calls"] == 1


def test_an_unexpected_error_is_raised_as_it_is_and_keeps_the_answers_under_way(tmp_path):
    responses, journal = write_responses(tmp_path, 8), tmp_path / "j.jsonl"

    class Slow(ScriptedJudge):
        async def arate(self, item, *, attempt=0):
            await asyncio.sleep(0 if item.id == "item-0002" else 0.1)
            return self.rate(item, attempt=attempt)

    def script(item, attempt):
        if item.id == "item-0002":
            raise ValueError("a rule is broken")
        return quality(item, attempt)

    judge = Slow(script)
    with pytest.raises(ValueError, match="a rule is broken"):
        rate_file(responses, judge, journal, options(concurrency=4))
    assert {record["id"] for record in read_journal(journal)} == {"item-0000", "item-0001", "item-0003"}
    assert len(judge.calls) == 4, "nothing new was begun"
    with pytest.raises(ValueError, match="concurrency 0"):
        rate_file(responses, judge, journal, options(concurrency=0))


def test_the_summary_is_about_the_items_of_the_input(tmp_path):
    responses, journal = write_responses(tmp_path, 5), tmp_path / "j.jsonl"
    rate_file(responses, ScriptedJudge(quality), journal, QUIET)
    responses.write_text("".join(responses.read_text().splitlines(keepends=True)[:2]))
    summary = rate_file(responses, ScriptedJudge(quality), journal, QUIET)
    assert (summary.items, summary.rated, summary.open, summary.spent.calls) == (2, 2, 0, 5)


def test_one_judge_serves_several_runs_and_single_calls(tmp_path):
    responses = write_responses(tmp_path, 2)
    item = JudgeItem(id="a", prompt="What?", responses=("quality=1", "quality=2"))

    def reply(n, body):
        count = body["messages"][0]["content"][-1]["text"].count("### Text ")
        return completion(markdown([3] * count))

    with ScriptedServer(reply) as server:
        judge = OpenAIJudge(Endpoint(server.url, "judge"), structured="markdown")
        sleep = judge.endpoint.sleep
        for name in ("a", "b"):
            assert rate_file(responses, judge, tmp_path / name, QUIET).rated == 2
            assert judge.rate(item).ratings[0]["Helpfulness"].rating == 3
            assert len(rate_items([item], judge)) == 1
        assert judge.endpoint.sleep == sleep, "the stop of a finished run has no say in later calls"


@pytest.mark.parametrize(
    "line", ['{"id": "a"}', '{"prompt": "p"}', '{"id": "a", "item": "x", "status": "ok", "judge": "j"}']
)
def test_a_file_that_is_no_journal_of_ratings_is_refused_and_kept(tmp_path, line):
    responses, journal = write_responses(tmp_path, 1), tmp_path / "j.jsonl"
    journal.write_text(line + "\n")
    with pytest.raises(JournalError, match="line 1 is a JSON object of another kind"):
        rate_file(responses, ScriptedJudge(quality), journal, QUIET)
    assert journal.read_text() == line + "\n"


@pytest.mark.parametrize(
    ("usable", "rated", "calls"), [("100", 0, 3), ("010", 0, 3), ("00", 0, 2), ("110", 1, 3), ("011", 1, 3)]
)
def test_more_than_half_of_the_votes_must_be_usable(tmp_path, usable, rated, calls):
    """And once they cannot be, no further vote is paid for."""
    responses = write_responses(tmp_path, 1)
    votes = iter(usable)

    def script(item, attempt):
        if next(votes) == "0":
            raise AnswerError("malformed", "no", raw="x")
        return quality(item, attempt)

    judge = ScriptedJudge(script)
    summary = rate_file(responses, judge, tmp_path / "j.jsonl", options(votes=3, attempts=1))
    assert (summary.rated, len(judge.calls)) == (rated, calls)


def test_what_would_mix_up_a_journal_is_refused_before_any_call(tmp_path):
    responses, journal = write_responses(tmp_path, 3), tmp_path / "j.jsonl"
    rate_file(responses, ScriptedJudge(quality), journal, QUIET)
    other = ScriptedJudge(quality)
    other.name = "another"
    with pytest.raises(JournalError, match="two judges do not mix"):
        rate_file(responses, other, journal, QUIET)
    changed = responses.read_text().replace("item-0001: what", "item-0001: who")
    responses.write_text(changed)
    with pytest.raises(JournalError, match="'item-0001' was rated with another prompt"):
        rate_file(responses, ScriptedJudge(quality), journal, QUIET)
    assert not other.calls


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[" * 50_000, "line 2: not valid JSON"),
        ("[]", "line 2: found list"),
        ('{"id": "x", "prompt": "p"}', "'responses'"),
        ('{"id": "x", "prompt": "p", "responses": []}', "'responses'"),
        ('{"id": "x", "prompt": "p", "responses": ["text"]}', "'responses'"),
        ('{"prompt": "p", "responses": [{"response": "r"}]}', "'id'"),
        ('{"id": "item-0000", "prompt": "p", "responses": [{"response": "r"}]}', "line 1 has it too"),
        ('{"id": "x", "prompt": "", "responses": [{"response": "r"}]}', "'prompt'"),
        ('{"id": "x", "prompt": [{"role": "user", "content": 5}], "responses": [{"response": "r"}]}', "'prompt'"),
        (
            '{"id": "x", "prompt": [{"role": "user", "content": [{"type": "video"}]}], "responses": [{"response": "r"}]}',
            "'prompt'",
        ),
        ('{"id": "x", "prompt": "p", "image": 7, "responses": [{"response": "r"}]}', "'image'"),
    ],
)
def test_a_broken_line_is_named_before_any_call(tmp_path, line, message):
    responses = write_responses(tmp_path, 1)
    responses.write_text(responses.read_text() + line + "\n")
    judge = ScriptedJudge(quality)
    with pytest.raises(RecordError, match=message):
        rate_file(responses, judge, tmp_path / "j.jsonl", QUIET)
    assert not judge.calls


def test_items_keep_several_images_and_further_columns(tmp_path):
    record = {"id": 7, "image": ["a.png", "b.png"], "prompt": "p", "responses": [{"response": "r"}], "topic": "cats"}
    (tmp_path / "r.jsonl").write_text(json.dumps(record))
    item = next(read_items(tmp_path / "r.jsonl"))
    assert (item.id, item.images, item.models, item.meta) == ("7", ("a.png", "b.png"), ("unknown",), {"topic": "cats"})


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_go_out_as_they_are_where_endpoints_take_them(tmp_path):
    from silkie.endpoint.media import encoded_image

    Image.new("RGB", (8, 4), (1, 2, 3)).save(tmp_path / "a.jpg")
    assert encoded_image(str(tmp_path / "a.jpg")) == ((tmp_path / "a.jpg").read_bytes(), "image/jpeg")
    Image.new("RGB", (8, 4)).save(tmp_path / "a.bmp")
    assert encoded_image(str(tmp_path / "a.bmp"))[1] == "image/png"
    small, mime = encoded_image(str(tmp_path / "a.jpg"), max_side=4)
    assert mime == "image/png" and small != (tmp_path / "a.jpg").read_bytes()
    Image.new("1", (9500, 9500)).save(tmp_path / "vast.png")
    with pytest.raises(
        ItemError, match="would decode to 9500 x 9500"
    ):  # `build` and training would refuse it, after it was paid for
        encoded_image(str(tmp_path / "vast.png"))
    (tmp_path / "secret.txt").write_text("root:x:0:0")
    with pytest.raises(ItemError, match="not an image"):
        encoded_image(str(tmp_path / "secret.txt"))


def test_what_is_written_carries_the_id_as_it_was_given(tmp_path):
    """A file that numbers its items is joined with its journal by number; the same run again knows them as well."""
    responses, journal = write_responses(tmp_path, 3), tmp_path / "j.jsonl"
    lines = [json.loads(line) | {"id": i} for i, line in enumerate(responses.read_text().splitlines())]
    responses.write_text("\n".join(map(json.dumps, lines)))
    judge = ScriptedJudge(quality)
    assert rate_file(responses, judge, journal, QUIET).rated == 3
    assert {record["id"] for record in read_journal(journal)} == {0, 1, 2}
    assert rate_file(responses, judge, journal, QUIET).done_now == 0
    built = build_dataset(responses, journal, tmp_path / "set")
    assert (built.items, built.skipped) == (3, {})


def test_a_byte_order_mark_is_no_broken_line_and_a_broken_byte_is(tmp_path):
    responses = write_responses(tmp_path, 2)
    whole = responses.read_bytes()
    responses.write_bytes(b"\xef\xbb\xbf" + whole)
    assert [item.id for item in read_items(responses)] == ["item-0000", "item-0001"]
    responses.write_bytes(whole.replace(b"item-0001: what", b"item-0001: wh\xff"))
    with pytest.raises(RecordError, match="line 2"):
        list(read_items(responses))
