"""MM-Vet (arXiv 2308.02490): open questions, each needing several of six capabilities; a judge gives 0.0 to 1.0 in
steps of 0.1.

Results: the official grade file, a JSON object id -> {"score": [0.5, ...], "content": [...], "model": [...]} (a score
per judge run), a plain object id -> grade, or records (JSONL or JSON list) with a stored `score` or the judge's reply.
Capabilities come from `mm-vet.json` or from `capability` in the records.
A score is 100 times the sum of grades over the number of QUESTIONS: with `mm-vet.json` at hand, a question without a
grade scores 0, as in the official scorer. So does a judge's reply that holds none, in the mean over several as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from silkie.evaluation.benchmark import Benchmark
from silkie.evaluation.records import Question, Record, check_unique, find_beside, find_image, read_records
from silkie.evaluation.scoring import Array, Item, Score, build_score, ratio

__all__ = [
    "CAPABILITIES",
    "export_results",
    "judge_prompt",
    "load_questions",
    "mmvet_rates",
    "read_grade",
    "score_results",
]

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
SCORE_FIELDS = ("score", "grade", "correctness", "rating")
# "score: 0.7", "score: 0.7/1"; not "0,7", a range ("0-1") or a grade out of another number than 1
_LABELLED = re.compile(
    r"(?:score|correctness)\s*[:=]\s*([01](?:\.\d+)?)(?![\d.,]*\d)(?!-\d|\s+to\s+\d)"
    r"(?!\s*(?:/|(?:out\s+)?of\b)\s*(?!1(?:\.0*)?(?![\d.]*\d))\d)"
)
JUDGE_FIELDS = ("judge", "content", "gpt_response", "judgement", "judgment")


def read_grade(reply: str) -> float | None:
    """A grade from a judge's reply: its first word, or the number after its last "score:" / "correctness:"; None
    outside 0..1, on another scale ("score: 1/10") or without one."""
    words = reply.split()
    labelled = _LABELLED.findall(reply.lower())
    text = labelled[-1] if labelled else words[0].rstrip(".,") if words else ""
    try:
        grade = float(text)
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


def mmvet_rates(sums: Array) -> dict[str, Array]:
    """Sums (questions, grade points, ungraded) [..., 3] -> score 0..100, share of ungraded questions 0..1 (of
    several judge runs, one that is not read is a part of one)."""
    total, points, missing = np.moveaxis(np.asarray(sums, dtype=np.float64), -1, 0)
    return {"score": 100 * ratio(points, total), "ungraded": ratio(missing, total)}


def score_results(results: str | Path, annotations: str | Path | None = None) -> Score:
    """Score a grade file.

    Args:
        annotations: `mm-vet.json`. Default: searched beside the results.

    Raises:
        ResultError: a grade outside 0..1, a question that is not in `mm-vet.json`, one graded twice, or neither grade
            nor reply; with file and line.
    """
    path = Path(results)
    records = read_records(path, key_field="id")
    check_unique(records)
    source = Path(annotations) if annotations else find_beside(path, ["mm-vet.json"])
    questions = {record.id: record for record in read_records(source, key_field="id")} if source is not None else {}
    warnings = []
    items, runs, unread = [], 0, 0
    for record in records:
        if questions and record.id not in questions:
            raise record.error(f"question {record.id!r} is not in {source}.")
        grades = _grades(record)
        runs, unread = runs + len(grades), unread + grades.count(None)
        items.append(_item(record, questions.get(record.id), grades))
    graded = {record.id for record in records}
    absent = [record for identity, record in questions.items() if identity not in graded]
    # the official score divides by all questions, so a file with some grades missing must not score higher for it
    items += [_item(None, question, []) for question in absent]
    if unread:
        warnings.append(
            f"{unread} of {runs} judge replies hold no grade and score 0, as in the official scorer (which first asks"
            " again, up to five times)."
        )
    if absent:
        warnings.append(
            f"{len(absent)} of {len(questions)} questions have no grade and score 0 (first: {absent[0].id})."
        )
    if not any(item.category for item in items):
        warnings.append(
            "no capabilities: found neither mm-vet.json nor `capability` in the records; only the total is given."
        )
    return build_score(
        "mmvet",
        items,
        mmvet_rates,
        category_of=lambda item: item.category.split("+") if item.category else [],
        category_order=CAPABILITIES,
        warnings=warnings,
        lower_is_better=("ungraded",),
    )


def load_questions(data: str | Path) -> list[Question]:
    """Questions of `mm-vet.json`: id -> {imagename, question, answer, capability}; images in `images/` or beside."""
    path = Path(data)
    file = path / "mm-vet.json" if path.is_dir() else path
    questions = []
    for record in read_records(file, key_field="id"):
        name = record.text(("imagename", "image"), "image")
        found = find_image(name, file.parent / "images", file.parent)
        capability = _capabilities(record)
        extra = {"gt_answer": record.data.get("answer", ""), "capability": capability}
        questions.append(
            Question(
                id=record.id,
                prompt=record.text(("question", "prompt"), "question"),
                images=(found,),
                category="+".join(capability),
                extra=extra,
            )
        )
    return questions


def judge_prompt(record: dict[str, Any]) -> str:
    """What a text-only judge is asked about one answer. (Our own wording; the official prompt is a table of worked
    examples.)"""
    reference = str(record.get("gt_answer", "")).replace("<AND>", " AND ").replace("<OR>", " OR ")
    return (
        "Grade how correct an answer is, against a reference: 0.0 is totally wrong, 1.0 totally right, in steps of"
        " 0.1. Where the reference joins parts with AND, full marks need every part; where it joins them with OR, one"
        f" part is enough.\n\nQuestion: {record['prompt']}\nReference: {reference}\nAnswer: {record['answer']}\n\nReply"
        " with the grade alone, such as 0.5"
    )


def export_results(items: Sequence[dict], out: str | Path) -> Path:
    """Write records of `run mmvet` as the official answers file: a JSON object id -> answer."""
    path = Path(out)
    path.write_text(
        json.dumps({record["id"]: record["answer"] for record in items}, ensure_ascii=False, indent=1) + "\n",
        encoding="utf-8",
    )
    return path


def _item(record: Record | None, question: Record | None, grades: Sequence[float | None]) -> Item:
    """One question: `record` holds its grades (None: it has none), one per judge run; `question` is its entry in
    mm-vet.json (None: there is no such file)."""
    source = question or record
    assert source is not None
    reference = question.data.get("answer") if question else source.data.get("gt_answer")
    grade = sum(g or 0.0 for g in grades) / max(len(grades), 1)
    ungraded = list(grades).count(None) / len(grades) if grades else 1.0
    return Item(
        id=source.id,
        answer=str(record.find(("answer", "prediction", "response"), "")) if record else "",
        counts=(1.0, grade, ungraded),
        value=grade,
        correct=grade >= 0.5,
        category="+".join(_capabilities(source)),
        image=(record.image if record else "") or source.image,
        prompt=source.prompt,
        label=str(reference) if reference else None,
        read=None if ungraded == 1 else f"{grade:g}",
    )


def _grades(record: Record) -> list[float | None]:
    """The record's grades, one per judge run; None for a reply that holds none."""
    stored = record.find(SCORE_FIELDS)
    if stored is None and set(record.data) == {"id", "answer"} and not isinstance(record.data["answer"], str):
        stored = record.data["answer"]  # a plain object id -> grade
    if stored is None:
        reply = record.find(JUDGE_FIELDS)
        replies = [reply] if isinstance(reply, str) else reply
        if not isinstance(replies, list) or not replies:
            raise record.error(
                f"no grade: found {record.fields}, expected a number in one of {list(SCORE_FIELDS)} or a judge's reply "
                f"in one of {list(JUDGE_FIELDS)}."
            )
        return [read_grade(str(text)) for text in replies]
    values = stored if isinstance(stored, list) else [stored]
    if not values:
        raise record.error("the list of scores is empty; expected a number from 0.0 to 1.0 per judge run.")
    return [_number(record, value) for value in values]


def _number(record: Record, value: Any) -> float:
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 <= number <= 1:
        raise record.error(f"a score must be a number from 0.0 to 1.0, found {value!r}.")
    return number


def _capabilities(record: Record) -> list[str]:
    """A list, or one text such as "rec+ocr" or "rec, ocr"."""
    named = record.data.get("capability") or []
    if isinstance(named, str):
        return re.split(r"\s*[+,]\s*", named.strip())
    if not isinstance(named, list):
        raise record.error(f"`capability` must be a list of names, found {named!r:.80}.")
    return [str(name) for name in named]


BENCHMARK = Benchmark(
    name="mmvet",
    title="MM-Vet",
    load_questions=load_questions,
    score_results=score_results,
    export_results=export_results,
    layout="""\
the official grade file (id -> {"score": [...]}), or records with `score`; mm-vet.json beside it or with
--annotations""",
    max_new_tokens=512,
    judge_prompt=judge_prompt,
)
