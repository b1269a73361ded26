"""A custom benchmark, defined in YAML over a folder of images.

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
      pass_at: 4                   # the lowest rating that passes
      sees_image: true
      prompt: "Is this answer right and grounded in the image? Question: {question} Reference: {label} Answer: {answer}"
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import yaml
from annotated_types import Ge
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, Strict, model_validator

from silkie.evaluation.benchmark import Benchmark
from silkie.evaluation.records import Question, Record, ResultError, answer_of, check_unique, read_records, read_text
from silkie.evaluation.scoring import Array, Item, Score, build_score, confusion_counts, confusion_rates, ratio
from silkie.evaluation.yes_no import read_first_word
from silkie.io.checked import CHECKED, FieldError, check, parse_yaml

__all__ = ["Definition", "load_definition", "normalise", "read_scale"]

Kind = Literal["yesno", "exact", "judge"]


def _template(text: str) -> str:
    """A prompt that `str.format` can fill by name."""
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise ValueError(f"not a template: {error}. Write {{{{ for a brace") from None
    if wrong := [name for name in fields if not name.isidentifier()]:
        raise ValueError(f"expected names of a question's fields, such as {{question}}, found {{{wrong[0]}}}")
    return text


def _increasing(scale: tuple[float, float]) -> tuple[float, float]:
    if not scale[0] < scale[1]:
        raise ValueError(f"expected [lowest, highest], found {list(scale)}")
    return scale


Template = Annotated[str, AfterValidator(_template)]
Number = Annotated[float, Strict()]  # not true, which is a 1 to Python, nor "5"


class JudgeRules(BaseModel, frozen=True):
    """How a judge is asked, and how its ratings are read."""

    model_config = CHECKED

    scale: Annotated[tuple[Number, Number], AfterValidator(_increasing)] = Field(
        default=(1.0, 5.0), description="[lowest, highest]"
    )
    pass_at: Number | None = Field(default=None, description="a number on the scale")
    sees_image: bool = Field(default=True, description="true or false", strict=True)
    prompt: Template = Field(
        default="Question: {question}\nReference: {label}\nAnswer: {answer}\n"
        "Is the answer right, and is all of it in the image?",
        description="text",
    )

    @model_validator(mode="after")
    def _pass_is_on_the_scale(self) -> JudgeRules:
        if self.pass_at is not None and not self.scale[0] <= self.pass_at <= self.scale[1]:
            low, high = self.scale
            raise ValueError(f"expected `pass_at` on the scale [{low:g}, {high:g}], found {self.pass_at:g}")
        return self


class _File(BaseModel, frozen=True):
    """The fields of a YAML definition."""

    model_config = CHECKED

    name: str = Field(description="text")
    kind: Kind = Field(description=f"one of {', '.join(get_args(Kind))}")
    questions: str | Annotated[list[dict[str, Any]], Field(min_length=1)] = Field(
        default="questions.jsonl", description="a list of mappings such as {question: ..., label: ...}, or a file name"
    )
    images: str = Field(default=".", description="the name of a folder")
    prompt: Template = Field(default="{question}", description="text")
    max_new_tokens: Annotated[int, Strict(), Ge(1)] = Field(default=256, description="a whole number of at least 1")
    # YAML reads a bare yes / no as a boolean
    positive: Annotated[Literal["yes", "no"], BeforeValidator(lambda v: {True: "yes", False: "no"}.get(v, v))] = Field(
        default="yes", description="yes or no"
    )
    judge: JudgeRules = Field(default=JudgeRules(), description="a mapping with scale, pass_at, sees_image, prompt")


class Definition(_File, frozen=True):
    """A YAML definition, checked, and the file it is from."""

    file: Path

    @property
    def folder(self) -> Path:
        return self.file.parent


def load_definition(path: str | Path) -> Benchmark:
    """A benchmark from its YAML file.

    Raises:
        ResultError: not YAML (with the line), an unknown field, or a value of the wrong kind; with the field.
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


# not "1e1", "4,5" or a range
_RATING = re.compile(r"(-?\d+(?:\.\d+)?)(?!\.?\d|[,e-]\d|\s+to\s+\d)\**(?:\s*(?:/|(?:out\s+)?of\b)\s*(\d+(?:\.\d+)?))?")


def read_scale(reply: str, low: float, high: float) -> float | None:
    """The last "Rating: N" of a judge's reply, or "Rating: N/HIGH"; None where it is not on the scale, a range or out
    of another number, or there is none."""
    starts = [match.end() for match in re.finditer(r"rating\s*[:=]\s*\**\s*(?=-?\d)", reply.lower())]
    found = _RATING.match(reply.lower(), starts[-1]) if starts else None
    if found is None or (found[2] and float(found[2]) != high):
        return None
    return float(found[1]) if low <= float(found[1]) <= high else None


def _read(path: Path) -> Definition:
    if not path.is_file():
        raise ResultError(path, None, "no such YAML definition.")
    try:
        raw = parse_yaml(read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ResultError(
            path, mark.line + 1 if mark else None, f"not valid YAML: {getattr(error, 'problem', error)}."
        ) from None
    if not isinstance(raw, dict):
        raise ResultError(path, None, "expected a mapping with `kind` and `questions`.")
    try:
        fields = check(_File, {"name": path.stem, **raw})
    except FieldError as error:
        raise ResultError(path, None, f"{error}.") from None
    return Definition(**dict(fields), file=path)


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
    """Sums (questions, rating points, passed, unreadable) [..., 4]; an unreadable rating is scored as the lowest."""
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
