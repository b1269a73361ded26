"""Settings that people write by hand (YAML files), checked by pydantic. An error is one line that names the field, what
was expected of it and what was found: pydantic's own message lists every branch of every union.

    class Scale(BaseModel, frozen=True):
        model_config = CHECKED
        minimum: float = Field(1.0, description="a number")

    scale = check(Scale, yaml.safe_load(text))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

__all__ = ["CHECKED", "FieldError", "check", "parse_yaml"]

T = TypeVar("T")

# A misspelt key must not be ignored: the setting it was meant for would silently keep its default.
CHECKED = ConfigDict(extra="forbid")
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


class FieldError(ValueError):
    """Settings that cannot be used: `field`: expected ..., found ..."""


def check(kind: type[T], data: Any) -> T:
    """`data` as a `kind`: a pydantic model or dataclass whose fields' descriptions say what they hold.

    Raises:
        FieldError: the first thing that is wrong, the most deeply nested one of a union's.
    """
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        worst = max(error.errors(), key=lambda found: len(found["loc"]))
        raise FieldError(_complaint(kind, worst)) from None


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError, also for what PyYAML itself answers with another error: nesting
    that it cannot follow, a date that is none, a key that is a list."""
    try:
        return yaml.safe_load(text)
    except (RecursionError, ValueError, TypeError, OverflowError) as error:
        raise yaml.YAMLError(f"it cannot be read: {error}") from error


def _complaint(kind: Any, error: Any) -> str:
    unknown = error["type"] in _UNKNOWN
    path, expected, owner = _place(kind, error["loc"][:-1] if unknown else error["loc"])
    if unknown:
        inside = f" of `{path}`" if path else ""
        known = ", ".join(sorted(owner))
        return f"unknown field `{error['loc'][-1]}`{inside}: expected some of {known}"
    where = f"`{path}`: " if path else ""
    if error["type"] == "value_error":  # a rule of the class itself, in its own words
        return where + str(error["ctx"]["error"])
    if error["type"].startswith("missing"):
        return f"{where}missing" + (f"; expected {expected}" if expected else "")
    expected = expected or error["msg"].removeprefix("Input should be ").split(" or an instance of ")[0]
    part = "an element of " if path.endswith("]") else ""
    return f"{where}expected {part}{expected}, found {error['input']!r:.80}"


def _place(kind: Any, loc: tuple[Any, ...]) -> tuple[str, str, dict[str, Any]]:
    """The dotted path of a location, the description of its field, and the fields of the class that it ends in.
    Pydantic also puts the names of a union's branches into locations: those are passed over."""
    path, expected = "", ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif info := _fields(kind).get(part):
            path, expected, kind = f"{path}.{part}".lstrip("."), info.description or "", info.annotation
    return path, expected, _fields(kind)


def _fields(kind: Any) -> dict[str, Any]:
    """The fields of the classes that an annotation names, also inside lists and unions."""
    found: dict[str, Any] = {}
    for part in _parts(kind):
        if is_dataclass(part) and not hasattr(part, "__pydantic_fields__"):  # of the standard library
            hints = get_type_hints(part, include_extras=True)
            found |= {name: FieldInfo.from_annotation(hint) for name, hint in hints.items()}
        found |= getattr(part, "__pydantic_fields__", {})
    return found


def _parts(kind: Any) -> Iterator[Any]:
    yield kind
    for part in get_args(kind):
        yield from _parts(part)
