"""The document of the losses: its code runs, and it names every loss and every option."""

import dataclasses
import re
from pathlib import Path

import pytest

from silkie.losses import SPECS, LossOptions

TEXT = (Path(__file__).parents[2] / "examples" / "losses.md").read_text(encoding="utf-8")


def test_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 3
    scope = {}
    for block in blocks:
        exec(block, scope)
    assert scope["loss"].shape == (2,)


@pytest.mark.parametrize("name", SPECS)
def test_table_has_every_loss_with_its_options_and_passes(name):
    (row,) = re.findall(rf"^\| `{name}` \|.*$", TEXT, re.MULTILINE)
    for option in set(SPECS[name].options.values()):
        assert f"`{option}" in row or (name == "aot_unpaired" and "as `aot`" in row), option
    reads_reference = SPECS[name].inputs in ("reference", "image", "anchor", "listwise", "labelled")
    assert row.rstrip(" |").endswith(
        " r" if reads_reference and name != "mdpo_image" else "2r" if name == "mdpo_image" else "p"
    )


def test_every_option_is_explained():
    assert all(f"`{field.name}" in TEXT for field in dataclasses.fields(LossOptions))
