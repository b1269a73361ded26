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

import yaml
from pydantic import BaseModel, ConfigDict, Field

from silkie.io.checked import CHECKED, FieldError, check, parse_yaml
from silkie.io.files import MAX_SETTINGS_BYTES, read_file


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


class _AspectEntry(BaseModel, frozen=True):
    """An aspect as the YAML file has it."""

    model_config = CHECKED | ConfigDict(coerce_numbers_to_str=True)

    name: str = Field(description="the aspect's name")
    description: str | None = Field(default=None, description="text")
    aliases: list[str] | None = Field(default=None, description="a list of further headings")
    levels: dict[float, str] | None = Field(default=None, description="a mapping of a number to a text")

    def aspect(self) -> Aspect:
        return Aspect(
            name=self.name.strip(),
            description=(self.description or "").strip(),
            aliases=tuple(self.aliases or ()),
            levels=tuple(sorted((self.levels or {}).items())),
        )


class _Scale(BaseModel, frozen=True):
    model_config = CHECKED

    minimum: float = Field(default=1.0, description="a number")
    maximum: float = Field(default=5.0, description="a number")
    step: float = Field(default=1.0, description="a number")


class _RubricFile(BaseModel, frozen=True):
    """The keys of a rubric file."""

    model_config = CHECKED

    name: str | None = Field(default=None, description="text")
    scale: _Scale | None = Field(default=None, description="a mapping of minimum, maximum, step")
    introduction: str | None = Field(default=None, description="text")
    aspects: list[str | _AspectEntry] = Field(description="a list of names, or of mappings with `name`")


def parse_rubric(text: str, where: str) -> Rubric:
    """The rubric in a YAML text; `where` names its source in errors. Raises RubricError."""
    try:
        data = parse_yaml(text)
    except yaml.YAMLError as error:
        raise RubricError(f"{where}: not valid YAML: {error}") from error
    if not isinstance(data, Mapping):
        raise RubricError(
            f"{where}: expected a mapping with a list `aspects` (see silkie/feedback/rubrics/vlfeedback.yaml)"
        )
    try:
        file = check(_RubricFile, data)
    except FieldError as error:
        raise RubricError(f"{where}: {error}") from None
    return Rubric(
        name=file.name or Path(where).stem,
        introduction=(file.introduction or "Rate every answer to the instruction about the image.").strip(),
        aspects=tuple(Aspect(name=entry) if isinstance(entry, str) else entry.aspect() for entry in file.aspects),
        **dict(file.scale or _Scale()),
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
        text = read_file(path, limit=MAX_SETTINGS_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise RubricError(f"cannot read the rubric {path}: {error}") from error
    return parse_rubric(text, str(path))
