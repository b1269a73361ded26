"""Errors of hand-written settings name the field, what it must hold and what was found."""

from typing import Annotated, Literal

import pytest
from annotated_types import Ge
from pydantic import BaseModel, Field, Strict
from pydantic.dataclasses import dataclass

from silkie.io.checked import CHECKED, FieldError, check


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Part:
    size: Annotated[int, Strict(), Ge(1)] = Field(default=1, description="a whole number of at least 1")

    def __post_init__(self):
        if self.size == 13:
            raise ValueError("13 is taken")


class Whole(BaseModel):
    model_config = CHECKED

    kind: Literal["a", "b"] = Field(description="a or b")
    parts: list[str | Part] = Field(default=[], description="a list of names, or of mappings with `size`")
    one: Part | None = Field(default=None, description="a mapping with `size`")


def test_what_is_right_is_read():
    whole = check(Whole, {"kind": "a", "parts": ["x", {"size": 2}], "one": None})
    assert whole.parts == ["x", Part(size=2)] and whole.one is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "`kind`: missing; expected a or b"),
        ({"kind": "c"}, "`kind`: expected a or b, found 'c'"),
        ({"kind": "a", "sort": 1}, "unknown field `sort`: expected some of kind, one, parts"),
        ({"kind": "a", "one": {"sizes": 1}}, "unknown field `sizes` of `one`: expected some of size"),
        ({"kind": "a", "one": {"size": True}}, "`one.size`: expected a whole number of at least 1, found True"),
        ({"kind": "a", "one": {"size": 13}}, "`one`: 13 is taken"),
        ({"kind": "a", "parts": [{"size": 0}]}, "`parts[0].size`: expected a whole number of at least 1, found 0"),
        (
            {"kind": "a", "parts": ["x", 4]},
            "`parts[1]`: expected an element of a list of names, or of mappings with `size`, found 4",
        ),
    ],
)
def test_what_is_wrong_is_named(data, message):
    with pytest.raises(FieldError) as caught:
        check(Whole, data)
    assert str(caught.value) == message
