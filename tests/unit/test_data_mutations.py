"""Whatever stands in a field of a record: the row becomes a group, or a counted problem that names line and column.
Nothing else is raised."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import datasets
import pytest

from silkie.data import load_preferences
from tests.support import preference_files as files
from tests.unit.test_data_sources import PAIR_FORMATS, TURNS_AS_COLUMNS

ODD = [
    None,
    0,
    3.5,
    float("nan"),
    True,
    "",
    " ",
    "x",
    "\ud83d half",
    "<image>",
    10**30,
    [],
    {},
    ["a"],
    [None],
    [{}],
    [[0]],
    {"a": 1},
    {"bytes": 1},
    {"bytes": None, "path": None},
    {"value": 5},
    {"content": None},
    "1",
]
TURN = lambda role, text: {"role": role, "content": text}  # noqa: E731
RECORDS: dict[str, tuple[str, dict[str, Any]]] = (
    {name: (name, record("0.png")) for name, record in PAIR_FORMATS.items()}
    | {
        "vlfeedback, list of objects": ("vlfeedback", files.vlfeedback(0)),
        "vlfeedback, object of lists": ("vlfeedback", files.vlfeedback(0, dict_of_lists=True)),
        "groups": ("groups", files.group_record(models=["a", "b"], rationales=[{"Help": "x"}, {"Help": "y"}])),
        "groups with pairs": (
            "groups",
            files.group_record(
                prompt=[TURN("user", [{"type": "image"}, {"type": "text", "text": "Q"}])],
                pairs=[[0, 1]],
                pair_weights=[1.0],
            ),
        ),
        "trl, turns": (
            "trl",
            {"images": ["0.png"], "prompt": [TURN("user", "Q")], "chosen": [TURN("assistant", "a")], "rejected": "b"},
        ),
        "trl, implicit prompt": (
            "trl",
            {
                "chosen": [TURN("user", "Q"), TURN("assistant", "a")],
                "rejected": [TURN("user", "Q"), TURN("assistant", "b")],
            },
        ),
    }
    | {
        f"{name}, turns as an object of lists": (name.split(",")[0], record)
        for name, record in TURNS_AS_COLUMNS.items()
    }
)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def mutants(record: dict[str, Any]) -> Iterator[Any]:
    """The record with every field, at any depth, replaced by every odd value, and left out."""
    yield record
    yield from (value for value in ODD if not isinstance(value, str))
    for *above, key in filter(None, places(record)):
        for value in [..., *ODD]:
            changed = copy.deepcopy(record)
            parent = changed
            for step in above:
                parent = parent[step]
            if value is ...:
                del parent[key]
            else:
                parent[key] = value
            yield changed


@pytest.mark.parametrize("name", RECORDS)
def test_every_field_replaced_by_every_odd_value(name, tmp_path):
    datasets.disable_progress_bars()
    format, record = RECORDS[name]
    files.write_images(tmp_path, 1)
    rows = list(mutants(record))
    path = files.write_lines(tmp_path / "rows.jsonl", rows)
    groups, report = load_preferences(
        path, format=format, on_error="skip", regroup_pairs=False, cache_dir=tmp_path / "cache", return_report=True
    )
    assert report.rows == len(rows) == len(groups) + len(report.problems)
    errors = [problem.message for problem in report.problems if problem.kind == "error"]
    assert len(errors) > len(rows) / 5 and len(groups) > 1
    for message in errors:
        assert re.match(
            rf"rows.jsonl \({format}\), line \d+, column '[^']+': found .+; expected .+", message, re.DOTALL
        )
        assert (
            "that raised" not in message
        )  # a source knows what is wrong; the net below it is for sources of the user's own
