"""`inspect`: the figures on data whose answers are known, and the page that shows them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import datasets
import numpy as np
import pytest

from silkie.data.__main__ import main
from silkie.data.inspect import inspect_preferences
from silkie.data.rendering import to_text
from silkie.data.statistics import correlation, histogram, summary
from silkie.report.gallery import card, write_gallery
from silkie.report.pictures import PictureBook
from tests.support import preference_files as files
from tests.support.data import dataset, group, png
from tests.support.tiny import image


@pytest.fixture
def data(tmp_path):
    """Two VLFeedback rows with known figures, one broken row and one row whose image does not decode."""
    datasets.disable_progress_bars()
    files.write_images(tmp_path, 2)
    (tmp_path / "2.png").write_bytes(b"broken")
    records = [
        files.vlfeedback(0, ratings=((5, 5, 1), (1, 5, 5))),  # 11 / 3 each: a tie
        files.vlfeedback(1, ratings=((4, 5, 1), (1, 5, 2))),
        {**files.vlfeedback(2, ratings=((3, 5, 3), ("N/A", 5, 1))), "prompt": "<script>alert(1)</script>"},
        {**files.vlfeedback(0), "prompt": ""},
    ]
    return files.write_lines(tmp_path / "rows.jsonl", records)


def test_figures(data, tmp_path):
    inspection = inspect_preferences(data, cache_dir=tmp_path / "cache")
    figures = inspection.figures
    assert (figures["groups"], figures["responses"], figures["pairs"], figures["images"]) == (3, 6, 1, 3)
    assert figures["pairs_per_group"] == {"0": 2, "1": 1}
    assert figures["ratings"]["Helpfulness"]["share"] == {"1": 0.4, "3": 0.2, "4": 0.2, "5": 0.2}
    assert figures["ratings"]["Helpfulness"]["not_a_number"] == 1 and figures["ratings"]["Helpfulness"][
        "mean"
    ] == pytest.approx(14 / 5)
    diversity = figures["preference_diversity"]
    assert diversity["rated_pairs"] == 1 and diversity["aspects_conflict"] == 1.0
    assert diversity["aspects"]["Helpfulness"] == {"for": 1.0, "tie": 0.0, "against": 0.0, "alone": 0.0}
    assert (
        diversity["aspects"]["Visual Faithfulness"]["against"] == 1.0
        and diversity["aspects"]["Ethical Considerations"]["tie"] == 1.0
    )
    both = figures["agreement"]["Helpfulness / Visual Faithfulness"]
    assert (both["same_order"], both["opposite_order"], both["a_tie_in_one"], both["response_pairs"]) == (
        0.0,
        1.0,
        0.0,
        2,
    )
    with_ethics = figures["agreement"]["Helpfulness / Ethical Considerations"]
    assert (with_ethics["same_order"], with_ethics["opposite_order"], with_ethics["a_tie_in_one"]) == (None, None, 1.0)
    assert figures["models"]["gpt4v"]["win_rate"] == 1.0 and figures["models"]["fuyu-8b"]["win_rate"] == 0.0
    assert figures["length_bias"]["chosen_equal"] == 1.0
    assert figures["image_sizes"]["longer_side"] == {"8-15": 2} and figures["image_sizes"]["unreadable"] == 1
    assert inspection.report.reasons() == {"column 'prompt': expected a non-empty string": 1}


def test_text_and_json_on_the_command_line(data, capsys):
    assert main(["inspect", str(data), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["loading"]["dropped_rows"] == {"column 'prompt': expected a non-empty string": 1}
    assert figures["groups"] == 3
    assert main(["inspect", str(data), "--no-images"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"Helpfulness +40\.0 % +0\.0 % +20\.0 % +20\.0 % +20\.0 % +2\.80 +1\n", text)
    assert "broken rows:\n  rows.jsonl (vlfeedback), line 4, column 'prompt': found ''" in text
    assert main(["inspect", str(data), "--html", str(data.with_name("page.html"))]) == 0
    assert f"page: {data.with_name('page.html')}\n" in capsys.readouterr().err
    assert main(["inspect", str(data), "--on-error", "raise"]) == 1
    assert capsys.readouterr().err.startswith("error: rows.jsonl (vlfeedback), line 4, column 'prompt'")
    assert main(["inspect", "nowhere.jsonl"]) == 1
    assert "neither an existing file" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--num-proc", "0", "1"), ("--num-proc", "x", "1"), ("--groups", "-1", "0")])
def test_counts_on_the_command_line(option, data, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", str(data), *option[:2]])
    assert (
        f"argument {option[0]}: expected a whole number of at least {option[2]}, found '{option[1]}'"
        in capsys.readouterr().err
    )


def test_scores_of_a_reward_model_fit_a_table(tmp_path):
    """Ratings with more values than a table has columns are counted in steps; the mean stays that of the values."""
    datasets.disable_progress_bars()
    scores = [index / 7 for index in range(60)]  # 0 to 8.43
    records = [
        files.group_record(images=[], ratings=[{"Reward": score}, {"Reward": -score / 10 - 0.01}]) for score in scores
    ]
    inspection = inspect_preferences(files.write_lines(tmp_path / "rows.jsonl", records), cache_dir=tmp_path / "cache")
    figures = inspection.figures["ratings"]["Reward"]
    assert inspection.figures["rating_step"] == 1 and list(figures["share"]) == [
        "-1",
        "0",
        "1",
        "2",
        "3",
        "4",
        "5",
        "6",
        "7",
        "8",
    ]
    assert figures["share"]["5"] == pytest.approx(sum(4.5 <= score <= 5.5 for score in scores) / 120)
    assert sum(figures["share"].values()) == pytest.approx(1)
    assert figures["mean"] == pytest.approx(sum(0.9 * score - 0.01 for score in scores) / 120)
    assert "ratings, in steps of 1 " in to_text(inspection)
    write_gallery(inspection, tmp_path / "new" / "page.html")
    assert "Ratings per aspect, in steps of 1<" in (tmp_path / "new" / "page.html").read_text()


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]


def test_gallery_is_one_file_that_loads_nothing(data, tmp_path):
    write_gallery(inspect_preferences(data, cache_dir=tmp_path / "cache"), tmp_path / "page.html", groups=10)
    html = (tmp_path / "page.html").read_text().replace("http://www.w3.org/2000/svg", "")  # a name, never fetched
    page = Page()
    page.feed(html)
    assert page.tags.count("article") == 3 and page.tags.count("script") == 1
    assert len(page.links) == 2 and all(link.startswith("data:image/") for link in page.links)
    assert "http://" not in html and "https://" not in html and "url(" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "<script>alert" not in html
    assert "is not an image that Pillow can read" in html  # the broken image is shown as its error
    assert "Helpfulness is 4" in html and "answer 1 of gpt4v" in html


def test_best_response_comes_first_in_a_card(tmp_path):
    files.write_images(tmp_path, 1)
    data = files.write_lines(
        tmp_path / "rows.jsonl", [files.vlfeedback(0, ratings=((1, 1, 1), (5, 5, 5), (3, 3, "N/A")))]
    )
    shown = card(inspect_preferences(data, cache_dir=tmp_path / "cache").dataset[0], 0, PictureBook())
    assert [response["index"] for response in shown["responses"]] == [1, 0, 2]
    assert [(response["wins"], response["losses"]) for response in shown["responses"]] == [(1, 0), (0, 1), (0, 0)]


def test_sources_without_ratings_or_images(tmp_path):
    datasets.disable_progress_bars()
    pairs = files.write_lines(
        tmp_path / "pairs.jsonl", [{"prompt": "Q", "chosen": "a longer answer", "rejected": "short"}]
    )
    inspection = inspect_preferences(pairs, cache_dir=tmp_path / "cache")
    assert "longer in 100.0 %, shorter in 0.0 %" in to_text(inspection)
    write_gallery(inspection, tmp_path / "page.html")
    assert "a longer answer" in (tmp_path / "page.html").read_text()


def test_lengths_in_tokens(tmp_path):
    datasets.disable_progress_bars()

    def letters(text, add_special_tokens):
        return {"input_ids": list(text)}

    pairs = files.write_lines(tmp_path / "pairs.jsonl", [{"prompt": "Why?", "chosen": "abc", "rejected": "ab"}])
    figures = inspect_preferences(pairs, tokenizer=letters, cache_dir=tmp_path / "cache").figures
    assert (figures["length_unit"], figures["prompt_length"]["mean"], figures["response_length"]["mean"]) == (
        "tokens",
        4,
        2.5,
    )


def test_helpers():
    assert histogram(np.array([0, 1, 1, 5, 9, 9, 9, 9])) == {"0": 1, "1": 2, "2-3": 0, "4-7": 1, "8-15": 4}
    assert histogram(np.array([], dtype=int)) == {}
    figures = summary(np.array([1, 2, 2, 10]))
    assert (figures["p50"], figures["p95"], figures["mean"]) == (2, 10, 3.75)
    assert summary(np.array([7, 1, 3, 5]))["p50"] == 3, "a value that occurs"
    assert correlation(np.array([1, 2, 3]), np.array([2, 4, 6])) == pytest.approx(1.0)
    assert correlation(np.array([1, 1]), np.array([1, 2])) is None and correlation(np.array([]), np.array([])) is None


def test_what_decides_pairs_and_who_wins_them(tmp_path):
    """Aspect a orders both pairs alone: once for the chosen response, once against it."""
    datasets.disable_progress_bars()
    shared = {"prompt": "Q", "responses": ["p", "q r"], "ratings": [{"a": 2, "b": 1}, {"a": 1, "b": 1}]}
    records = [
        {**shared, "pairs": [[0, 1]], "models": ["x", "y"]},
        {**shared, "prompt": "R", "pairs": [[1, 0]], "models": ["z", "y"]},
    ]
    source = files.write_lines(tmp_path / "rows.jsonl", records)
    figures = inspect_preferences(source, cache_dir=tmp_path / "cache").figures
    diversity = figures["preference_diversity"]
    assert diversity["aspects"]["a"] == {"for": 0.5, "tie": 0.0, "against": 0.5, "alone": 0.5}
    assert diversity["aspects"]["b"] == {"for": 0.0, "tie": 1.0, "against": 0.0, "alone": 0.0}
    assert (diversity["rated_pairs"], diversity["aspects_conflict"]) == (2, 0.0)
    assert figures["agreement"]["a / b"]["a_tie_in_one"] == 1.0 and figures["agreement"]["a / b"]["same_order"] is None
    assert [(name, row["win_rate"], row["pairs"]) for name, row in figures["models"].items()] == [
        ("x", 1.0, 1),
        ("y", 0.5, 2),
        ("z", 0.0, 1),
    ]
    assert figures["models"]["y"]["longer_when_chosen"] == 1.0 and figures["models"]["y"]["mean_rating"] == 1.0
    assert figures["length_bias"]["chosen_longer"] == figures["length_bias"]["chosen_shorter"] == 0.5


def test_questions_per_image_are_counted_by_bytes_and_told(tmp_path):
    """Three questions about one picture stored under two names, one about another."""
    first, second = (png(image(n)) for n in (0, 1))
    (tmp_path / "a.png").write_bytes(first["bytes"])
    copies = [first, {"bytes": None, "path": str(tmp_path / "a.png")}, first, second]
    rows = [{**group([image(0)], f"{n} ?", ["yes", "no"], [[0, 1]]), "images": [copies[n]]} for n in range(4)]
    inspection = inspect_preferences(dataset(rows))
    assert inspection.figures["image_sizes"]["questions_per_image"] == {"1": 1, "3": 1}
    text = to_text(inspection)
    assert "questions per image: 2.00 on average, at most 3" in text
    assert "up to 2 of 4 prompts (50%) need not run their images again" in text
