"""The iterative recipe: every round starts from the last adapter, refers to it, and is not repeated."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from silkie.demo.loop import make_trainer, preferences
from silkie.demo.model import BASE_DIR
from silkie.demo.results import DPO, Sizes
from tests.support.studies import load_study

TINY = Sizes(images=4, card_images=2, questions=2, mme_images=2, pope_images=2, captions=4, red_team_images=4)


def weights(folder: Path):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.slow
def test_two_rounds_and_their_resumption(tmp_path):
    iterative = load_study("iterative")
    summary = iterative.run(tmp_path, rounds=2, sizes=TINY, single=False)
    assert list(summary.scores) == ["base", "round-1", "round-2"]
    assert "| Round 2 |" in (tmp_path / "table.md").read_text()
    first, second = tmp_path / "round-1" / "adapter", tmp_path / "round-2" / "adapter"
    start = weights(second / "ref")  # the frozen copy that round 2 refers to is what round 1 ended with
    assert all((start[name] == value).all() for name, value in weights(first).items())
    assert any((start[name] != value).any() for name, value in weights(second).items())
    ids = [
        {json.loads(line)["prompt"] for line in (tmp_path / f"round-{n}" / "data" / "vlfeedback.jsonl").open()}
        for n in (1, 2)
    ]
    assert ids[0] != ids[1], "fresh prompts"

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("round-*/adapter/*")}
    again = iterative.run(tmp_path, rounds=2, sizes=TINY, single=False)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("round-*/adapter/*")} == before
    assert again.scores == summary.scores
    assert again.seconds == pytest.approx(summary.seconds, abs=0.5), "the time of finished rounds is kept"
    stored = [json.loads(path.read_text())["seconds"] for path in tmp_path.glob("round-*/result.json")]
    assert sum(again.seconds.values()) >= sum(sum(part.values()) for part in stored) > 0

    with pytest.raises(ValueError, match="was begun with .*'seed': 0"):
        iterative.run(tmp_path, rounds=2, seed=1, sizes=TINY, single=False)

    source = {
        "source": str(tmp_path / "round-2/data/vlfeedback.jsonl"),
        "image_root": str(tmp_path / "round-2/data/images"),
    }
    trainer = make_trainer(DPO, preferences(DPO, source, 0), BASE_DIR, tmp_path / "check", 0, adapter=first)
    assert trainer.reference.kind == "copy of the initial adapter"
    trainer.args.max_steps = 1
    trainer.train()
    losses = [entry["loss/sigmoid"] for entry in trainer.state.log_history if "loss/sigmoid" in entry]
    assert float(losses[0]) == pytest.approx(math.log(2), abs=1e-3), (
        "policy and reference are equal at the start of a round"
    )
