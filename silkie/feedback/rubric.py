"""What a judge rates and on which scale, read from a YAML file (`rubrics/vlfeedback.yaml` is the default and shows
every key)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml


class RubricError(ValueError):
    """A rubric file that cannot be used; the message names the file, the key and what was expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aspect:
    """One thing that is rated. `levels` maps a rating to its meaning; `aliases` are further headings the parser
    accepts."""

    name: str
    description: str = ""
    aliases: tuple[str, ...] = ()
    levels: tuple[tuple[float, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rubric:
    """Aspects and scale of a judge. Ratings are `minimum, minimum + step, ..., maximum`."""

    name: str
    introduction: str
    aspects: tuple[Aspect, ...]
    minimum: float = 1.0
    maximum: float = 5.0
    step: float = 1.0

    def __post_init__(self) -> None:
        names = [aspect.name.casefold() for aspect in self.aspects]
        if not names or len(set(names)) != len(names) or not all(name.strip() for name in names):
            raise RubricError(
                f"rubric {self.name!r}: expected one or more aspects with distinct, non-empty names, found {names}"
            )
        if not (self.minimum < self.maximum and self.step > 0):
            raise RubricError(
                f"rubric {self.name!r}: expected minimum < maximum and step > 0, found {self.minimum}, {self.maximum},"
                f" {self.step}"
            )

    @property
    def aspect_names(self) -> tuple[str, ...]:
        return tuple(aspect.name for aspect in self.aspects)

    @property
    def allowed(self) -> tuple[float, ...]:
        """Every rating of the scale, lowest first."""
        count = int((self.maximum - self.minimum) / self.step + 1e-9) + 1
        return tuple(round(self.minimum + i * self.step, 9) for i in range(count))

    def fingerprint(self) -> str:
        """12 hex digits that change with anything the judge is told; a journal refuses to mix two of them."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def number_text(value: float) -> str:
    """4.0 -> "4", 3.5 -> "3.5", 11/3 -> "3.6667": how ratings are written in prompts and in VLFeedback's string
    columns."""
    return f"{round(float(value), 4):g}"


def _aspect(entry: Any, where: str) -> Aspect:
    if isinstance(entry, str):
        return Aspect(name=entry)
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise RubricError(f"{where}: expected a name or a mapping with `name`, found {entry!r}")
    unknown = set(entry) - {"name", "description", "aliases", "levels"}
    if unknown:
        raise RubricError(
            f"{where} ({entry['name']}): unknown keys {sorted(unknown)}; known are name, description, aliases, levels"
        )
    try:
        levels = tuple(sorted((float(rating), str(meaning)) for rating, meaning in (entry.get("levels") or {}).items()))
    except (TypeError, ValueError, AttributeError) as error:
        raise RubricError(
            f"{where} ({entry['name']}): levels must map a number to a text, found {entry.get('levels')!r}"
        ) from error
    return Aspect(
        name=entry["name"].strip(),
        description=str(entry.get("description") or "").strip(),
        aliases=tuple(str(alias) for alias in entry.get("aliases") or ()),
        levels=levels,
    )


def parse_rubric(text: str, where: str) -> Rubric:
    """The rubric in a YAML text; `where` names its source in errors. Raises RubricError."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RubricError(f"{where}: not valid YAML: {error}") from error
    if not isinstance(data, Mapping) or not isinstance(data.get("aspects"), list):
        raise RubricError(
            f"{where}: expected a mapping with a list `aspects` (see silkie/feedback/rubrics/vlfeedback.yaml)"
        )
    unknown = set(data) - {"name", "scale", "introduction", "aspects"}
    if unknown:
        raise RubricError(f"{where}: unknown keys {sorted(unknown)}; known are name, scale, introduction, aspects")
    scale = data.get("scale") or {}
    if not isinstance(scale, Mapping) or set(scale) - {"minimum", "maximum", "step"}:
        raise RubricError(f"{where}: scale must be a mapping of minimum, maximum, step; found {scale!r}")
    try:
        numbers = {key: float(value) for key, value in scale.items()}
    except (TypeError, ValueError) as error:
        raise RubricError(f"{where}: scale must hold numbers, found {scale!r}") from error
    return Rubric(
        name=str(data.get("name") or Path(where).stem),
        introduction=str(data.get("introduction") or "Rate every answer to the instruction about the image.").strip(),
        aspects=tuple(_aspect(entry, f"{where}: aspects[{i}]") for i, entry in enumerate(data["aspects"])),
        **numbers,
    )


@cache
def default_rubric() -> Rubric:
    """VLFeedback's three aspects: Helpfulness, Ethical Considerations, Visual Faithfulness, 1 to 5."""
    source = resources.files("silkie.feedback") / "rubrics" / "vlfeedback.yaml"
    return parse_rubric(source.read_text(encoding="utf-8"), "vlfeedback.yaml")


def load_rubric(path: str | Path | None = None) -> Rubric:
    """The rubric of a YAML file, or the default one. Raises RubricError with the file, the key and what was
    expected."""
    if path is None:
        return default_rubric()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RubricError(f"cannot read the rubric {path}: {error}") from error
    return parse_rubric(text, str(path))
