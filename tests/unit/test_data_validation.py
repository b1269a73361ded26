"""`validate` names what is wrong with stored groups, and the judge checks flag mixed-up texts."""

from __future__ import annotations

import datasets
import pytest

from silkie.data import DataError, RowError, group_features, user_turn, validate
from silkie.data.judge_checks import judge_flags
from tests.support import preference_files as files


def group(**changes):
    base = {
        "id": "g",
        "images": [files.embedded(0)],
        "prompt": [user_turn("Q", 1)],
        "responses": ["good", "bad"],
        "pairs": [[0, 1]],
        "pair_weights": [1.0],
        "models": None,
        "ratings": [{"Help": 5.0}, {"Help": 1.0}],
        "rationales": None,
    }
    return {**base, **changes}


def stored(*rows):
    datasets.disable_progress_bars()
    return datasets.Dataset.from_list(list(rows), features=group_features(["Help"]))


NAN = float("nan")
BROKEN = {
    "unreadable image": (
        {"images": [{"bytes": b"x", "path": None}]},
        r"images\[0\]",
        "not an image that Pillow can read",
    ),
    "truncated image": (
        {"images": [{"bytes": files.png(0)[:-50], "path": None}]},
        r"images\[0\]",
        "truncated or corrupt",
    ),
    "image count": ({"images": []}, "prompt", r"1 image part\(s\) for 0 image\(s\)"),
    "no prompt": ({"prompt": []}, "prompt", "ends with a user turn"),
    "empty response": ({"responses": ["good", " "]}, r"responses\[1\]", "a non-empty string"),
    "identical responses": ({"responses": ["same", "same "]}, "pairs", "responses 0 and 1, which are identical"),
    "NaN rating": (
        {"ratings": [{"Help": NAN}, {"Help": 1.0}]},
        r"ratings\[0\].Help",
        "found nan; expected a finite number",
    ),
    "ratings too short": ({"ratings": [{"Help": 1.0}]}, "ratings", "one entry for each of the 2 responses"),
    "pair out of range": ({"pairs": [[0, 2]]}, "pairs", r"two different indices from 0 to 1"),
    "pair of three": ({"pairs": [[0, 1, 1]]}, "pairs", "two different indices"),
    "no pairs": ({"pairs": [], "pair_weights": []}, "pairs", "at least one pair"),
    "null pairs": ({"pairs": None}, "pairs", "found None; expected a list"),
    "weights": ({"pair_weights": [1.0, 1.0]}, "pair_weights", "one for each of the 1 pairs"),
    "NaN weight": ({"pair_weights": [NAN]}, "pair_weights", "finite weights >= 0"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_group(case):
    changes, column, words = BROKEN[case]
    data = stored(group(), group(**changes))
    with pytest.raises(RowError, match=rf"groups, row 1, column '{column}': .*{words}"):
        validate(data)
    kept, report = validate(data, on_error="skip", return_report=True)
    assert len(kept) == 1 and [problem.row for problem in report.problems] == ["row 1"]


def test_sound_groups_pass_unchanged():
    data = stored(group(), group(pair_weights=None, ratings=None), group(ratings=[{"Help": None}, {"Help": 1.0}]))
    assert validate(data) is data


def test_images_are_left_alone_on_request():
    data = stored(group(images=[{"bytes": b"x", "path": None}]))
    assert len(validate(data, decode_images=False)) == 1


def test_missing_column():
    with pytest.raises(DataError, match="not preference groups: no column 'pairs'.*load_preferences"):
        validate(stored(group()).remove_columns("pairs"))


LONG = "The text describes the dog on the sofa in detail and nothing else."


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({}, []),
        ({"responses": ["same", "same "]}, ["one response, two ratings"]),
        ({"responses": ["same", "same "], "ratings": [{"Help": 1.0}] * 2}, []),
        ({"rationales": [{"Help": LONG}, {"Help": LONG.upper()}]}, ["one rationale for two responses"]),
        ({"rationales": [{"Help": "Good."}, {"Help": "Good."}]}, []),
        ({"rationales": [{"Help": LONG}, {"Help": LONG}], "responses": ["a", "a "], "ratings": None}, []),
        (
            {"rationales": [{"Help": "Text 2 is clear."}, {"Help": "Response <2> is wrong."}]},
            ["rationale of another response"],
        ),
        ({"rationales": [{"Help": "Text 1 is clear."}, {"Help": "Text 2 is worse than text 1."}]}, []),
        ({"rationales": [{"Help": "It lists text 7 of the sign."}, None]}, []),
    ],
)
def test_judge_flags(changes, flags):
    assert list(judge_flags(group(**changes))) == flags
    if changes.get("responses", ["", "x"])[0] != changes.get("responses", ["", "x"])[1].strip():
        _, report = validate(stored(group(**changes)), return_report=True)
        assert list(report.flags) == flags
