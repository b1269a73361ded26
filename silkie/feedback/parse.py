"""Read a judge's answer: the JSON of structured output, or the Markdown form of VLFeedback.

    #### Helpfulness Assessment
    ##### Output for Text 1
    Rating: 4
    Rationale: ...
    ##### Output for Text 2
    ...
    #### Ethical Considerations Assessment
    ...

Lenient about decoration (heading level, bold, list marks, "4/5", a code fence around it all), strict about content:
every aspect once, every text once per aspect, one rating each and on the scale. Whatever is ambiguous is an error: a
rating never lands on the wrong response."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from silkie.endpoint.errors import AnswerError
from silkie.feedback.items import AspectRating
from silkie.feedback.rubric import Rubric, number_text

LONGEST_ANSWER = 500_000  # characters, some pages of thinking and a rationale per rating included
LONGEST_HEADING = 300  # characters of a line that can be a heading

Ratings = tuple[Mapping[str, AspectRating], ...]

_THINKING = re.compile(r"^\s*<think>.*?</think>", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"```[a-zA-Z]*[ \t]*\r?\n")
_HEADING = re.compile(r"^\s{0,3}(?:#{1,6}(?:\s+|(?=[A-Z]))(?P<hashed>.+?)#*|\*\*(?P<bold>[^*]+?)\*\*\s*:?)\s*$")
_TEXT = re.compile(
    r"^(?:output\s+for\s+)?(?:text|response|answer|output)\s*(?:#|no\.?)?\s*<?(?P<number>\d{1,9})>?$", re.IGNORECASE
)
_FIELD = re.compile(
    r"^\s*(?:[-*+]\s+)?[*_`]{0,3}(?P<name>rating|rationale)[*_`]{0,3}\s*:\s*[*_`]{0,3}\s*(?P<value>.*)$", re.IGNORECASE
)
_RULE = re.compile(r"-{3,}")  # a separator between sections is not part of the rationale above it
_NUMBER = re.compile(
    r"^[\[(<*_`\s]*(?P<value>-?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*(?P<top>\d+(?:\.\d+)?))?[\])>*_`\s.,;]*$",
    re.IGNORECASE,
)
_NOT_APPLICABLE = re.compile(r"^[\[(*_`\s]*(?:n\.?\s*/?\s*a\.?|not\s+applicable|none)[\])*_`\s.]*$", re.IGNORECASE)
_REFUSAL = re.compile(
    r"\b(?:i\s*['’]?\s*a?m\s+(?:very\s+)?(?:sorry|unable|not\s+able)|i\s+(?:can\s*not|can['’]?t|won['’]?t|will\s+not|must\s+decline)"
    r"|(?:unable|not\s+able)\s+to\s+(?:assist|help|comply|rate|evaluate|provide)|as\s+an\s+ai\b|against\s+(?:my|our|the)\s+polic)",
    re.IGNORECASE,
)


def looks_like_refusal(text: str) -> bool:
    """True for a text that opens by declining the task."""
    return _REFUSAL.search(text[:400]) is not None


def _bare_heading(heading: str) -> str:
    """ "**2. Visual Faithfulness Assessment:**" -> "visual faithfulness"."""
    text = re.sub(r"[*_`#:]", " ", heading).strip().casefold()
    text = re.sub(r"^\(?\d+[.)]\s*", "", text)
    return re.sub(r"\s+", " ", re.sub(r"\b(?:assessment|evaluation|rating)s?$", "", text)).strip()


def _rating(value: Any, rubric: Rubric, where: str) -> float | None:
    """A number on the scale, or None for "N/A". Raises AnswerError("bad_rating")."""
    scale = f"{number_text(rubric.minimum)} to {number_text(rubric.maximum)} in steps of {number_text(rubric.step)}"
    if value is None or (isinstance(value, str) and _NOT_APPLICABLE.match(value)):
        return None
    match = _NUMBER.match(value) if isinstance(value, str) else None
    if isinstance(value, bool) or not (match or isinstance(value, (int, float))):
        raise AnswerError("bad_rating", f"{where}: the rating is {value!r}; expected {scale}, or N/A")
    if match and match["top"] and float(match["top"]) != rubric.maximum:
        raise AnswerError("bad_rating", f"{where}: the rating {value!r} is out of {match['top']}; the scale is {scale}")
    number = float(match["value"]) if match else float(value)
    if not any(abs(number - allowed) < 1e-6 for allowed in rubric.allowed):
        raise AnswerError("bad_rating", f"{where}: the rating {value!r} is not on the scale {scale}")
    return number


def _complete(found: Mapping[str, Mapping[int, AspectRating]], rubric: Rubric, count: int) -> Ratings:
    """Check that every aspect holds texts 1..count, and turn aspect -> text into text -> aspect."""
    missing = [name for name in rubric.aspect_names if name not in found]
    if missing:
        raise AnswerError(
            "missing_aspect", f"no rating for {', '.join(missing)}; found {', '.join(found) or 'no aspect at all'}"
        )
    for name in rubric.aspect_names:
        if set(found[name]) != set(range(1, count + 1)):
            raise AnswerError(
                "wrong_count", f"{name}: expected ratings for texts 1 to {count}, found {sorted(found[name])}"
            )
    return tuple({name: found[name][text] for name in rubric.aspect_names} for text in range(1, count + 1))


def parse_markdown(text: str, rubric: Rubric, count: int) -> Ratings:
    """Ratings of `count` texts from the Markdown form, in the order shown. Raises AnswerError."""
    known = {_bare_heading(name): aspect.name for aspect in rubric.aspects for name in (aspect.name, *aspect.aliases)}
    found: dict[str, dict[int, AspectRating]] = {}
    aspect: str | None = None
    number: int | None = None
    fields: dict[str, list[str]] = {}
    field: str | None = None

    def close() -> None:
        """Store the text block that ends here."""
        nonlocal fields, field, number
        if aspect is not None and number is not None:
            where = f"{aspect}, text {number}"
            if number in found[aspect]:
                raise AnswerError("wrong_count", f"{where} is rated twice")
            if "rating" not in fields:
                raise AnswerError("bad_rating", f"{where}: no `Rating:` line")
            lines = "\n".join(fields.get("rationale", [])).strip().split("\n")
            rationale = "\n".join(lines[:-1] if _RULE.fullmatch(lines[-1].strip()) else lines).strip()
            found[aspect][number] = AspectRating(_rating(fields["rating"][0].strip(), rubric, where), rationale)
        number, field, fields = None, None, {}

    for line in text.splitlines():
        heading = _HEADING.match(line) if len(line) <= LONGEST_HEADING else None
        title = _bare_heading(heading["hashed"] or heading["bold"]) if heading else ""
        as_text = _TEXT.match(title) if heading else None
        as_field = _FIELD.match(line)
        if as_text:
            close()
            if aspect is None:
                raise AnswerError("malformed", f"{line.strip()!r} stands before the heading of any aspect")
            number = int(as_text["number"])
        elif heading and title in known:
            close()
            aspect = known[title]
            if aspect in found:
                raise AnswerError("malformed", f"the aspect {aspect} appears twice")
            found[aspect] = {}
        elif heading and heading["hashed"] and not as_field:
            close()  # a heading of the judge's own, such as "Summary": what follows it rates nothing
            number = None
        elif as_field and number is not None:
            field = as_field["name"].lower()
            if field in fields:
                raise AnswerError("malformed", f"{aspect}, text {number}: two `{field.capitalize()}:` lines")
            fields[field] = [as_field["value"]]
        elif field == "rationale":
            fields["rationale"].append(line)
    close()
    return _complete(found, rubric, count)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which a key that comes twice is an error rather than its last value. Raises ValueError."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key appears twice in {[key for key, _ in pairs]!r:.200}")
    return found


def parse_json(text: str, rubric: Rubric, count: int) -> Ratings:
    """Ratings of `count` texts from the JSON form (see `prompting.answer_schema`). Raises AnswerError."""
    try:
        data = json.loads(text, object_pairs_hook=_once, parse_int=float)
    except (ValueError, RecursionError) as error:  # a judge that runs away may open thousands of brackets
        raise AnswerError("invalid_json", f"not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise AnswerError("malformed", f"expected a JSON object with the aspects as keys, found {type(data).__name__}")
    known = {_bare_heading(name): aspect.name for aspect in rubric.aspects for name in (aspect.name, *aspect.aliases)}
    found: dict[str, dict[int, AspectRating]] = {}
    for key, texts in data.items():
        aspect = known.get(_bare_heading(key.replace("_", " ")))
        if aspect is None:
            continue
        if isinstance(texts, list):  # by place, where the server does not keep to the schema
            texts = {f"text_{i}": entry for i, entry in enumerate(texts, 1)}
        if aspect in found or not isinstance(texts, dict):
            raise AnswerError(
                "malformed", f"{key!r}: expected one object with keys text_1 to text_{count}, found {texts!r:.80}"
            )
        found[aspect] = {}
        for name, entry in texts.items():
            match = _TEXT.match(name.replace("_", " "))
            names = [key.casefold() for key in entry] if isinstance(entry, dict) else []
            if isinstance(entry, dict) and len(set(names)) == len(names):
                entry = dict(zip(names, entry.values(), strict=True))
            if (
                not match
                or not isinstance(entry, dict)
                or len(set(names)) < len(names)
                or "rating" not in entry
                or int(match["number"]) in found[aspect]
            ):
                raise AnswerError(
                    "malformed",
                    f"{aspect}: expected text_N: {{rationale, rating}} once per text, found {name!r}: {entry!r:.80}",
                )
            where = f"{aspect}, text {match['number']}"
            rating = _rating(entry["rating"], rubric, where)
            found[aspect][int(match["number"])] = AspectRating(rating, str(entry.get("rationale") or "").strip())
    return _complete(found, rubric, count)


def parse_answer(text: str, rubric: Rubric, count: int) -> tuple[Ratings, Literal["json", "markdown"]]:
    """Ratings in the order shown, and which form they were in. Raises AnswerError with the raw text; a declined task is
    "refused"."""
    if len(text) > LONGEST_ANSWER:
        raise AnswerError("malformed", f"an answer of {len(text):,} characters; {LONGEST_ANSWER:,} are read", raw=text)
    body = _THINKING.sub("", text).strip()
    if (opened := _FENCE.match(body)) and body.endswith("```") and len(body) - 3 >= opened.end():
        body = body[opened.end() : -3].strip()
    if not body:
        raise AnswerError("empty", "the answer is empty", raw=text)
    try:
        if body.startswith("{"):
            return parse_json(body, rubric, count), "json"
        return parse_markdown(body, rubric, count), "markdown"
    except AnswerError as error:
        kind, message = error.kind, str(error)
        if kind in ("missing_aspect", "malformed") and looks_like_refusal(body):
            kind, message = "refused", f"the judge declined: {body[:200]!r}"
        raise AnswerError(kind, message, raw=text) from error
