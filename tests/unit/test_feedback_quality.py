"""The quality report on judges whose faults are known, and the dataset that `build` writes."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import replace

import datasets
import pytest
from PIL import Image

from silkie.data import load_preferences, open_image
from silkie.endpoint.errors import ItemError
from silkie.feedback import OracleJudge, default_rubric, write_vlfeedback
from silkie.feedback.build import build_dataset, read_reference
from silkie.feedback.inputs import RecordError
from silkie.feedback.journal import JournalError
from silkie.feedback.quality import (
    Judged,
    distributions,
    judge_agreement,
    length_bias,
    overall,
    per_model,
    position_bias,
    quality_markdown,
    quality_report,
    vote_spread,
)
from silkie.feedback.rate_run import RateOptions, rate_file
from silkie.feedback.vlfeedback import vlfeedback_row
from tests.support.feedback import true_ratings, write_responses

NAMES = default_rubric().aspect_names


def judged(number: int, scores: list[float | None], *, order=None, lengths=None, models=None, **changes) -> Judged:
    rows = [dict.fromkeys(NAMES, score) for score in scores]
    k = len(scores)
    return Judged(
        id=str(number),
        models=tuple(models or (f"m{i}" for i in range(k))),
        lengths=tuple(lengths or range(1, k + 1)),
        ratings=rows,
        orders=[order or list(range(k))],
        vote_ratings=[rows],
        **changes,
    )


def random_items(count: int, rate) -> list[Judged]:
    """`rate(rng, position, length)` gives a rating; orders and lengths are random."""
    rng = random.Random(0)
    items = []
    for i in range(count):
        order = rng.sample(range(4), 4)
        lengths = [rng.randint(10, 500) for _ in range(4)]
        items.append(judged(i, [rate(rng, order.index(r), lengths[r]) for r in range(4)], order=order, lengths=lengths))
    return items


def test_a_fair_judge_shows_no_bias():
    items = random_items(600, lambda rng, position, length: float(rng.randint(1, 5)))
    gap = position_bias(items)["first_minus_last"]
    assert gap["low"] < 0 < gap["high"] and gap["high"] - gap["low"] < 0.5
    longer = length_bias(items)["longer_wins"]
    assert longer["low"] < 0.5 < longer["high"]
    assert length_bias(items)["tie_share"] == pytest.approx(0.2, abs=0.03)


def test_a_judge_that_prefers_the_first_place_is_found():
    items = random_items(300, lambda rng, position, length: rng.randint(1, 4) + (position == 0))
    bias = position_bias(items)
    assert bias["first_minus_last"]["low"] > 0.7
    assert bias["by_position"]["1"]["mean"] == pytest.approx(0.75, abs=0.15)
    assert sum(entry["mean"] for entry in bias["by_position"].values()) == pytest.approx(0, abs=1e-9)


def test_a_judge_that_prefers_length_is_found():
    items = random_items(300, lambda rng, position, length: 5.0 if length > 250 else 1.0)
    assert length_bias(items)["longer_wins"]["mean"] == 1.0


def test_averages_and_win_rates_per_model():
    report = per_model([judged(0, [5.0, 1.0], models=["x", "y"]), judged(1, [3.0, 3.0], models=["x", "y"])])
    assert report["x"]["means"]["Helpfulness"] == 4.0 and report["y"]["means"]["Helpfulness"] == 2.0
    assert report["x"]["win_rate"]["mean"] == 0.75 and report["y"]["win_rate"]["mean"] == 0.25


def test_distributions_count_every_rating():
    shares = distributions([judged(0, [1.0, 2.0, 2.0, None])])["Helpfulness"]
    assert shares == {"1": 0.25, "2": 0.5, "N/A": 0.25}


def test_distributions_keep_the_steps_of_the_scale_and_its_order():
    item = judged(0, [10.0, 9.0, 0.5, 0.0])
    assert list(distributions([item])["Helpfulness"]) == ["0", "0.5", "9", "10"]
    assert "| aspect | 0 | 0.5 | 9 | 10 |" in quality_markdown(quality_report([item]))
    voted = replace(item, vote_ratings=[*item.vote_ratings, judged(0, [9.0] * 4).ratings])
    assert distributions([voted])["Helpfulness"]["9"] == 5 / 8, "every vote counts"


def test_a_model_is_not_compared_with_itself():
    report = per_model([judged(0, [5.0, 1.0, 3.0], models=["x", "x", "y"])])
    assert report["x"]["win_rate"] == report["y"]["win_rate"] | {"n": 2} and report["x"]["win_rate"]["mean"] == 0.5
    alone = per_model([judged(0, [5.0, 1.0], models=["x", "x"])])
    assert alone["x"]["win_rate"] is None and alone["x"]["means"]["Helpfulness"] == 3.0


def test_agreement_compares_equal_aspects_and_knows_last_bits():
    thirds = judged(0, [1.0, 1.0])
    rows = [{NAMES[0]: 4.0, NAMES[1]: 3.0, NAMES[2]: 3.0}, {NAMES[0]: 2.0, NAMES[1]: 2.0, NAMES[2]: 3.0}]
    item = replace(thirds, ratings=rows)
    lower = [{name: value - 1 for name, value in row.items()} for row in rows]
    assert judge_agreement([item], {"0": lower})["overall"]["within_one"]["mean"] == 1.0
    found = judge_agreement([item], {"0": [{NAMES[0]: 4.0}, {NAMES[0]: 2.0}]})
    assert found["overall"] == found[NAMES[0]] and found["overall"]["bias"]["mean"] == 0.0


def test_overall_needs_every_aspect():
    assert overall({"a": 1.0, "b": 2.0}) == 1.5
    assert overall({"a": 1.0, "b": None}) is None


def test_agreement_is_one_with_itself_half_without_knowledge_and_none_when_turned_round():
    items = random_items(100, lambda rng, position, length: float(rng.randint(1, 5)))
    same = {item.id: item.ratings for item in items}
    assert judge_agreement(items, same)["overall"]["pairwise"]["mean"] == 1.0
    turned = {item.id: [{name: 6 - value for name, value in row.items()} for row in item.ratings] for item in items}
    assert judge_agreement(items, turned)["overall"]["pairwise"]["mean"] == 0.0
    flat = [judged(int(item.id), [3.0] * 4) for item in items]
    found = judge_agreement(flat, same)["Helpfulness"]
    assert found["pairwise"]["mean"] == 0.5, "a tie decides nothing"
    noise = {
        item.id: random_items(1, lambda rng, p, n, i=item.id: float(random.Random(f"{i} {n}").randint(1, 5)))[0].ratings
        for item in items
    }
    blind = judge_agreement(items, noise)["overall"]["pairwise"]
    assert blind["low"] < 0.5 < blind["high"]


def test_agreement_counts_only_shared_items_and_checks_their_size():
    items = [judged(0, [1.0, 5.0]), judged(1, [1.0, 5.0])]
    found = judge_agreement(items, {"0": [{"Helpfulness": 2.0}, {"Helpfulness": 4.0}], "other": []})
    assert found["items"] == 1 and "Visual Faithfulness" not in found
    assert found["Helpfulness"]["within_one"]["mean"] == 1.0 and found["Helpfulness"]["bias"]["mean"] == 0.0
    assert found["overall"]["pairwise"]["n"] == 1
    with pytest.raises(ValueError, match="found 1 ratings; expected 2"):
        judge_agreement(items, {"0": [{"Helpfulness": 2.0}]})


def test_the_spread_of_votes():
    assert vote_spread([judged(0, [3.0])]) is None
    assert vote_spread([judged(0, [3.0], spread=[dict.fromkeys(NAMES, 0.5)])]) == dict.fromkeys(NAMES, 0.5)


def test_the_report_is_json_and_reads_as_a_page():
    items = random_items(30, lambda rng, position, length: float(rng.randint(1, 5)))
    report = quality_report(items, {item.id: item.ratings for item in items})
    assert json.loads(json.dumps(report))["items"] == 30
    page = quality_markdown(report)
    assert (
        "| Visual Faithfulness |" in page and "100.0 % [100.0, 100.0]" in page and "first minus last position" in page
    )


def oracle(item):
    return [dict.fromkeys(NAMES, float(text[len("quality=")])) for text in item.responses]


def rated(folder, count=8):
    responses, journal = write_responses(folder, count), folder / "journal.jsonl"
    rate_file(responses, OracleJudge(oracle), journal, RateOptions(progress=False))
    return responses, journal


def test_build_gives_a_dataset_that_loads_as_preference_groups(tmp_path):
    responses, journal = rated(tmp_path)
    built = build_dataset(responses, journal, tmp_path / "set", reference=read_reference(journal))
    assert (built.items, built.pairs, built.pairless, built.skipped) == (8, 48, 0, {})
    truth = true_ratings(responses)
    groups = load_preferences(tmp_path / "set", cache_dir=tmp_path / "cache")
    for group in groups:
        qualities = truth[group["id"]]
        assert [row["Visual Faithfulness"] for row in group["ratings"]] == qualities
        assert len(group["pairs"]) == 6 and all(
            qualities[chosen] > qualities[rejected] for chosen, rejected in group["pairs"]
        )
        assert open_image(group["images"][0]).getpixel((0, 0)) == (200, 30, 30)
    with (tmp_path / "set" / "pairs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 48
    assert {(row["id"], int(row["chosen"]), int(row["rejected"])) for row in rows} == {
        (g["id"], *pair) for g in groups for pair in g["pairs"]
    }
    assert all(
        float(row["margin"]) == truth[row["id"]][int(row["chosen"])] - truth[row["id"]][int(row["rejected"])]
        for row in rows
    )
    assert built.quality["agreement"]["overall"]["pairwise"]["mean"] == 1.0
    assert json.loads((tmp_path / "set" / "quality.json").read_text()) == json.loads(json.dumps(built.quality))


def test_build_leaves_out_what_is_not_rated_and_says_so(tmp_path):
    responses, journal = rated(tmp_path)
    lines = journal.read_text().splitlines()
    broken = json.loads(lines[0]) | {"status": "failed", "error": {"kind": "refused", "message": "no"}, "attempts": []}
    del broken["ratings"]
    journal.write_text("\n".join([json.dumps(broken), *lines[1:-1]]) + "\n")
    built = build_dataset(responses, journal, tmp_path / "set", pairs="best_vs_worst")
    assert (built.items, built.pairs, built.skipped) == (6, 6, {"refused": 1, "not rated yet": 1})


def test_what_a_record_cannot_hold_is_left_out_and_the_rest_loads(tmp_path):
    responses = write_responses(tmp_path, 5)
    items = [json.loads(line) for line in responses.read_text().splitlines()]
    items[0]["image"] = None
    items[1]["image"] = ["red.png", "red.png"]
    items[2]["responses"][1]["response"] = " \n"
    items[3]["responses"][1]["response"] += "half a pair: \ud83d"
    responses.write_text("".join(json.dumps(item) + "\n" for item in items))
    judge = OracleJudge(lambda item: [dict.fromkeys(NAMES, 1 + item.responses.index(text)) for text in item.responses])
    rate_file(responses, judge, tmp_path / "j.jsonl", RateOptions(progress=False))
    built = build_dataset(responses, tmp_path / "j.jsonl", tmp_path / "set")
    assert (built.items, built.skipped) == (2, {"no image": 1, "several images": 1, "an empty response": 1})
    assert built.text().startswith(
        "2 items, 12 pairs (0 items without one); skipped: an empty response 1, no image 1, several images 1"
    )
    groups = load_preferences(tmp_path / "set", cache_dir=tmp_path / "cache")
    assert groups["id"] == ["item-0003", "item-0004"] and groups[0]["responses"][1].endswith("half a pair: \ufffd")
    responses.write_text(json.dumps(items[0]) + "\n")
    with pytest.raises(ValueError, match=r"every item was skipped \(no image 1\)"):
        build_dataset(responses, tmp_path / "j.jsonl", tmp_path / "other")


def test_build_refuses_to_overwrite_or_to_mix(tmp_path):
    responses, journal = rated(tmp_path)
    build_dataset(responses, journal, tmp_path / "set")
    with pytest.raises(FileExistsError, match="already holds"):
        build_dataset(responses, journal, tmp_path / "set")
    responses.write_text(responses.read_text().replace("item-0003: what", "item-0003: who"))
    with pytest.raises(JournalError, match="another prompt"):
        build_dataset(responses, journal, tmp_path / "other")
    assert not list((tmp_path / "other").rglob("*.partial")) and not list((tmp_path / "other").rglob("*.parquet"))
    with pytest.raises(JournalError, match="does not exist"):
        build_dataset(responses, tmp_path / "none.jsonl", tmp_path / "third")


def test_a_broken_reference_is_named(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"id": "a", "ratings": [{"Helpfulness": 3}]}\n{"id": "b"}\n')
    with pytest.raises(RecordError, match="line 2"):
        read_reference(tmp_path / "r.jsonl")


def record(number: int, **changes):
    values = {
        "id": str(number),
        "prompt": "What?",
        "image": Image.new("RGB", (4, 4), (number, 0, 0)),
        "models": ["a", "b"],
        "responses": ["x", "y"],
    }
    return {**values, "ratings": [dict.fromkeys(NAMES, 4.0), dict.fromkeys(NAMES, 11 / 3)], **changes}


def test_the_schema_is_vlfeedbacks(tmp_path):
    rows = [record(0), record(1, ratings=[dict.fromkeys(NAMES), dict.fromkeys(NAMES, 2.0)])]
    paths = write_vlfeedback(rows, tmp_path)
    loaded = datasets.load_dataset(
        "parquet", data_files=[str(path) for path in paths], split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.column_names == ["id", "prompt", "image", "models", "completions"]
    completions = loaded[0]["completions"]
    assert set(completions) == {"annotations", "model", "response"}
    assert completions["annotations"][0]["Helpfulness"] == {"Rating": "4", "Rationale": ""}
    assert completions["annotations"][1]["Ethical Considerations"]["Rating"] == "3.6667"
    assert loaded[1]["completions"]["annotations"][0]["Visual Faithfulness"]["Rating"] == "N/A"
    assert loaded[1]["image"].getpixel((0, 0)) == (1, 0, 0)


def test_large_datasets_are_split_into_shards_and_nothing_is_lost(tmp_path):
    size = len(vlfeedback_row(**record(0))["image"]["bytes"])
    paths = write_vlfeedback(
        (record(i % 256) | {"id": str(i)} for i in range(25)), tmp_path, shard_bytes=4 * size, rows_per_group=3
    )
    assert len(paths) > 4 and [path.name for path in paths] == [f"train-{i:05d}.parquet" for i in range(len(paths))]
    loaded = datasets.load_dataset(
        "parquet", data_files=[str(path) for path in paths], split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded["id"] == [str(i) for i in range(25)]


def test_an_error_on_the_way_leaves_no_half_file(tmp_path):
    def rows():
        yield record(0)
        yield record(1, responses=["only one"])

    with pytest.raises(ValueError, match="one entry per response"):
        write_vlfeedback(rows(), tmp_path, rows_per_group=1)
    assert not list(tmp_path.rglob("*.parquet*"))
    with pytest.raises(ItemError, match="record '0'"):
        write_vlfeedback([record(0, image=str(tmp_path / "none.png"))], tmp_path)
