"""Result files: read them with the line of every record, so that each error can say where it is.

Accepted everywhere: JSONL (one object a line), a JSON list of objects, or a JSON object of id -> value.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from silkie.io.files import FileError, read_file
from silkie.io.jsonl import json_lines, json_problem, problem_line

__all__ = [
    "Question",
    "Record",
    "ResultError",
    "answer_of",
    "check_unique",
    "find_beside",
    "find_image",
    "read_records",
    "read_text",
]

# What the tools of the field call a model's answer, most specific first.
ANSWER_FIELDS = ("answer", "response", "model_answer", "prediction", "pred", "output", "generated_text", "caption")
ID_FIELDS = ("id", "question_id", "qid", "image_id")
PROMPT_FIELDS = ("prompt", "question", "query")
IMAGE_FIELDS = ("image", "image_path", "img_path", "images", "image_src", "imagename", "image_file")
CATEGORY_FIELDS = ("category", "type", "question_type", "subtask", "task", "split")


# `\ud800` to `\udfff` behind an even number of backslashes, unless it is a pair of both halves.
_HALF_PAIR = re.compile(
    r"(?<!\\)((?:\\\\)*)(?:\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2})"
)


class ResultError(ValueError):
    """A result file that cannot be scored: `FILE:LINE: what was found. What was expected.`"""

    def __init__(self, path: str | Path, line: int | None, message: str) -> None:
        self.path, self.line = Path(path), line
        super().__init__(f"{path}:{line}: {message}" if line else f"{path}: {message}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One benchmark question.

    `images` are paths (absolute, or relative to the working directory); `label` is the expected answer where the
    benchmark has one; `extra` travels unchanged into the results file (a judge or a scorer needs it there)."""

    id: str
    prompt: str
    images: tuple[str, ...] = ()
    category: str = ""
    label: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a result file and where it stands."""

    path: Path
    line: int
    data: dict[str, Any]

    def error(self, message: str) -> ResultError:
        return ResultError(self.path, self.line, message)

    def find(self, names: Sequence[str], default: Any = None) -> Any:
        """The first of the fields that is there and not null."""
        return next((self.data[n] for n in names if self.data.get(n) is not None), default)

    def need(self, names: Sequence[str], what: str) -> Any:
        """The first of the fields that is there; an error that names them all where none is."""
        value = self.find(names)
        if value is None:
            raise self.error(f"no {what}: found {self.fields}, expected one of {list(names)}.")
        return value

    @property
    def fields(self) -> str:
        """The record's fields, for messages; a null field is named as such, since it is treated as missing."""
        null = sorted(name for name, value in self.data.items() if value is None)
        return f"the fields {sorted(self.data)}" + (f" ({', '.join(null)}: null)" if null else "")

    def text(self, names: Sequence[str], what: str) -> str:
        value = self.need(names, what)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if not isinstance(value, str):
            raise self.error(f"{what} must be text, found {type(value).__name__} {str(value)[:80]!r}.")
        return value

    @property
    def id(self) -> str:
        return str(self.find(ID_FIELDS, self.line))

    @property
    def prompt(self) -> str:
        # In POPE's question files the question is called `text`; in LLaVA's answer files `text` is the answer and
        # `prompt` the question.
        fallback = "" if any(self.data.get(n) is not None for n in PROMPT_FIELDS) else self.data.get("text", "")
        return str(self.find(PROMPT_FIELDS, fallback))

    @property
    def image(self) -> str:
        value = self.find(IMAGE_FIELDS, "")
        return str(value[0] if isinstance(value, list) and value else value or "")

    @property
    def category(self) -> str:
        return str(self.find(CATEGORY_FIELDS, ""))


def answer_of(record: Record) -> str:
    """The model's answer. LLaVA's answer files call it `text`; a question file without answers, whose `text` is the
    question, is an error that says so."""
    if record.find(ANSWER_FIELDS) is not None:
        return record.text(ANSWER_FIELDS, "answer")
    text = record.data.get("text")
    # beside a prompt it is no question; alone it may be one, which has an image (POPE) or ends as one
    alone = isinstance(text, str) and record.find(IMAGE_FIELDS) is None and not text.rstrip().endswith("?")
    if isinstance(text, str) and (alone or record.find(PROMPT_FIELDS) is not None):
        return text
    raise record.error(
        f"no answer: found {record.fields}, expected one of {list(ANSWER_FIELDS)} (or LLaVA's `prompt` + `text`)."
    )


def read_records(path: str | Path, *, key_field: str | None = None, text_field: str | None = None) -> list[Record]:
    """Read a JSONL file, a JSON list of objects, or (with `key_field`) a JSON object whose keys are ids.

    Args:
        key_field: for an object of id -> value: the field that receives the id; a value that is not an object is put
            into `answer`.
        text_field: for a JSON list: the field that receives an element that is plain text.

    Raises:
        ResultError: not there, empty, not UTF-8, not JSON (with the line), an element that is not an object, or an id
            twice in an object.
    """
    path = Path(path)
    text = _whole(read_text(path))
    start = text.lstrip()[:1]
    if not start:
        raise ResultError(path, 1, "the file is empty; expected JSONL or a JSON list.")
    if start == "[":
        elements = list(_array(path, text))
        if not elements:
            raise ResultError(path, 1, "the list is empty; expected a JSON object per question.")
        return [
            _as_record(path, line, {text_field: v} if text_field and isinstance(v, str) else v) for line, v in elements
        ]
    if key_field is not None and start == "{" and (mapping := _object(path, text)) is not None:
        if not mapping:
            raise ResultError(path, 1, "the object is empty; expected an entry per question.")
        return [
            Record(path, _line_of_key(text, k), {key_field: k, **(v if isinstance(v, dict) else {"answer": v})})
            for k, v in mapping.items()
        ]
    if (single := _pretty_printed(path, text)) is not None:
        return [Record(path, 1, single)]
    records = []
    for line in json_lines(text.split("\n")):
        if line.error is not None:
            raise ResultError(path, line.number, f"not a JSON object: {line.problem}. Expected one JSON object a line.")
        records.append(_as_record(path, line.number, line.value))
    return records


def check_unique(records: Sequence[Record], key: str = "id") -> None:
    """Two records of one id would be counted twice; say where both are."""
    seen: dict[str, Record] = {}
    for record in records:
        identity = record.id if key == "id" else str(record.data.get(key))
        if identity in seen:
            first = seen[identity]
            where = f"line {first.line}" if first.path == record.path else f"{first.path}:{first.line}"
            raise record.error(
                f"the question with {key} {identity!r} was already answered at {where}. Expected one answer per"
                " question: remove one of them."
            )
        seen[identity] = record


def find_beside(results: Path, names: Sequence[str]) -> Path | None:
    """A companion file (annotations, questions) in the folder of the results, its parent, or their `data` /
    `annotations` / `questions` folders."""
    folder = results if results.is_dir() else results.parent
    for base in (folder, folder.parent):
        for sub in ("", "data", "annotations", "questions"):
            for name in names:
                candidate = base / sub / name
                if candidate.is_file() and candidate != results:
                    return candidate
    return None


def find_image(name: str, *folders: Path) -> str:
    """The image's path in the first of the folders that holds it; where none does, in the first, for the error that
    will name it."""
    places = [folder / name for folder in folders]
    return str(next((place for place in places if place.is_file()), places[0]))


def read_text(path: Path) -> str:
    """A UTF-8 file (a byte-order mark is dropped), its line ends as they are.

    Raises:
        ResultError: not there, a folder, or not UTF-8 (with the line).
    """
    if path.is_dir() or not path.exists():
        raise ResultError(path, None, "is a folder; expected a file." if path.is_dir() else "no such file.")
    try:
        data = read_file(path)
    except FileError as error:
        raise ResultError(path, None, f"{error}.") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ResultError(
            path, data.count(b"\n", 0, error.start) + 1, "not UTF-8 text; expected a UTF-8 file."
        ) from None


def _whole(text: str) -> str:
    """A JSON text in which halves of surrogate pairs are U+FFFD: models write them, and no report can."""
    return _HALF_PAIR.sub(r"\1\\ufffd", text) if "\\ud" in text.lower() else text


def _as_record(path: Path, line: int, value: Any) -> Record:
    if not isinstance(value, dict):
        raise ResultError(path, line, f"expected a JSON object, found {type(value).__name__} {shown(value)!r}.")
    return Record(path, line, value)


def shown(value: Any) -> str:
    """The beginning of a value, for a message; what nests beyond what Python prints has none."""
    try:
        return str(value)[:80]
    except (RecursionError, ValueError):
        return "..."


def _array(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON list and the line each one starts on (json.loads alone would lose the lines)."""
    decoder, position = json.JSONDecoder(), text.index("[") + 1
    # Lines are counted up to `counted`: counting from the start for every element would be quadratic
    line, counted = 1, 0
    expect_value = False  # after a comma
    while True:
        position = _skip_space(text, position)
        if text[position : position + 1] == "]" and not expect_value:
            behind = _skip_space(text, position + 1)
            if behind < len(text):
                raise ResultError(
                    path,
                    text.count("\n", 0, behind) + 1,
                    f"text behind the end of the list: {text[behind : behind + 80]!r}.",
                )
            return
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ResultError(path, error.lineno, f"not valid JSON: {error.msg} (column {error.colno}).") from None
        except (ValueError, RecursionError) as error:
            raise ResultError(path, line, f"{json_problem(error)}.") from None
        yield line, value
        position = _skip_space(text, position)
        following = text[position : position + 1]
        if following not in (",", "]"):
            raise ResultError(
                path,
                text.count("\n", 0, position) + 1,
                "not valid JSON: expected ',' or ']' after an element of the list (is the file cut off?).",
            )
        expect_value = following == ","
        position += following == ","


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _object(path: Path, text: str) -> dict[str, Any] | None:
    """The file as ONE object; None where it is JSONL."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            key = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise ResultError(
                path,
                _line_of_key(text, key, last=True),
                f"the key {key!r} occurs twice. Remove one of the two entries.",
            )
        return value

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError:
        return None
    except (ValueError, RecursionError) as error:
        if isinstance(error, ResultError):
            raise
        raise ResultError(path, problem_line(text, error), f"{json_problem(error)}.") from None
    is_record = isinstance(value, dict) and set(value) & {*ID_FIELDS, *ANSWER_FIELDS, *PROMPT_FIELDS}
    return value if isinstance(value, dict) and not is_record else None


def _pretty_printed(path: Path, text: str) -> dict[str, Any] | None:
    """One object written over several lines; None where the file is JSONL."""
    if text.lstrip().partition("\n")[0].rstrip() != "{":
        return None
    return _json(path, text)


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises ResultError with the line."""
    return _json(path, read_text(path))


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ResultError(path, problem_line(text, error), f"{json_problem(error)}.") from None


def _line_of_key(text: str, key: str, *, last: bool = False) -> int:
    quoted = json.dumps(key, ensure_ascii=False)
    position = text.rfind(quoted) if last else text.find(quoted)
    return text.count("\n", 0, max(position, 0)) + 1
