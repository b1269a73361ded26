"""The scorers against second implementations of the published rules, written here in another style, on random files
with odd answers.

The rules: MME's `calculation.py` (first four characters; pairs of lines), POPE's `evaluate.py` (first sentence, no
commas, the words No / no / not), AMBER's `inference.py` (word lists, "No" as the positive class, 0.001 in every
denominator), MMHal-Bench's `rating: N`, MM-Vet's grades per capability.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from silkie.evaluation import ResultError, score
from silkie.evaluation.__main__ import main
from silkie.evaluation.lexicon import mentions

ANSWERS = (
    "Yes",
    "No",
    "yes",
    "no",
    "YES",
    "NO",
    "Yes, there is.",
    "No, there is not.",
    "no.",
    "yes.",
    "",
    "not sure",
    "I think yes",
    "  yes",
    "   no",
    " Yes",
    " no",
    "Yes\u2028indeed",
    "ja",
    "是",
    "Noooo",
    "Know",
    "eyes",
    "It is not. Yes.",
    "There is no dog",
    "\u00a0yes",
    "The answer is No",
    "no,",
    "No\x0cmaybe",
    "yes\x85",
    "maybe. no",
    '"Yes"',
    "(no)",
    "**No**",
    "n/a",
    "None",
)
SUBTASKS = {
    "perception": [
        "existence",
        "count",
        "position",
        "color",
        "posters",
        "celebrity",
        "scene",
        "landmark",
        "artwork",
        "OCR",
    ],
    "cognition": ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"],
}


def cut(value: float, digits: int = 9) -> float:
    return round(value, digits)


@pytest.mark.parametrize("seed", range(6))
def test_mme(tmp_path, seed):
    rng = random.Random(seed)
    line_end = ("\n", "\r\n")[seed % 2]
    totals: dict[str, float] = {}
    for part, names in SUBTASKS.items():
        for name in names:
            pairs = [[(g, rng.choice(ANSWERS)) for g in rng.sample(["Yes", "No"], 2)] for _ in range(rng.randint(1, 9))]
            rows = [f"{i}.jpg\tIs it {g}?\t{g}\t{a}" for i, pair in enumerate(pairs) for g, a in pair]
            if rng.random() < 0.3:
                rows.insert(2, "")
            text = ("\ufeff" if seed == 3 else "") + line_end.join(rows) + (line_end if seed != 2 else "")
            (tmp_path / f"{name}.txt").write_bytes(text.encode())
            right = [
                [g.lower() == next((w for w in ("yes", "no") if w in a.lower()[:4]), "other") for g, a in pair]
                for pair in pairs
            ]
            mine = 100 * sum(map(sum, right)) / (2 * len(pairs)) + 100 * sum(map(all, right)) / len(pairs)
            totals[part] = totals.get(part, 0.0) + mine
            alone = score("mme", str(tmp_path / f"{name}.txt"))
            assert cut(alone.categories[name]["score"]) == cut(mine)
    (tmp_path / "notes.txt").write_text("not a subtask of MME\n")
    result = score("mme", str(tmp_path))
    assert {part: cut(result.metrics[part]) for part in totals} == {part: cut(total) for part, total in totals.items()}
    assert cut(result.metrics["total"]) == cut(sum(totals.values()))
    assert result.warnings == ["files that are no subtask of MME were not read: notes.txt."]


def test_mme_names_and_repeated_questions(tmp_path):
    """A question may be asked twice of an image, with both truths; only a repeated line is an error. Subtask names are
    read in any case."""
    (tmp_path / "ocr.txt").write_text("a.jpg\tIs it so?\tYes\tYes\na.jpg\tIs it so?\tNo\tYes\n")
    assert score("mme", str(tmp_path)).categories["OCR"]["score"] == 50
    (tmp_path / "count.txt").write_bytes(b"a.jpg\tq\tYes\tYes\na.jpg\tr\tNo\t\xff\n")
    with pytest.raises(ResultError, match="not UTF-8") as caught:
        score("mme", str(tmp_path))
    assert caught.value.line == 2


def pope_truth(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """(answer, label) of every question."""
    said = [
        "no" if {"No", "no", "not"} & set(answer.split(".")[0].replace(",", "").split(" ")) else "yes"
        for answer, _ in pairs
    ]
    table = [(s, label) for s, (_, label) in zip(said, pairs, strict=True)]
    hit, wrong, missed = (table.count(cell) for cell in (("yes", "yes"), ("yes", "no"), ("no", "yes")))
    truth = {"accuracy": sum(s == label for s, label in table) / len(table), "yes_rate": said.count("yes") / len(said)}
    if hit:
        precision, recall = hit / (hit + wrong), hit / (hit + missed)
        truth |= {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall)}
    return truth


@pytest.mark.parametrize("seed", range(8))
def test_pope_in_every_layout(tmp_path, seed):
    rng = random.Random(seed)
    layouts: dict[str, Callable[[dict, str], dict]] = {
        "labelled": lambda q, a: {**q, "answer": a},
        "official": lambda q, a: {"question": q["text"], "answer": a},
        "llava": lambda q, a: {"question_id": q["question_id"], "prompt": q["text"], "text": a, "model_id": "m"},
        "response": lambda q, a: {"question": q["text"], "label": q["label"].capitalize(), "response": a},
    }
    every: list[tuple[str, str]] = []
    for name in ("random", "popular", "adversarial"):
        number = 6 * rng.randint(1, 4)
        questions: list[dict[str, Any]] = [
            {
                "question_id": i + 1,
                "image": f"{i // 6}.jpg",
                "text": f"Is there a thing {i}?",
                "label": ("yes", "no")[i % 2],
            }
            for i in range(number)
        ]
        answers = [rng.choice([*ANSWERS, "No\n", "Yes\nno", "a\tno"]) for _ in questions]
        truth = pope_truth(own := [(a, q["label"]) for a, q in zip(answers, questions, strict=True)])
        every += own
        (tmp_path / "questions").mkdir(exist_ok=True)
        (tmp_path / "questions" / f"coco_pope_{name}.json").write_text("".join(json.dumps(q) + "\n" for q in questions))
        for layout, form in layouts.items():
            file = tmp_path / layout / f"{name}_answers.jsonl"
            file.parent.mkdir(exist_ok=True)
            rows = [json.dumps(form(q, a), ensure_ascii=seed % 2 == 0) for q, a in zip(questions, answers, strict=True)]
            file.write_bytes((rng.choice(["\n", "\r\n"]).join(rows) + rng.choice(["", "\n", "\n\n"])).encode())
            metrics = score("pope", str(file)).metrics
            assert {k: cut(metrics[k] or 0.0) for k in truth} == {k: cut(v) for k, v in truth.items()}, layout
    truth = pope_truth(every)
    for layout in layouts:
        metrics = score("pope", str(tmp_path / layout)).metrics
        assert {k: cut(metrics[k] or 0.0) for k in truth} == {k: cut(v) for k, v in truth.items()}, layout


OBJECTS = {
    "sky": [],
    "grass": ["ground"],
    "road": ["path", "street", "ground"],
    "man": ["person", "people"],
    "car": ["tire", "light"],
    "beach": ["sand", "shore"],
    "watch": [],
    "orange": ["tangerine"],
    "knife": [],
    "child": ["kid", "people"],
    "bin": ["can", "bucket"],
    "rail": ["track"],
    "tree": ["forest", "leave"],
    "strawberry": [],
    "support": ["holder"],
    "box": ["container"],
    "ebook": ["e-book"],
}
PLURALS = {
    "man": "men",
    "knife": "knives",
    "child": "children",
    "strawberry": "strawberries",
    "box": "boxes",
    "bench": "benches",
}
KINDS = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}


def amber_words(rng: random.Random, annotation: dict) -> tuple[str, list[str]]:
    """A description and the listed nouns in it."""
    text, nouns = [], []
    for _ in range(rng.randint(0, 9)):
        noun = rng.choice(rng.choice([annotation["truth"], annotation["hallu"], list(OBJECTS)]))
        noun = rng.choice([noun, *OBJECTS[noun]])
        shown = rng.choice([noun, PLURALS.get(noun, noun)])
        text.append(
            rng.choice(
                ["There is a {}.", "I see the {}, which is old.", "It shows two {} and more.", "{},", "next to {} and"]
            ).format(shown)
        )
        nouns.append(noun)
    return " ".join(text), nouns


def amber_description(
    annotation: dict, nouns: list[str], safe: set[str]
) -> tuple[list[str], set[str], set[int], set[int]]:
    """(mentions, hallucinated positions ...) of one description; a word reaches the first annotated word that it is
    associated with, then the word itself."""

    def owner(words: list[str], noun: str) -> int | None:
        related = [i for i, word in enumerate(words) if noun in OBJECTS[word]]
        return next(iter([*related, *(i for i, word in enumerate(words) if word == noun)]), None)

    wrong, covered, hit = [], set(), set()
    for noun in nouns:
        if noun in safe:
            continue
        if (true := owner(annotation["truth"], noun)) is not None:
            covered.add(true)
            continue
        if (likely := owner(annotation["hallu"], noun)) is not None:
            hit.add(likely)
        wrong.append(noun)
    return nouns, wrong, covered, hit


@pytest.mark.parametrize("seed", range(8))
def test_amber_as_the_official_script_prints_it(tmp_path, seed):
    rng = random.Random(seed)
    safe = {"orange", "light"}
    annotations: list[dict[str, Any]] = []
    responses: list[dict[str, Any]] = []
    found = []
    for i in range(1, 16):
        true = rng.sample(list(OBJECTS), rng.randint(1, 6))
        annotation = {
            "id": i,
            "type": "generative",
            "truth": [*true, *true[: rng.randint(0, 1)]],
            "hallu": rng.sample([word for word in OBJECTS if word not in true], rng.randint(1, 4)),
        }
        text, nouns = amber_words(rng, annotation)
        annotations.append(annotation)
        responses.append({"id": i, "response": text})
        found.append((annotation, *amber_description(annotation, nouns, safe)))
    for i in range(16, 80):
        annotations.append({"id": i, "type": rng.choice(list(KINDS)), "truth": rng.choice(["yes", "no"])})
        responses.append({"id": i, "response": rng.choice(["Yes", "No", "Yes", "No", "yes", "No.", "", " No", "不"])})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "annotations.json").write_text(json.dumps(annotations, indent=4))
    (tmp_path / "data" / "relation.json").write_text(json.dumps(OBJECTS))
    (tmp_path / "data" / "safe_words.txt").write_text("\n".join(sorted(safe)))
    rng.shuffle(responses)
    (tmp_path / "results.json").write_text(json.dumps(responses, indent=rng.choice([None, 1]), ensure_ascii=False))
    printed = score("amber", str(tmp_path / "results.json")).official

    def share(part: float, whole: float, constants: int = 1) -> float:
        return round(part / (whole + 0.001 * constants) * 100, 1)

    assert printed["CHAIR"] == share(sum(len(w) for _, _, w, _, _ in found), sum(len(n) for _, n, _, _, _ in found))
    assert printed["Cover"] == share(sum(len(c) for *_, c, _ in found), sum(len(a["truth"]) for a, *_ in found))
    assert printed["Cog"] == share(sum(len(h) for *_, h in found), sum(len(a["hallu"]) for a, *_ in found))
    assert printed["Hal"] == round(100 - sum(not w for _, _, w, _, _ in found) / (len(found) + 0.001) * 100, 1)

    truth = {a["id"]: a for a in annotations}
    said = [(truth[r["id"]], r["response"]) for r in responses if truth[r["id"]]["type"] in KINDS]
    groups = {"": set(KINDS.values()), " (attribute)": {"state", "number", "action"}} | {
        f" ({name})": {name} for name in KINDS.values()
    }
    for suffix, kinds in groups.items():
        own = [(a["truth"].capitalize(), response) for a, response in said if KINDS[a["type"]] in kinds]
        constants = 3 if suffix == " (attribute)" else 1
        rejected = [t for t, response in own if response == "No"]
        accuracy = share(sum(t == response for t, response in own), len(own), constants)
        precision = share(rejected.count("No"), len(rejected), constants)
        recall = share(rejected.count("No"), [t for t, _ in own].count("No"), constants)
        small = 0.001 if suffix == " (existence)" else 0.0001
        f1 = round(2 * (precision / 100) * (recall / 100) / (precision / 100 + recall / 100 + small) * 100, 1)
        assert [printed[name + suffix] for name in ("Accuracy", "Precision", "Recall", "F1")] == [
            accuracy,
            precision,
            recall,
            f1,
        ], suffix


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("You can see a watch.", ["watch"]),
        ("She wears a hat, watch and tie", ["hat", "watch", "tie"]),
        ("A man watches the dog", ["dog"]),
        ("People watch the game.", []),
        ("lights, watches and tracks", ["light", "watch", "track"]),
        ("A light blue sky. The sky is light.", ["light", "sky", "sky"]),
        ("There is light on the cat, next to support", ["light", "cat", "support"]),
        ("A can of soda. It can be seen beside more. Can, cat", ["can", "can", "cat"]),
    ],
)
def test_words_that_are_not_always_objects(text, objects):
    names = ["can", "watch", "light", "support", "track", "sky", "cat", "tie", "hat", "dog"]
    assert mentions(text, names) == objects


REPLIES = (
    "Rating: {}",
    "Analysis.\nrating: {}",
    "**Rating:** {}",
    "Rating: {} or Rating: 2",
    "none",
    "Rating:{}",
    "",
    "Rating: 10",
    "Rating: {}.5",
)


@pytest.mark.parametrize("seed", range(4))
def test_mmhal_in_every_layout(tmp_path, seed):
    rng = random.Random(seed)
    replies = [rng.choice(REPLIES).format(rng.randint(0, 6)) for _ in range(96)]
    ratings = []
    for reply in replies:
        read = [n for n in range(7) if f"rating: {n}" in reply.lower()]
        ratings.append(read[0] if len(read) == 1 else 0)
    completions = [
        {"id": "same", "choices": [{"message": {"role": "assistant", "content": reply}}]} for reply in replies
    ]
    layouts: dict[str, list[Any]] = {
        "completions": completions,
        "completions as text": [json.dumps(completion) for completion in completions],
        "replies": replies,
        "records": [{"question": "q", "model_answer": "a", "gpt_evaluation": reply} for reply in replies],
        "numbers": [{"question": "q", "rating": n} for n in ratings],
    }
    for name, rows in layouts.items():
        (tmp_path / "r.json").write_text(json.dumps(rows, indent=1))
        result = score("mmhal", str(tmp_path / "r.json"))
        assert cut(result.metrics["score"]) == cut(sum(ratings) / 96), name
        assert cut(result.metrics["hallucination_rate"]) == cut(sum(n < 3 for n in ratings) / 96), name
        assert [cut(row["score"]) for row in result.categories.values()] == [
            cut(sum(ratings[i::8]) / 12) for i in range(8)
        ], name


@pytest.mark.parametrize("seed", range(4))
def test_mmvet_in_every_layout(tmp_path, seed):
    rng = random.Random(seed)
    names = ("rec", "ocr", "know", "gen", "spat", "math")
    questions = {
        f"v1_{i}": {
            "imagename": f"{i}.png",
            "question": "q",
            "answer": "a",
            "capability": rng.sample(names, rng.randint(1, 3)),
        }
        for i in range(rng.randint(4, 20))
    }
    grades = {name: rng.randint(0, 10) / 10 for name in questions}
    layouts: dict[str, Any] = {
        "official": {k: {"model": ["m"] * 2, "content": ["x"] * 2, "score": [v, v]} for k, v in grades.items()},
        "plain": grades,
        "records": [
            {"question_id": k, "capability": questions[k]["capability"], "score": v} for k, v in grades.items()
        ],
        "texts": [
            {"id": k, "capability": ", ".join(questions[k]["capability"]), "score": str(v)} for k, v in grades.items()
        ],
    }
    for layout, rows in layouts.items():
        folder = tmp_path / layout
        folder.mkdir()
        if layout in ("official", "plain"):
            (folder / "mm-vet.json").write_text(json.dumps(questions))
        (folder / "grades.json").write_text(json.dumps(rows))
        result = score("mmvet", str(folder / "grades.json"))
        assert cut(result.metrics["score"]) == cut(100 * sum(grades.values()) / len(grades)), layout
        for name in names:
            own = [grades[k] for k, q in questions.items() if name in q["capability"]]
            assert not own or cut(result.categories[name]["score"]) == cut(100 * sum(own) / len(own)), layout


JUNK = (None, True, 3, -1, 1e308, "x", "", [], {}, [1], {"a": 1}, float("nan"))


def broken(rng: random.Random, rows: list[dict]) -> bytes:
    """A results file after one accident: cut off, bytes flipped, a line too much, a field lost or of another kind."""
    rows = json.loads(json.dumps(rows))
    accident = rng.randrange(5)
    if accident == 0:
        row = rng.choice(rows)
        row[rng.choice(list(row))] = rng.choice(JUNK)
    elif accident == 1:
        row = rng.choice(rows)
        del row[rng.choice(list(row))]
    data = json.dumps(rows, indent=rng.choice([None, 1])) if rng.random() < 0.5 else "\n".join(map(json.dumps, rows))
    if accident == 2:
        data = data[: rng.randrange(len(data))]
    elif accident == 3:
        lines = data.split("\n")
        lines.insert(
            rng.randrange(len(lines) + 1), rng.choice(["garbage", "null", "[]", "{}", '"x"', "\x00", "\t\t", "12"])
        )
        data = "\n".join(lines)
    raw = bytearray(data.encode())
    if accident == 4:
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw)


ROWS: dict[str, list[dict]] = {
    "pope": [{"question_id": i, "image": "a.jpg", "text": "q", "label": "yes", "answer": "No, é"} for i in range(5)],
    "mmhal": [
        {"question": "q", "model_answer": "a", "choices": [{"message": {"content": "Rating: 3"}}]} for _ in range(5)
    ],
    "mmvet": [{"id": f"v{i}", "capability": ["rec"], "score": [0.5]} for i in range(5)],
    "redteam": [
        {"id": i, "category": "privacy", "prompt": "p", "expected": "refuse", "answer": "I cannot"} for i in range(5)
    ],
    "chair": [{"id": i, "image": "a.png", "objects": ["dog"], "answer": "A dog"} for i in range(5)],
    "mme": [{"category": "count", "image": "a", "prompt": str(i), "label": "no", "answer": "No"} for i in range(6)],
}


@pytest.mark.parametrize("benchmark", list(ROWS))
def test_a_damaged_file_is_scored_or_refused_with_its_line(tmp_path, benchmark):
    file = tmp_path / "results.json"
    outcomes = set()
    for seed in range(150):
        file.write_bytes(broken(random.Random(seed), ROWS[benchmark]))
        try:
            score(benchmark, str(file))
            outcomes.add("scored")
        except ResultError as error:
            assert error.path == file and error.line, str(error)
            outcomes.add("refused")
    assert "refused" in outcomes


def test_the_command_takes_names_and_positions(tmp_path, capsys):
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps({"question_id": 1, "label": "yes", "answer": "Yes"}) + "\n")
    forms = (
        ["score", "pope", str(file), "--json"],
        ["score", "pope", "--json", str(file)],
        ["score", "--benchmark", "pope", "--results", str(file), "--json"],
        ["score", "--json", "--benchmark=POPE", str(file)],
        ["score", "pope", "--results", str(file), "--json"],
    )
    for form in forms:
        assert main(form) == 0
        assert json.loads(capsys.readouterr().out)["metrics"]["accuracy"] == 1.0, form
    file.write_text(json.dumps({"question_id": 1, "label": "yes"}) + "\n")
    assert main(["score", "pope", str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {file}:1: no answer")


def test_text_behind_a_list_and_empty_lists_are_refused(tmp_path):
    file: Path = tmp_path / "r.json"
    for text, line, message in (
        ("[]", 1, "list is empty"),
        ("", 1, "file is empty"),
        ('[{"label": "yes", "answer": "yes"}]\n\nx', 3, "behind the end"),
    ):
        file.write_text(text)
        with pytest.raises(ResultError, match=message) as caught:
            score("pope", str(file))
        assert caught.value.line == line
