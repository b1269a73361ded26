"""The report's pieces: what it collects, how it draws, that a page is self-contained and safe."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from silkie.evaluation import score
from silkie.evaluation.compare import compare_scores
from silkie.report import build_report, write_comparison
from silkie.report.__main__ import main
from silkie.report.charts import interval_plot, line_chart, nice_ticks
from silkie.report.collect import collect, curves_of, pick_cards
from silkie.report.pictures import PictureBook
from silkie.report.render import format_number, mixed, render, signed
from silkie.report.schema import Answer, BenchmarkRow, Card, Curve, Report, System

HISTORY = [
    {
        "step": 1,
        "loss": 0.7,
        "rewards/margins": 0.0,
        "rewards/accuracies": 0.5,
        "eval_pope_accuracy": 0.5,
        "eval_runtime": 3.0,
    },
    {"step": 2, "loss": 0.6, "rewards/margins": 0.4, "rewards/accuracies": 0.7},
    {"step": 2, "eval_loss": 0.65, "eval_pope_accuracy": 0.6, "eval_pope_unreadable": 0.0},
    {"step": 4, "eval_loss": 0.55, "eval_pope_accuracy": 0.7, "eval_pope_unreadable": 0.1},
    {"train_runtime": 12.0, "step": 4},
]


@pytest.fixture
def run_dir(tmp_path):
    """Base, trained and a control on 12 described images: the base invents a cat in all, the trained model in every
    fourth."""
    (tmp_path / "images").mkdir()
    for name, invents in (("base", 1), ("trained", 4), ("control", 2)):
        rows = []
        for i in range(12):
            Image.new("RGB", (40, 30), (i * 20, 0, 0)).save(tmp_path / "images" / f"{i}.png")
            answer = "A dog and a cat." if i % invents == 0 else "A dog."
            what = {"prompt": "Describe <it>.", "category": "few" if i < 6 else "many", "objects": ["dog"]}
            rows.append(
                {"id": i, "image": f"{i}.png", **what, "vocabulary": {"dog": "dog", "cat": "cat"}, "answer": answer}
            )
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text('{"log_history": []}')
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    systems = {name: f"{name}.jsonl" for name in ("base", "trained", "control")}
    report = {
        "title": "A run",
        "configuration": {"seed": 0, "Training": {"beta": 0.1, "loss": ["sigmoid", "sft"], "packed": True}},
        "data": {"train": {"pairs": 2210}},
        "evaluations": [{"benchmark": "chair", "name": "Descriptions", "systems": systems, "images": "images"}],
        "benchmarks": [
            {
                "name": "Given",
                "metric": "exact",
                "systems": [{"name": "base", "value": 0.5}, {"name": "trained", "value": None}],
            }
        ],
        "gallery": [
            {"id": "x", "prompt": "p", "base": "only text", "trained": {"answer": "b", "ratings": {"Helpfulness": 4.0}}}
        ],
        "notes": ["A note."],
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    return tmp_path


def test_a_run_directory_is_scored_and_compared(run_dir):
    report = collect(run_dir)
    first = report.benchmarks[0]
    assert (first.name, first.metric, first.lower_is_better, first.headline) == ("Descriptions", "chair_s", True, True)
    assert [(s.name, s.value) for s in first.systems] == [("base", 1.0), ("trained", 0.25), ("control", 0.5)]
    trained = first.systems[1]
    assert (
        trained.difference == -0.75
        and trained.difference_low < -0.75 < trained.difference_high
        and trained.p_value < 0.01
    )
    assert first.systems[0].difference is None
    assert report.benchmarks[-1].name == "Given"
    assert [card.flip for card in report.gallery].count("fixed") == 9
    assert report.gallery[1].base.invented == ("cat",) and report.gallery[1].image == run_dir / "images" / "1.png"
    assert report.gallery[-1].flip == "unjudged" and report.gallery[-1].base.answer == "only text"
    assert {curve.title for curve in report.curves} == {
        "Loss",
        "Reward margin",
        "Preference accuracy",
        "POPE: accuracy",
    }


def test_the_gallery_is_headed_by_the_systems_it_shows(run_dir):
    described = json.loads((run_dir / "report.json").read_text())
    described["evaluations"][0] |= {"compare_with": "control"}
    (run_dir / "report.json").write_text(json.dumps(described))
    report = collect(run_dir)
    assert report.names == ("base", "control")
    assert [card.flip for card in report.gallery].count("fixed") == 6, "the control's answers, not the trained model's"
    described["evaluations"][0] |= {"compare_with": "trian"}
    (run_dir / "report.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="`compare_with` must be one of trained, control, found 'trian'"):
        collect(run_dir)


def test_ratings_are_shown_and_lost_images_are_noted(tmp_path):
    for name, rating in (("base", 2), ("trained", 5)):
        rows = [
            {"id": i, "image": f"{i}.png", "prompt": "How many?", "answer": "Two.", "rating": rating} for i in range(3)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (9, 9)).save(tmp_path / "1.png")
    systems = {"base": "base.jsonl", "trained": "trained.jsonl"}
    (tmp_path / "report.json").write_text(json.dumps({"evaluations": [{"benchmark": "mmhal", "systems": systems}]}))
    report = collect(tmp_path)
    assert [(c.base.ratings, c.trained.ratings) for c in report.gallery] == [({"rating": 2.0}, {"rating": 5.0})] * 3
    assert report.notes == [f"MMHal-Bench: the images of 2 of 3 questions were not found in {tmp_path} (first: 0.png)."]


def test_images_of_mme_result_files_are_found_in_the_release(tmp_path):
    for name, answer in (("base", "Yes"), ("trained", "No")):
        (tmp_path / name).mkdir()
        rows = [f"a.jpg\tIs it {i}?\t{label}\t{answer}\n" for i, label in enumerate(("Yes", "No"))]
        for subtask in ("count", "OCR"):
            (tmp_path / name / f"{subtask}.txt").write_text("".join(rows))
    for folder in ("count", "OCR/images"):
        (tmp_path / "MME" / folder).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "MME" / folder / "a.jpg")
    evaluation = {"benchmark": "mme", "systems": {"base": "base", "trained": "trained"}, "images": "MME"}
    (tmp_path / "report.json").write_text(json.dumps({"evaluations": [evaluation]}))
    report = collect(tmp_path)
    assert {card.image.relative_to(tmp_path).as_posix() for card in report.gallery} == {
        "MME/count/a.jpg",
        "MME/OCR/images/a.jpg",
    }
    assert not report.notes and report.gallery[0].base.ratings == {}


def test_a_selected_gallery_says_what_it_was_selected_from():
    cards = [
        Card(id=str(i), prompt="", base=Answer(answer="", correct=i % 2 == 0), trained=Answer(answer="", correct=True))
        for i in range(8)
    ]
    every = render(Report(title="t", gallery=cards))
    some = render(Report(title="t", gallery=cards[:3], gallery_counts={"fixed": 4, "right": 1004}))
    assert "A selection" not in every
    assert (
        "A selection of 3 from 1,008 questions (4 fixed, 1,004 both right); the counts below are of the selection."
        in some
    )


def test_curves_come_from_the_latest_checkpoint_with_one_point_per_step():
    curves = {curve.title: curve.series for curve in curves_of(HISTORY)}
    assert curves["Loss"] == {"train": [(1.0, 0.7), (2.0, 0.6)], "evaluation": [(2.0, 0.65), (4.0, 0.55)]}
    assert curves["POPE: accuracy"] == {"accuracy": [(1.0, 0.5), (2.0, 0.6), (4.0, 0.7)]}
    assert curves_of([]) == []


def test_rounds_are_curves_of_their_own():
    history = [{"step": step, "loss": 0.1 * step, "round": f"Round {1 + step // 3}"} for step in (1, 2, 3)]
    (curve,) = curves_of(history)
    assert curve.series == {"Round 1": [(1, 0.1), (2, 0.2)], "Round 2": [(3, pytest.approx(0.3))]}


def test_a_panel_needs_two_steps():
    text = render(Report(title="t", curves=[*curves_of([{"step": 1, "loss": 0.7, "eval_loss": 0.6}])]))
    assert "Loss" not in text
    assert "Loss" in render(
        Report(title="t", curves=[*curves_of([{"step": 1, "loss": 0.7}, {"step": 2, "eval_loss": 1}])])
    )


def test_a_tile_shows_the_system_that_the_report_is_about():
    systems = tuple(
        System(name=name, value=value) for name, value in (("Base", 0.5), ("Round 1", 0.51), ("Round 2", 0.84))
    )
    rows = [BenchmarkRow(name="pope", metric="accuracy", systems=systems, headline=True)]
    tile = render(Report(title="t", benchmarks=rows, names=("Base", "Round 2"))).partition("Headline results")[2]
    assert "accuracy, Round 2" in tile and tile.partition('"big">')[2].startswith("0.840")


def test_the_page_is_self_contained_and_escaped(run_dir):
    page = build_report(run_dir).read_text()
    links = re.findall(r"""(?:src|href|action)\s*=\s*["']([^"']*)""", page)
    assert links and all(link.startswith(("#", "data:image/")) for link in links)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|sendBeacon|<link|<iframe", page)
    assert "Describe &lt;it&gt;." in page and "Describe <it>." not in page
    assert page.count("data:image/") == 12, "each image once"
    assert "A dog and a <mark>cat</mark>." in page
    assert "sigmoid, sft" in page and "2,210" in page and ">yes<" in page
    assert str(run_dir) not in page


def test_hostile_texts_stay_text(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
    answer = Answer(answer=evil, correct=True, invented=("script", "(.*"), note=evil, ratings={evil: 1.0})
    plain = Answer(answer=evil)
    card = Card(id=evil, prompt=evil, base=answer, trained=plain, category=evil, reference=evil)
    curve = Curve(title=evil, series={evil: [(0, 1), (1, 2)]})
    page = render(
        Report(
            title=evil,
            summary=evil,
            names=(evil, evil),
            configuration={evil: {evil: evil}},
            notes=[evil],
            gallery=[card],
            curves=[curve],
        )
    )
    assert page.count("<script>") == 1 and page.count("</script>") == 1
    assert "<img src=x" not in page


def test_what_is_wrong_is_named(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "neither report.json nor trainer_state.json" in capsys.readouterr().err
    for text, message in [
        ('{"title": 1,\n oops}', "report.json:2: not valid JSON"),
        ('{"titel": "x"}', "unknown field `titel`: expected some of benchmarks, configuration"),
        ('{"evaluations": {"a": 1}}', "`evaluations`: expected a list of objects, found {'a': 1}"),
        ('{"gallery": [5, null]}', "`gallery[0]`: expected an element of a list of objects, found 5"),
        ('{"notes": "one"}', "`notes`: expected a list of texts, found 'one'"),
        ('{"data": [1]}', "`data`: expected a valid dictionary, found [1]"),
        (
            '{"evaluations": [{"benchmark": "pope", "systems": {"base": 5}}]}',
            "`evaluations[0].systems`: expected name -> results file, found 5",
        ),
        (
            '{"benchmarks": [{"name": "x", "systems": [{"name": "base", "value": "high"}]}]}',
            "`benchmarks[0].systems[0].value`: expected a valid number, found 'high'",
        ),
        (
            '{"benchmarks": [{"name": "x", "systems": [{"name": "base", "value": true}]}]}',
            "`benchmarks[0].systems[0].value`: expected a valid number, found True",
        ),
        (
            '{"evaluations": [{"benchmark": "pope", "systems": {"base": "a"}, "galery": false}]}',
            "unknown field `galery` of `evaluations[0]`",
        ),
        (
            '{"evaluations": [{"benchmark": "pope"}]}',
            "`evaluations[0].systems`: missing; expected name -> results file",
        ),
        ('{"benchmarks": [{"name": "x"}]}', "`benchmarks[0].systems`: missing; expected a list of systems"),
        (
            '{"gallery": [{"id": 1, "prompt": "p", "base": "a"}]}',
            "`gallery[0].trained`: missing; expected a text or an object",
        ),
        (
            '{"gallery": [{"id": 1, "prompt": "p", "base": "a", "trained": "b", "image": "gone.png"}]}',
            "names the image gone.png, which is not there",
        ),
        ('{"evaluations": [{"benchmark": "pope", "systems": {"base": "none.jsonl"}}]}', "none.jsonl: no such file"),
    ]:
        (tmp_path / "report.json").write_text(text)
        assert main([str(tmp_path)]) == 2
        assert message in capsys.readouterr().err


def test_a_bare_trainer_state_is_enough(tmp_path, capsys):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 64, "lora_alpha": 16, "peft_version": "x"}))
    assert main([str(tmp_path), "--out", str(tmp_path / "deep" / "page.html")]) == 0
    page = (tmp_path / "deep" / "page.html").read_text()
    assert "Reward margin" in page and "<dt>rank</dt><dd>64</dd>" in page and 'id="gallery"' not in page


def test_ticks_are_round_and_cover():
    assert nice_ticks(0, 1, 4) == [0, 0.5, 1.0]
    assert nice_ticks(0.03, 0.71, 4) == [0, 0.2, 0.4, 0.6, 0.8]
    assert nice_ticks(-2.3, 0.6, 4) == [-3, -2, -1, 0, 1]
    assert nice_ticks(100, 5000, 5) == [0, 1000, 2000, 3000, 4000, 5000]
    flat = nice_ticks(0.5, 0.5, 4)
    assert flat[0] < 0.5 < flat[-1]


def test_a_chart_puts_values_where_its_axes_say():
    svg = line_chart(Curve(title="t", series={"a": [(0, 0.0), (10, 1.0), (20, float("nan")), (20, 0.5)]}))
    points = [tuple(map(float, p.split(","))) for p in re.search(r'data-points="([^"]*)"', svg).group(1).split()]
    assert [(p[2], p[3]) for p in points] == [(0, 0), (10, 1), (20, 0.5)], "NaN is left out"
    (x0, y0, *_), (x1, y1, *_), (x2, y2, *_) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y2 == pytest.approx((y0 + y1) / 2, abs=0.2) and y1 < y0
    assert "nan" not in svg
    strips = interval_plot(
        [System(name="a", value=0.2, low=0.0, high=0.4), System(name="b", value=0.4, low=0.3, high=1.0)]
    )
    assert 'cx="34.4"' in strips[0] and 'x="4.0"' in strips[0] and 'class="base" x1="34.4"' in strips[1]


def test_where_only_the_change_has_an_interval_the_bar_shows_that(tmp_path):
    """Without a bar, a change of 0.01 and one of 0.2 would look alike: two dots at the ends of the scale."""
    b = System(name="b", value=0.7, difference=0.2, difference_low=-0.2, difference_high=0.8)
    strips = interval_plot([System(name="a", value=0.5), b])
    scale = [float(x) for x in re.findall(r'<rect class="c1" x="([\d.]+)" y="5.5" width="([\d.]+)"', strips[1])[0]]
    assert scale == [4.0, 152.0] and "rect" not in strips[0]  # 0.3 to 1.3, the whole scale
    row = BenchmarkRow(name="x", systems=(System(name="a", value=0.5), b))
    page = render(Report(title="t", benchmarks=[row]))
    assert "of the change, set at the base value" in page and '<span class="bounds">−0.200 to +0.800</span>' in page


def test_compared_files_of_one_name_are_told_apart(tmp_path):
    files = []
    for name, answer in (("before", "Yes"), ("after", "No")):
        (tmp_path / name).mkdir()
        files.append(tmp_path / name / "pope.jsonl")
        files[-1].write_text(json.dumps({"question_id": 1, "answer": answer, "label": "no"}) + "\n")
    comparison = compare_scores(*(score("pope", str(file)) for file in files))
    page = write_comparison(comparison, tmp_path / "page.html", names=(str(files[0]), str(files[1]))).read_text()
    assert "before/pope against after/pope" in page


def test_pictures_are_small_and_stored_once(tmp_path):
    book = PictureBook(longest_side=64)
    noise = Image.effect_noise((400, 200), 80).convert("RGB")
    noise.save(tmp_path / "a.png")
    assert book.add(noise) == book.add(tmp_path / "a.png") == book.add((tmp_path / "a.png").read_bytes())
    assert len(book.uris) == 1 and next(iter(book.uris.values())).startswith("data:image/jpeg")
    assert book.uris[book.add(Image.new("RGB", (40, 40), "red"))].startswith("data:image/png")


def test_cards_are_thinned_without_losing_flips():
    def card(i, before, after):
        return Card(
            id=str(i), prompt="", base=Answer(answer="", correct=before), trained=Answer(answer="", correct=after)
        )

    cards = [card(i, i % 10 == 0, i % 10 == 0 or i % 7 == 0) for i in range(1000)]
    kept = pick_cards(cards, 160)
    assert len(kept) == 160 and [int(c.id) for c in kept] == sorted(int(c.id) for c in kept)
    flips = [c for c in cards if c.flip in ("fixed", "broken")]
    assert sum(c.flip == "fixed" for c in kept) == min(len(flips), 80)
    assert len(pick_cards(cards[:50], 160)) == 50


def test_flips_come_first_and_categories_take_turns():
    def card(name, category, flipped):
        return Card(
            id=name,
            prompt="",
            category=category,
            base=Answer(answer="", correct=False),
            trained=Answer(answer="", correct=flipped),
        )

    cards = [
        card("a1", "a", True),
        card("a2", "a", True),
        card("r1", "b", False),
        card("b1", "b", True),
        card("r2", "a", False),
    ]
    assert [c.id for c in mixed(cards)] == ["a1", "b1", "a2", "r1", "r2"]


def test_numbers_read_well():
    assert [format_number(v) for v in (None, 0.12345, 12.345, -0.5)] == ["–", "0.123", "12.3", "-0.500"]
    assert [signed(v) for v in (0.1, -0.1, 0.0, None)] == ["+0.100", "−0.100", "0.000", "–"]
