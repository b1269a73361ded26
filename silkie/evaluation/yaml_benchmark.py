"""A person's own benchmark, defined in YAML over a folder of images.

    name: kitchen
    kind: yesno                    # yesno | exact | judge
    questions: questions.jsonl     # beside the YAML; or a list written here
    images: images                 # folder of the images, relative to the YAML
    prompt: "{question} Please answer yes or no."
    max_new_tokens: 16

A question: {id, question, image (or images), label, category}. `yesno` reads the first word; `exact` compares with
`label` (text, or a list of accepted texts) without case, punctuation and articles; `judge` wants a rating, from `python
-m silkie.evaluation judge` or stored as `rating`:

    judge:
      scale: [1, 5]
      pass_at: 4                   # ratings from here on count as passed
      sees_image: true
      prompt: "Is this answer right and grounded in the image? Question: {question} Reference: {label} Answer: {answer}"
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import yaml

from silkie.evaluation.benchmark import Benchmark
from silkie.evaluation.records import Question, Record, ResultError, answer_of, check_unique, read_records, read_text
from silkie.evaluation.scoring import Array, Item, Score, build_score, confusion_counts, confusion_rates, ratio
from silkie.evaluation.yes_no import read_first_word

__all__ = ["Definition", "load_definition", "normalise", "read_scale"]

Kind = Literal["yesno", "exact", "judge"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeRules:
    scale: tuple[float, float] = (1.0, 5.0)
    pass_at: float | None = None
    sees_image: bool = True
    prompt: str = (
        "Question: {question}\nReference: {label}\nAnswer: {answer}\n"
        "Is the answer right, and is all of it in the image?"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """A YAML definition, checked."""

    name: str
    kind: Kind
    file: Path
    questions: str | list[dict[str, Any]] = "questions.jsonl"
    images: str = "."
    prompt: str = "{question}"
    max_new_tokens: int = 256
    positive: Literal["yes", "no"] = "yes"
    judge: JudgeRules = field(default_factory=JudgeRules)

    @property
    def folder(self) -> Path:
        return self.file.parent


# Field -> (types, how a message calls them); also the fields of `judge`.
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "name": ((str,), "text"),
    "questions": ((str, list), "a file name or a list of questions"),
    "images": ((str,), "the name of a folder"),
    "prompt": ((str,), "text"),
    "max_new_tokens": ((int,), "a whole number"),
    "pass_at": ((int, float, type(None)), "a number"),
    "sees_image": ((bool,), "true or false"),
}


def load_definition(path: str | Path) -> Benchmark:
    """A benchmark from its YAML file.

    Raises:
        ResultError: not YAML (with the line), an unknown field, or a value of the wrong kind.
    """
    definition = _read(Path(path))
    judged = definition.kind == "judge"
    return Benchmark(
        name=definition.name,
        title=definition.name,
        load_questions=lambda data: _questions(definition, data),
        score_results=lambda results, annotations=None: _score(definition, results, annotations),
        export_results=_export,
        max_new_tokens=definition.max_new_tokens,
        judge_prompt=(lambda record: _judge_prompt(definition.judge, record)) if judged else None,
        judge_sees_image=judged and definition.judge.sees_image,
    )


def normalise(text: str) -> str:
    """Lower case, words only, no articles: "The red square." and "red square" are the same answer."""
    return " ".join(word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the"))


def read_scale(reply: str, low: float, high: float) -> float | None:
    """The last "Rating: N" of a judge's reply, None where there is none on the scale."""
    found = re.findall(r"rating\s*[:=]\s*\**\s*(-?\d+(?:\.\d+)?)", reply.lower())
    value = float(found[-1]) if found else None
    return value if value is not None and low <= value <= high else None


def _read(path: Path) -> Definition:
    if not path.is_file():
        raise ResultError(path, None, "no such YAML definition.")
    try:
        raw = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ResultError(
            path, mark.line + 1 if mark else None, f"not valid YAML: {getattr(error, 'problem', error)}."
        ) from None
    if not isinstance(raw, dict):
        raise ResultError(path, None, "expected a mapping with `kind` and `questions`.")
    known = {"name", "kind", "questions", "images", "prompt", "max_new_tokens", "positive", "judge"}
    if unknown := sorted(set(raw) - known):
        raise ResultError(
            path,
            None,
            f"unknown field{'s' * (len(unknown) > 1)} {', '.join(unknown)}. Expected {', '.join(sorted(known))}.",
        )
    if raw.get("kind") not in get_args(Kind):
        raise ResultError(path, None, f"`kind` must be one of {', '.join(get_args(Kind))}, found {raw.get('kind')!r}.")
    # YAML reads a bare yes / no as a boolean
    positive = {True: "yes", False: "no"}.get(raw.get("positive", "yes"), raw.get("positive", "yes"))
    if positive not in ("yes", "no"):
        raise ResultError(path, None, f"`positive` must be yes or no, found {positive!r}.")
    _check_values(path, "", raw)
    if (tokens := raw.get("max_new_tokens", 1)) < 1:
        raise ResultError(path, None, f"`max_new_tokens` must be at least 1, found {tokens}.")
    questions = raw.get("questions")
    if (
        isinstance(questions, list)
        and (strange := next((row for row in questions if not isinstance(row, dict)), None)) is not None
    ):
        raise ResultError(
            path,
            None,
            f"`questions` must be a list of mappings such as {{question: ..., label: ...}}, found {strange!r:.80}.",
        )
    if questions == []:
        raise ResultError(path, None, "`questions` is empty.")
    return Definition(
        **{
            "name": path.stem,
            **raw,
            "positive": positive,
            "file": path,
            "judge": _judge_rules(path, raw.get("judge", {})),
        }
    )


def _judge_rules(path: Path, raw: Any) -> JudgeRules:
    if not isinstance(raw, dict) or set(raw) - {"scale", "pass_at", "sees_image", "prompt"}:
        raise ResultError(
            path, None, f"`judge` must be a mapping with scale, pass_at, sees_image, prompt; found {raw!r:.80}."
        )
    _check_values(path, "judge.", raw)
    scale = raw.get("scale", [1, 5])
    if not (
        isinstance(scale, list)
        and len(scale) == 2
        and all(isinstance(end, int | float) for end in scale)
        and scale[0] < scale[1]
    ):
        raise ResultError(path, None, f"`judge.scale` must be [lowest, highest], found {scale!r}.")
    if (threshold := raw.get("pass_at")) is not None and not scale[0] <= threshold <= scale[1]:
        raise ResultError(path, None, f"`judge.pass_at` must be on the scale {scale}, found {threshold}.")
    return JudgeRules(**{**raw, "scale": (float(scale[0]), float(scale[1]))})


def _check_values(path: Path, prefix: str, raw: Mapping[str, Any]) -> None:
    """Types, and templates that `str.format` can fill by name."""
    for name, value in raw.items():
        types, expected = _TYPES.get(name, ((object,), ""))
        # a boolean is an int to Python
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types and object not in types):
            raise ResultError(path, None, f"`{prefix}{name}` must be {expected}, found {value!r:.80}.")
    if "prompt" in raw:
        try:
            fields = [name for _, name, _, _ in string.Formatter().parse(raw["prompt"]) if name is not None]
        except ValueError as error:
            raise ResultError(
                path, None, f"`{prefix}prompt` is not a template: {error}. Write {{{{ for a brace."
            ) from None
        if wrong := [name for name in fields if not name.isidentifier()]:
            raise ResultError(
                path,
                None,
                f"`{prefix}prompt` must name fields of a question, such as {{question}}, found {{{wrong[0]}}}.",
            )


def _questions(definition: Definition, data: str | Path) -> list[Question]:
    folder = Path(data) if data else definition.folder
    records = _question_records(definition, folder)
    questions = []
    for record in records:
        names = record.data.get("images") or ([record.data["image"]] if record.data.get("image") else [])
        paths = tuple(str(folder / definition.images / name) for name in names)
        text = _filled(definition.prompt, {**record.data, "question": record.prompt}, record)
        label = record.data.get("label")
        extra: dict[str, Any] = {"question": record.prompt}
        if definition.kind != "judge":
            _check_label(definition, record)
        if isinstance(label, list):
            extra["labels"] = label
            label = label[0]
        plain = {True: "yes", False: "no"}.get(label, label) if isinstance(label, bool) else label
        questions.append(
            Question(
                id=record.id,
                prompt=text,
                images=paths,
                category=record.category,
                label=None if plain is None else str(plain),
                extra=extra,
            )
        )
    return questions


def _question_records(definition: Definition, folder: Path) -> list[Record]:
    if isinstance(definition.questions, str):
        return read_records(folder / definition.questions)
    return [Record(definition.file, 0, {"id": i, **row}) for i, row in enumerate(definition.questions)]


def _check_label(definition: Definition, record: Record) -> None:
    label = record.data.get("label")
    if label is None:
        raise record.error(f"no label: found {record.fields}, expected `label`.")
    if definition.kind == "yesno" and not isinstance(label, bool) and str(label).lower() not in ("yes", "no"):
        raise record.error(f"the label of a yes/no question must be yes or no, found {label!r}.")


def _score(definition: Definition, results: str | Path, annotations: str | Path | None) -> Score:
    records = read_records(results)
    check_unique(records)
    known = (
        {q.id: q for q in _questions(definition, annotations or definition.folder)}
        if _needs_labels(definition, records)
        else {}
    )
    items = []
    for record in records:
        question = known.get(record.id)
        if known and question is None:
            raise record.error(f"question {record.id!r} is not in the questions of {definition.name}.")
        items.append(_SCORERS[definition.kind](definition, record, question))
    rates = {"yesno": confusion_rates, "exact": _exact_rates, "judge": _judge_rates}[definition.kind]
    return build_score(definition.name, items, rates, lower_is_better=("unreadable",))


def _needs_labels(definition: Definition, records: Sequence[Record]) -> bool:
    return definition.kind != "judge" and any(record.data.get("label") is None for record in records)


def _common(record: Record, question: Question | None) -> dict[str, Any]:
    return {
        "id": record.id,
        "category": record.category or (question.category if question else ""),
        "cluster": record.image or record.id,
        "image": record.image or (question.images[0] if question and question.images else ""),
        "prompt": record.prompt or (question.prompt if question else ""),
    }


def _yesno_item(definition: Definition, record: Record, question: Question | None) -> Item:
    label = str(record.data.get("label", question.label if question else "")).strip().lower()
    if label not in ("yes", "no"):
        raise record.error(f"the label must be yes or no, found {label!r}.")
    answer = answer_of(record)
    read = read_first_word(answer)
    counts = confusion_counts(read, label, positive=definition.positive)
    return Item(
        **_common(record, question),
        answer=answer,
        counts=counts,
        value=float(read == label),
        correct=read == label,
        label=label,
        read=read,
    )


def _exact_item(definition: Definition, record: Record, question: Question | None) -> Item:
    accepted = record.data.get("labels") or (question.extra.get("labels") if question else None)
    accepted = accepted or [record.data.get("label", question.label if question else "")]
    answer = answer_of(record)
    right = normalise(answer) in {normalise(str(label)) for label in accepted}
    return Item(
        **_common(record, question),
        answer=answer,
        counts=(1.0, float(right)),
        value=float(right),
        correct=right,
        label=str(accepted[0]),
    )


def _judge_item(definition: Definition, record: Record, question: Question | None) -> Item:
    low, high = definition.judge.scale
    stored, reply = record.find(("rating", "score")), record.find(("judge", "judgement", "judgment"))
    if stored is None and not isinstance(reply, str):
        raise record.error(
            f"no rating: found {record.fields}, expected a number in `rating` or a judge's reply in `judge`."
        )
    if stored is not None and (
        isinstance(stored, bool) or not isinstance(stored, int | float) or not low <= stored <= high
    ):
        raise record.error(f"the rating must be a number from {low:g} to {high:g}, found {stored!r}.")
    rating = float(stored) if stored is not None else read_scale(str(reply), low, high)
    value = low if rating is None else rating
    threshold = definition.judge.pass_at if definition.judge.pass_at is not None else (low + high) / 2
    return Item(
        **_common(record, question),
        answer=str(record.find(("answer", "response"), "")),
        counts=(1.0, value, float(value >= threshold), float(rating is None)),
        value=value,
        correct=value >= threshold,
        label=record.data.get("label"),
        read=f"{value:g}",
        note=str(reply or "")[:2000],
    )


_SCORERS = {"yesno": _yesno_item, "exact": _exact_item, "judge": _judge_item}


def _exact_rates(sums: Array) -> dict[str, Array]:
    """Sums (questions, right) [..., 2]."""
    return {"accuracy": ratio(sums[..., 1], sums[..., 0])}


def _judge_rates(sums: Array) -> dict[str, Array]:
    """Sums (questions, rating points, passed, unreadable) [..., 4]; an unreadable rating counts as the lowest."""
    total, points, passed, unread = np.moveaxis(np.asarray(sums, dtype=np.float64), -1, 0)
    return {"score": ratio(points, total), "pass_rate": ratio(passed, total), "unreadable": ratio(unread, total)}


def _judge_prompt(rules: JudgeRules, record: Mapping[str, Any]) -> str:
    low, high = rules.scale
    fields = {"label": "not given", **record, "question": record.get("question", record.get("prompt", ""))}
    return (
        f"{rules.prompt.format_map(fields)}\n\nEnd with one line of the form\nRating: <number from {low:g} to {high:g}>"
    )


def _filled(template: str, fields: Mapping[str, Any], record: Record) -> str:
    try:
        return template.format_map(fields)
    except KeyError as error:
        raise record.error(f"the prompt template wants the field {error}, found {sorted(record.data)}.") from None


def _export(items: Sequence[dict], out: str | Path) -> Path:
    path = Path(out)
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    return path
