"""The ablation recipe in a few prompts per seed: every row trains, a stopped run goes on, the table shows the
numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from datasets import Dataset

from silkie.demo.page import demo_report
from silkie.demo.results import Sizes, Summary
from silkie.report.render import render
from silkie.stats import Estimate
from tests.support.studies import load_study

ablation = load_study("ablation")
COLUMNS, POOL, RECIPES = ablation.COLUMNS, ablation.POOL, ablation.RECIPES
cells, markdown, run_ablation, t_interval = (
    ablation.cells,
    ablation.markdown,
    ablation.run_ablation,
    ablation.t_interval,
)

ROOT = Path(__file__).parents[2]
TINY = Sizes(images=3, card_images=3, questions=1, mme_images=1, pope_images=1, captions=2, red_team_images=4)
SOME = ("sft-best", "strongest", "random", "only-ethics", "silkie")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("ablation")
    return out, run_ablation(out, (0, 1), SOME, sizes=TINY)


@pytest.mark.slow
def test_every_row_is_trained_and_scored_for_every_seed(run):
    out, result = run
    assert list(result["scores"]) == ["base", *SOME]
    assert all(list(by_seed) == ["0", "1"] for by_seed in result["scores"].values())
    assert json.loads((out / "ablation.json").read_text()) == result
    first = result["scores"]["silkie"]["0"]
    assert set(first) == {"greedy", "T=1"} and set(COLUMNS) <= set(first["greedy"])
    assert result["pairs"]["random"] == result["pairs"]["silkie"], "random pairs are as many as the rated ones"


@pytest.mark.slow
def test_the_pool_writes_a_response_of_every_sampler(run):
    out, result = run
    records = [json.loads(line) for line in (out / "seed0" / "data" / "vlfeedback.jsonl").read_text().splitlines()]
    assert all(record["models"] == list(POOL) for record in records)
    mean = sum(
        sum(float(a[k]["Rating"]) for k in a) / len(a)
        for record in records
        for a in record["completions"]["annotations"][:1]
    ) / len(records)
    assert result["pool"]["0"]["t0.5"] == pytest.approx(mean), (
        "the first member's mean rating, from the records themselves"
    )


@pytest.mark.slow
def test_a_stopped_run_goes_on_without_doing_anything_twice(run, monkeypatch):
    out, result = run
    (out / "seed1" / "random.json").unlink()
    trained = []
    train = ablation._train
    monkeypatch.setattr(
        ablation, "_train", lambda row, seed, *rest: trained.append((row.recipe.name, seed)) or train(row, seed, *rest)
    )
    monkeypatch.setattr(ablation, "sample_pool", lambda *_: pytest.fail("sampled again"))
    again = run_ablation(out, (0, 1), SOME, sizes=TINY)
    assert trained == [("random", 1)]
    assert again == result, "the same seed gives the same numbers"


@pytest.mark.slow
def test_strongest_and_single_aspects_make_other_pairs(run):
    _, result = run
    pairs = {name: tuple(by_seed.values()) for name, by_seed in result["pairs"].items()}
    assert (
        pairs["strongest"] != pairs["silkie"]
        and pairs["only-ethics"] != pairs["silkie"]
        and all(all(p) for p in pairs.values())
    )


def test_the_table():
    result = {
        "scores": {"base": {"0": _scores(0.5)}, "silkie": {"0": _scores(0.6), "1": _scores(0.8), "2": _scores(0.7)}}
    }
    cell = cells(result, "greedy")["silkie"]["exact"]
    half = 4.303 * 0.1 / math.sqrt(3)
    assert (cell.mean, cell.low, cell.high) == pytest.approx((0.7, 0.7 - half, 0.7 + half))
    text = markdown(result, "greedy").splitlines()
    assert text[0].startswith("| model | MME-P ↑ |") and "| 0.50 |" in text[2] and f"**0.70** ± {half:.2f}" in text[3]
    with pytest.raises(ValueError, match="at least two"):
        t_interval([0.3])


def test_the_published_tables_are_those_of_the_published_figures():
    result = json.loads((ROOT / "examples/demo/ablation.json").read_text())
    greedy = markdown(result, "greedy")
    assert (
        greedy in (ROOT / "examples/results.md").read_text()
        and greedy in (ROOT / "examples/demo/ablation.md").read_text()
    )
    assert markdown(result, "T=1") in (ROOT / "examples/demo/ablation.md").read_text()


def _scores(value: float) -> dict:
    return {mode: {key: [value, value - 0.1, value + 0.1] for key in COLUMNS} for mode in ("greedy", "T=1")}


def test_random_directions_keep_the_pairs(tmp_path):
    data = Dataset.from_list([{"pairs": [[0, 1], [2, 3], [1, 3]]}] * 40)
    tossed = ablation.random_directions(data, 0)
    pairs = [tuple(pair) for row in tossed["pairs"] for pair in row]
    assert [set(pair) for pair in pairs] == [{0, 1}, {2, 3}, {1, 3}] * 40
    turned = sum(pair[0] > pair[1] for pair in pairs)
    assert (
        40 < turned < 80
        and ablation.random_directions(data, 0)["pairs"]
        == tossed["pairs"]
        != ablation.random_directions(data, 1)["pairs"]
    )


def test_bad_requests_are_named(tmp_path):
    with pytest.raises(ValueError, match="unknown recipes ppo; expected some of sft-best"):
        run_ablation(tmp_path, recipes=["ppo"])
    with pytest.raises(ValueError, match="at least two different"):
        run_ablation(tmp_path, seeds=[1, 1])
    assert "silkie" in RECIPES


def test_the_demo_as_a_report_page():
    from silkie.demo.data import evaluation_items
    from silkie.demo.scores import METRICS

    test = evaluation_items(7, mme_images=1, pope_images=1, captions=2, red_team_images=2)
    scores = {
        p: {m: {x.key: Estimate(v, v - 0.1, v + 0.1) for x in METRICS} for m in ("greedy", "T=1")}
        for p, v in (("base", 0.4), ("dpo", 0.6))
    }
    summary = Summary("base", 0, 10, 30, scores=scores, titles={"base": "Base", "dpo": "DPO"}, seconds={"train": 3.0})
    caption = next(k for k, item in enumerate(test) if item.benchmark == "chair")
    truth = [item.question.answer for item in test]
    invented = list(truth)
    missing = next(c for c in ("red star", "blue star", "green star", "yellow star") if c not in truth[caption])
    invented[caption] = truth[caption].rstrip(".") + f" and a {missing}."
    report = demo_report(summary, test, {"base": {"greedy": invented}, "dpo": {"greedy": truth}}, log_history=[])
    card = report.gallery[caption]
    assert card.base.invented == (missing,) and card.flip == "fixed"
    page = render(report)
    assert f"<mark>{missing}</mark>" in page and "Captions exactly right" in page and "Held-out scenes, T=1" in page
