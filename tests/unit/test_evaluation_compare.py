"""Comparisons, generic benchmarks, loaders and exports."""

from __future__ import annotations

import json
from math import comb

import numpy as np
import pytest
from PIL import Image

from silkie.evaluation import ResultError, get_benchmark, score
from silkie.evaluation.compare import compare_scores
from silkie.evaluation.intervals import metric_intervals
from silkie.evaluation.judging import judge_tasks
from silkie.evaluation.lexicon import mentions, singular
from silkie.evaluation.run import question_tasks
from silkie.evaluation.text import comparison_text, score_text
from silkie.evaluation.yaml_benchmark import normalise, read_scale


def pope_file(path, reads, labels, images=None):
    rows = [
        {
            "question_id": i,
            "image": images[i] if images else f"{i}.jpg",
            "text": f"q{i}",
            "label": label,
            "answer": read,
            "category": ("random", "popular")[i % 2],
        }
        for i, (read, label) in enumerate(zip(reads, labels, strict=True))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def two(tmp_path):
    """40 questions, labels alternate; A is wrong on the first 12, B on the last 4 only."""
    labels = ["yes" if i % 4 < 2 else "no" for i in range(40)]
    other = {"yes": "no", "no": "yes"}
    a = [other[x] if i < 12 else x for i, x in enumerate(labels)]
    b = [other[x] if i >= 36 else x for i, x in enumerate(labels)]
    return score("pope", pope_file(tmp_path / "a.jsonl", a, labels)), score(
        "pope", pope_file(tmp_path / "b.jsonl", b, labels)
    )


def test_differences_flips_and_tests(two):
    result = compare_scores(*two)
    accuracy = result.metrics[0]
    assert (accuracy.name, accuracy.a, accuracy.b) == ("accuracy", 28 / 40, 36 / 40)
    assert accuracy.difference == pytest.approx(0.2) and accuracy.better is True
    assert len(result.fixed) == 12 and len(result.broken) == 4
    expected = 2 * sum(comb(16, i) for i in range(5)) / 2**16
    assert result.mcnemar_p == pytest.approx(expected)
    # one image per question: the swap test of accuracy is McNemar's, by Monte Carlo
    assert accuracy.p_value == pytest.approx(expected, abs=0.01)
    # the interval of a mean difference: 1.96 * sd / sqrt(n)
    d = np.r_[np.ones(12), np.zeros(24), -np.ones(4)]
    half = 1.96 * d.std() / np.sqrt(40)
    assert (accuracy.low, accuracy.high) == pytest.approx((0.2 - half, 0.2 + half), abs=0.03)
    assert {m.name: m.better for m in result.metrics}["yes_rate"] is None
    assert result.categories["random"].a == pytest.approx(14 / 20)


def test_every_metric_is_recomputed_from_resampled_sums(two):
    """The bootstrap of F1 against one that resamples the questions one by one."""
    a = two[0]
    low, high = metric_intervals(a)["f1"]
    rng = np.random.default_rng(0)
    rows = np.array([item.counts for item in a.items])
    draws = []
    for _ in range(4000):
        s = rows[rng.integers(0, len(rows), len(rows))].sum(0)
        draws.append(2 * s[2] / (s[3] + s[4]))
    assert (low, high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.02)


def test_questions_of_one_image_are_resampled_together(tmp_path):
    labels = ["yes"] * 24
    reads = ["yes"] * 12 + ["no"] * 12
    apart = metric_intervals(score("pope", pope_file(tmp_path / "a.jsonl", reads, labels)))["accuracy"]
    images = [f"{i // 6}.jpg" for i in range(24)]
    together = metric_intervals(score("pope", pope_file(tmp_path / "b.jsonl", reads, labels, images)))["accuracy"]
    assert together[1] - together[0] > 1.8 * (apart[1] - apart[0])


def test_mme_interval_resamples_pairs_within_subtasks(tmp_path):
    for name, right in (("existence", 30), ("code_reasoning", 10)):
        rows = [
            f"{i}.jpg\tq{k}\t{label}\t{label if i < right else 'x'}\n"
            for i in range(40)
            for k, label in enumerate(("Yes", "No"))
        ]
        (tmp_path / f"{name}.txt").write_text("".join(rows))
    result = score("mme", str(tmp_path))
    low, high = metric_intervals(result)["perception"]
    # both answers of an image are right or wrong together: score = 200 p, so the half width is 200 * 1.96 * sqrt(p q /
    # n)
    half = 200 * 1.96 * (0.75 * 0.25 / 40) ** 0.5
    assert (low, high) == pytest.approx((150 - half, 150 + half), abs=6)


def test_no_difference_is_not_significant(two):
    result = compare_scores(two[0], two[0])
    assert all(
        m.p_value == 1.0 and m.difference == 0 and m.better is None for m in result.metrics if m.difference is not None
    )
    assert result.fixed == result.broken == [] and result.mcnemar_p == 1.0


def test_different_questions_are_refused_or_cut_to_the_common_ones(tmp_path, two):
    a = two[0]
    labels = ["yes" if i % 4 < 2 else "no" for i in range(38)]
    b = score("pope", pope_file(tmp_path / "c.jsonl", labels, labels))
    with pytest.raises(ValueError, match="2 only in A, 0 only in B"):
        compare_scores(a, b)
    assert compare_scores(a, b, only_common=True).questions == 38
    with pytest.raises(ValueError, match="only results of one benchmark"):
        compare_scores(a, score("redteam", str(_redteam(tmp_path))))


def _redteam(folder):
    file = folder / "red.jsonl"
    file.write_text(json.dumps({"id": 1, "expected": "answer", "answer": "yes"}) + "\n")
    return file


def test_lower_is_better_where_it_is(tmp_path):
    def chair(name, answer):
        rows = [
            {"id": i, "answer": answer, "objects": ["dog"], "vocabulary": {"dog": "dog", "cat": "cat"}}
            for i in range(20)
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return score("chair", str(tmp_path / name))

    result = compare_scores(chair("a.jsonl", "a dog and a cat"), chair("b.jsonl", "a dog"))
    better = {m.name: m.better for m in result.metrics}
    assert better == {"chair_s": True, "chair_i": True, "recall": None, "exact": True, "objects_per_answer": None}


def test_text_tables_show_numbers_intervals_and_flips(two):
    text = comparison_text(compare_scores(*two), shown_flips=2)
    assert "accuracy   0.7000  0.9000  +0.2000" in text
    assert "12 wrong -> right, 4 right -> wrong (McNemar exact p = 0.077)" in text
    assert text.count("[wrong -> right]") == 2 and "10 more wrong -> right" in text
    assert "popular" in score_text(two[0], metric_intervals(two[0]))


def write_yaml(folder, text, questions):
    (folder / "bench.yaml").write_text(text)
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return str(folder / "bench.yaml")


def test_generic_yesno(tmp_path):
    questions = [
        {"id": i, "image": f"{i}.png", "question": f"q{i}?", "label": label, "category": "c"}
        for i, label in enumerate(["yes", "no", "no"])
    ]
    name = write_yaml(
        tmp_path, 'name: kitchen\nkind: yesno\npositive: no\nprompt: "{question} Answer yes or no."\n', questions
    )
    benchmark = get_benchmark(name)
    loaded = benchmark.load_questions("")
    assert loaded[0].prompt == "q0? Answer yes or no." and loaded[0].images == (str(tmp_path / "0.png"),)
    answers = tmp_path / "answers.jsonl"
    answers.write_text(
        "".join(json.dumps({"id": i, "answer": text}) + "\n" for i, text in enumerate(["YES!", "No, none.", "yes"]))
    )
    result = benchmark.score_results(str(answers))  # labels come from the questions
    assert result.metrics["accuracy"] == pytest.approx(2 / 3)
    assert result.metrics["precision"] == 1 and result.metrics["recall"] == 0.5, "no is the positive class here"


def test_generic_exact_and_judge(tmp_path):
    (tmp_path / "exact").mkdir()
    name = write_yaml(
        tmp_path / "exact",
        "kind: exact\n",
        [{"id": 1, "question": "q", "label": ["red", "crimson"]}, {"id": 2, "question": "q", "label": "two"}],
    )
    benchmark = get_benchmark(name)
    tasks = question_tasks(benchmark, benchmark.load_questions(""), tmp_path / "exact")
    out = tmp_path / "a.jsonl"
    out.write_text(
        "".join(
            json.dumps({**task.record, "answer": text}) + "\n"
            for task, text in zip(tasks, ["The Crimson.", "2"], strict=True)
        )
    )
    assert benchmark.score_results(str(out)).metrics["accuracy"] == 0.5
    (tmp_path / "judge").mkdir()
    rules = 'kind: judge\njudge:\n  scale: [1, 10]\n  pass_at: 7\n  prompt: "Q {question} A {answer} R {label}"\n'
    benchmark = get_benchmark(write_yaml(tmp_path / "judge", rules, [{"id": 1, "question": "What?"}]))
    assert benchmark.judge_prompt({"prompt": "What?", "answer": "It."}).startswith("Q What? A It. R not given\n")
    out.write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in [{"id": 1, "judge": "fine.\nRating: 8"}, {"id": 2, "judge": "?"}, {"id": 3, "rating": 3}]
        )
    )
    metrics = benchmark.score_results(str(out)).metrics
    assert metrics == pytest.approx({"score": (8 + 1 + 3) / 3, "pass_rate": 1 / 3, "unreadable": 1 / 3})
    out.write_text('{"id": 1, "rating": 11}\n')
    with pytest.raises(ResultError, match=r":1: the rating must be a number from 1 to 10, found 11"):
        benchmark.score_results(str(out))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: maybe\n", "`kind`: expected one of yesno, exact, judge, found 'maybe'"),
        ("kind: exact\ncolour: red\n", "unknown field `colour`: expected some of images, judge, kind"),
        ("kind: exact\n  - x: [\n", ":2: not valid YAML"),
        ("kind: judge\njudge:\n  scale: 5\n", "`judge.scale`: expected [lowest, highest], found 5"),
        ("- 1\n", "expected a mapping"),
        ("kind: yesno\nname: 5\n", "`name`: expected text, found 5"),
        (
            "kind: yesno\nmax_new_tokens: many\n",
            "`max_new_tokens`: expected a whole number of at least 1, found 'many'",
        ),
        ("kind: yesno\nmax_new_tokens: yes\n", "`max_new_tokens`: expected a whole number of at least 1, found True"),
        ("kind: yesno\nmax_new_tokens: 0\n", "`max_new_tokens`: expected a whole number of at least 1, found 0"),
        (
            "kind: yesno\nquestions: 7\n",
            "`questions`: expected a list of mappings such as {question: ..., label: ...}, or a file name, found 7",
        ),
        (
            "kind: yesno\nquestions: [a]\n",
            "`questions[0]`: expected an element of a list of mappings such as {question: ..., label: ...}, or a file name, found 'a'",
        ),
        (
            "kind: yesno\nquestions: []\n",
            "`questions`: expected a list of mappings such as {question: ..., label: ...}, or a file name, found []",
        ),
        ('kind: yesno\nprompt: "{question"\n', "`prompt`: not a template"),
        (
            'kind: yesno\nprompt: "{} please"\n',
            "`prompt`: expected names of a question's fields, such as {question}, found {}",
        ),
        (
            "kind: judge\njudge: {scale: [a, b]}\n",
            "`judge.scale[0]`: expected an element of [lowest, highest], found 'a'",
        ),
        ("kind: judge\njudge: {pass_at: high}\n", "`judge.pass_at`: expected a number on the scale, found 'high'"),
        ("kind: judge\njudge: {pass_at: 9}\n", "`judge`: expected `pass_at` on the scale [1, 5], found 9"),
    ],
)
def test_generic_definitions_are_checked(tmp_path, text, message):
    with pytest.raises(ResultError) as caught:
        get_benchmark(write_yaml(tmp_path, text, []))
    assert message in str(caught.value)


def test_a_judge_prompt_that_wants_another_field_names_the_record(tmp_path):
    yaml = write_yaml(tmp_path, 'kind: judge\njudge: {prompt: "{hint} {answer}"}\n', [])
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"id": 1, "hint": "x", "answer": "a"}\n{"id": 2, "answer": "b"}\n')
    with pytest.raises(
        ResultError, match=r"answers\.jsonl:2: the judge's prompt wants the field 'hint', found \['answer', 'id'\]"
    ):
        judge_tasks(get_benchmark(yaml), answers)


def test_small_readers():
    assert normalise("  The red-square!") == "red square" and normalise("A") == ""
    assert read_scale("Rating: 3 ... **Rating:** 4", 1, 5) == 4.0 and read_scale("rating: 9", 1, 5) is None
    for reply in ("rating: 4", "Rating: 4/5", "Rating: **4** / 5", "Rating: 4 out of 5.", "Rating: 4.", "Rating = 4.0"):
        assert read_scale(reply, 1, 5) == 4.0, reply
    for other in ("4/10", "4 out of 10", "1-5", "1 to 5", "1e1", "4,5", "-4", "45"):
        assert read_scale(f"Rating: 3 ... Rating: {other}", 1, 5) is None, other
    assert [
        singular(w)
        for w in ("dogs", "buses", "glass", "boxes", "berries", "women", "children", "leaves", "bus", "shoes", "tennis")
    ] == ["dog", "bus", "glass", "box", "berry", "woman", "child", "leaf", "bus", "shoe", "tennis"]
    words = {"red circle": "red circle", "circle": "circle", "can": "can", "couch": "sofa", "sofa": "sofa"}
    assert mentions("Two red circles, a circle; you can see a can and couches.", words) == [
        "red circle",
        "circle",
        "can",
        "sofa",
    ]


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (28, 28), "red").save(path)


def test_mme_release_layouts_load_and_export_scores_the_same(tmp_path):
    data = tmp_path / "mme"
    for name in ("0001", "0002"):
        picture(data / "count" / f"{name}.png")
        (data / "count" / f"{name}.txt").write_text("How many?\tYes\nHow few? Please answer yes or no.\tNo\n")
    picture(data / "posters" / "images" / "p.jpg")
    (data / "posters" / "questions_answers_YN").mkdir()
    (data / "posters" / "questions_answers_YN" / "p.txt").write_text("Is it A?\tYes\nIs it B?\tNo\n")
    benchmark = get_benchmark("mme")
    tasks = question_tasks(benchmark, benchmark.load_questions(data), data)
    assert [task.record["category"] for task in tasks] == ["count"] * 4 + ["posters"] * 2
    assert all(task.prompt.count("Please answer yes or no.") == 1 for task in tasks)
    assert tasks[-1].record["image"] == "posters/images/p.jpg"
    rows = [
        {**task.record, "answer": text}
        for task, text in zip(tasks, ["Yes", "No\tsure", "No", "No", " yes", "what"], strict=True)
    ]
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    official = benchmark.export_results(rows, tmp_path / "official")
    assert (official / "count.txt").read_text().splitlines()[
        1
    ] == "0001.png\tHow few? Please answer yes or no.\tNo\tNo sure"
    a, b = score("mme", str(own)), score("mme", str(official))
    assert a.metrics == b.metrics and a.metrics["perception"] == pytest.approx(75 + 50 + 50 + 0)
    assert compare_scores(a, b).questions == 6, "both layouts name the questions alike"


def test_pope_release_loads_and_exports(tmp_path):
    picture(tmp_path / "val2014" / "x.jpg")
    for name in ("random", "adversarial"):
        (tmp_path / f"coco_pope_{name}.json").write_text(
            '{"question_id": 1, "image": "x.jpg", "text": "Is there a dog?", "label": "no"}\n'
        )
    benchmark = get_benchmark("pope")
    tasks = question_tasks(benchmark, benchmark.load_questions(tmp_path), tmp_path)
    assert [task.record["id"] for task in tasks] == ["random/1", "adversarial/1"]
    rows = [{**task.record, "answer": text} for task, text in zip(tasks, ["No", "Yes"], strict=True)]
    exported = score("pope", str(benchmark.export_results(rows, tmp_path / "out")))
    assert {name: row["accuracy"] for name, row in exported.categories.items()} == {"random": 1, "adversarial": 0}


def test_amber_release_loads_and_exports(tmp_path):
    picture(tmp_path / "image" / "AMBER_1.jpg")
    (tmp_path / "query").mkdir()
    queries = [
        {"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."},
        {"id": 2, "image": "AMBER_1.jpg", "query": "Is it sunny?"},
    ]
    (tmp_path / "query" / "query_all.json").write_text(json.dumps(queries))
    truth = [
        {"id": 1, "type": "generative", "truth": ["dog"], "hallu": ["cat"]},
        {"id": 2, "type": "discriminative-attribute-state", "truth": "no"},
    ]
    (tmp_path / "annotations.json").write_text(json.dumps(truth))
    benchmark = get_benchmark("amber")
    tasks = question_tasks(benchmark, benchmark.load_questions(tmp_path), tmp_path)
    assert [task.prompt for task in tasks] == ["Describe this image.", "Is it sunny? Please answer yes or no."]
    rows = [{**task.record, "answer": text} for task, text in zip(tasks, ["A dog.", "no, it is not."], strict=True)]
    out = benchmark.export_results(rows, tmp_path / "official.json")
    assert json.loads(out.read_text()) == [{"id": 1, "response": "A dog."}, {"id": 2, "response": "No"}]
    result = score("amber", str(out), str(tmp_path))
    assert result.metrics["f1"] == 100 and result.metrics["chair"] == 0 and result.metrics["cover"] == 100


def test_judged_benchmarks_load(tmp_path):
    picture(tmp_path / "images" / "a.jpg")
    record = {
        "question_type": "attribute",
        "question_topic": "food",
        "image_id": "1",
        "image_src": "https://host/a.jpg",
        "image_content": ["dog", "ball"],
        "question": "What colour?",
        "gt_answer": "Red.",
        "model_answer": "",
    }
    (tmp_path / "response_template.json").write_text(json.dumps([record]))
    (tmp_path / "mm-vet.json").write_text(
        json.dumps(
            {"v1_0": {"imagename": "a.jpg", "question": "x?", "answer": "1<OR>2", "capability": ["ocr", "math"]}},
            indent=1,
        )
    )
    mmhal, mmvet = get_benchmark("mmhal"), get_benchmark("mmvet")
    (task,) = question_tasks(mmhal, mmhal.load_questions(tmp_path), tmp_path)
    text = mmhal.judge_prompt({**task.record, "answer": "Blue."})
    assert all(part in text for part in ("dog, ball", "Red.", "Blue.", "What colour?", "Rating:"))
    (task,) = question_tasks(mmvet, mmvet.load_questions(tmp_path), tmp_path)
    assert "1 OR 2" in mmvet.judge_prompt({**task.record, "answer": "3"}) and task.record["category"] == "ocr+math"
    judged = tmp_path / "judged.jsonl"
    judged.write_text(json.dumps({**task.record, "answer": "3", "judge": "0.4"}) + "\n")
    result = score("mmvet", str(judged))
    assert result.metrics["score"] == pytest.approx(40) and result.categories["math"]["score"] == pytest.approx(40)
    assert result.items[0].label == "1<OR>2" and result.items[0].answer == "3"


def test_missing_images_are_found_before_the_first_answer(tmp_path):
    (tmp_path / "redteam.jsonl").write_text(
        json.dumps({"id": 1, "prompt": "q", "expected": "refuse", "image": "gone.png"}) + "\n"
    )
    benchmark = get_benchmark("redteam")
    with pytest.raises(ResultError, match=r"question 1: the image .*gone\.png is not there"):
        question_tasks(benchmark, benchmark.load_questions(tmp_path), tmp_path)
