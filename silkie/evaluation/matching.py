"""Which question of a benchmark an answer belongs to.

An answer that says what it answers is matched by that: by its id, else by the text of its question and its image. The
place in the file decides only where an answer carries nothing, and never against what it carries."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from silkie.evaluation.records import ANSWER_FIELDS, PROMPT_FIELDS, Record, ResultError

__all__ = ["check_answered_once", "match_questions", "question_of"]

logger = logging.getLogger(__name__)

Key = tuple[str, str]  # question, name of the image ("" where that is not known on both sides)


def question_of(record: Record) -> str:
    """The text of the question that a record carries; "" where it carries none. POPE's files call it `text`, which
    beside an answer is no answer."""
    asked = record.find(PROMPT_FIELDS)
    if asked is None and record.find(ANSWER_FIELDS) is not None:
        asked = record.data.get("text")
    return asked if isinstance(asked, str) else ""


def match_questions(file: Path, answers: Sequence[Record], questions: Sequence[Record], source: Path) -> list[Record]:
    """The question of every answer, from the question file `source`.

    Raises ResultError for an answer whose question is not there, two answers to one question, an answer whose text
    contradicts the question that its id or its place gives it, and another number of answers where only the place can
    tell."""
    matched = _by_id(answers, questions, source) or _by_text(answers, questions, source)
    if matched is None:
        if len(questions) != len(answers):
            line = min(len(questions), len(answers)) + 1
            raise ResultError(
                file,
                line,
                f"{len(answers)} answers, but {source} has {len(questions)} questions. Expected one answer per"
                " question, in order.",
            )
        matched = list(questions)
    elif len(answers) < len(questions):
        logger.warning(
            "%s answers %d of the %d questions in %s; the others are not scored.",
            file,
            len(answers),
            len(questions),
            source,
        )
    for answer, question in zip(answers, matched, strict=True):
        _check_same(answer, question, source)
    return matched


def check_answered_once(answers: Sequence[Record]) -> None:
    """One question about one image counts once, whatever its ids are. Raises ResultError at the second answer."""
    seen: dict[Key, Record] = {}
    for answer in answers:
        text, image = _bare_question(question_of(answer)), _image(answer)
        if text and image and (first := seen.setdefault((text, image), answer)) is not answer:
            raise answer.error(
                f"the question {text[:80]!r} about {image} was already answered at line {first.line}, under another id."
                " Expected one answer per question: remove one of them."
            )


def _by_id(answers: Sequence[Record], questions: Sequence[Record], source: Path) -> list[Record] | None:
    by_id = {record.id: record for record in questions if record.data.get("question_id") is not None}
    if len(by_id) < len(questions) or not all(record.data.get("question_id") is not None for record in answers):
        return None
    if unknown := next((record for record in answers if record.id not in by_id), None):
        raise unknown.error(f"question_id {unknown.id!r} is not in {source}.")
    return [by_id[record.id] for record in answers]


def _by_text(answers: Sequence[Record], questions: Sequence[Record], source: Path) -> list[Record] | None:
    """None where an answer carries no question, or where the texts do not tell the questions apart."""
    if not all(map(question_of, answers)):
        return None
    with_images = all(map(_image, answers)) and all(map(_image, questions))
    known: dict[Key, Record] = {}
    for question in questions:
        text = _bare_question(question.prompt)
        if not text or known.setdefault((text, _image(question) if with_images else ""), question) is not question:
            return None
    matched, used = [], dict[int, Record]()
    for answer in answers:
        found = _look_up(known, _bare_question(question_of(answer)), _image(answer) if with_images else "")
        if found is None:
            about = f" about {answer.image}" if with_images else ""
            raise answer.error(f"the question {question_of(answer)[:120]!r}{about} is not in {source}.")
        if (first := used.setdefault(id(found), answer)) is not answer:
            raise answer.error(
                f"the question at {source}:{found.line} was already answered at line {first.line}. Expected one answer"
                " per question: remove one of them."
            )
        matched.append(found)
    return matched


def _look_up(known: dict[Key, Record], text: str, image: str) -> Record | None:
    if (exact := known.get((text, image))) is not None:
        return exact
    longer = [key for key in known if key[1] == image and text.startswith(key[0])]
    return known[max(longer, key=lambda key: len(key[0]))] if longer else None


def _check_same(answer: Record, question: Record, source: Path) -> None:
    asked, expected = _bare_question(question_of(answer)), _bare_question(question.prompt)
    if asked and expected and not asked.startswith(expected):
        raise answer.error(
            f"it answers {asked[:80]!r}, but the question that its id or place gives it is {expected[:80]!r}"
            f" ({source}:{question.line}). Expected the question's own `question_id` or, beside its text, its `image`."
        )
    theirs, ours = _image(answer), _image(question)
    if theirs and ours and theirs != ours:
        raise answer.error(f"it is about {theirs!r}, but the question at {source}:{question.line} about {ours!r}.")


def _bare_question(text: str) -> str:
    """A question without image marks, case and extra white space. What a prompt adds stands behind it."""
    return " ".join(text.replace("<image>", " ").casefold().split())


def _image(record: Record) -> str:
    return Path(record.image).name
