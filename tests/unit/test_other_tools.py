"""examples/other_tools.md: every test that a tick names exists."""

import re
from pathlib import Path

import pytest

from silkie.losses import LOSSES

ROOT = Path(__file__).parents[2]
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "examples/other_tools.md").read_text())))


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_a_named_test_exists(file, test):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert not test or re.search(rf"^(?:async )?def {test}\(", text, re.M)


def test_its_numbers_are_those_of_the_code():
    text, models = ((ROOT / "examples" / name).read_text(encoding="utf-8") for name in ("other_tools.md", "models.md"))
    assert f"| {len(LOSSES)}, and mixtures of them |" in text
    counted = re.search(r"(\d+ of \d+ types) are exact", models)[1]
    assert f"{counted} exact" in text


def test_there_are_ticks():
    assert len(NAMED) > 20
