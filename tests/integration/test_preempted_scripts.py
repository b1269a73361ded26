"""ATTACKS 15: a script whose training is stopped ends there: nothing half-trained is saved, evaluated or reported."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from silkie.demo import run
from silkie.demo.results import DPO
from silkie.training.ending import PREEMPTED_EXIT_CODE, STOP_FILE
from tests.integration.test_iterative import TINY
from tests.support.feedback import ROOT
from tests.support.studies import load_study


def test_a_script_that_trains_and_saves(tmp_path):
    """What README's ten lines do: train(), then save_model()."""
    out = tmp_path / "out"
    out.mkdir()
    (out / STOP_FILE).touch()
    (tmp_path / "spec.json").write_text(json.dumps({"out": str(out), "data": "mixed"}))
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.train_run", str(tmp_path / "spec.json"), "--use_cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == PREEMPTED_EXIT_CODE, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert (out / "checkpoint-1").is_dir() and not (out / "final").exists() and not (out / "result.json").exists()


@pytest.fixture
def stopped():
    """Stand-in for `make_trainer`: its trainer is stopped while it trains, and must not be used after that."""

    def train():
        raise SystemExit(PREEMPTED_EXIT_CODE)

    return lambda *args, **kwargs: SimpleNamespace(
        train=train, add_callback=lambda callback: None, remove_callback=lambda callback: None
    )


def nothing(*args, **kwargs):
    raise AssertionError("a half-trained model was evaluated")


def test_the_demo(tmp_path, monkeypatch, stopped):
    for name, stand_in in {
        "feedback": lambda *args: tmp_path / "data" / "records.jsonl",
        "preferences": lambda *args: {"pairs": [[[0, 1]]]},
        "answer_items": nothing,
        "make_trainer": stopped,
    }.items():
        monkeypatch.setattr(run, name, stand_in)
    with pytest.raises(SystemExit, match="75"):
        run.run_demo(tmp_path / "demo", sizes=TINY, processes=1)
    assert not list((tmp_path / "demo").rglob("*.json"))


def test_the_iterative_recipe(tmp_path, monkeypatch, stopped):
    iterative = load_study("iterative")
    monkeypatch.setattr(iterative, "feedback", lambda *args: tmp_path / "data" / "records.jsonl")
    monkeypatch.setattr(iterative, "preferences", lambda *args: [])
    monkeypatch.setattr(iterative, "make_trainer", stopped)
    monkeypatch.setattr(iterative, "evaluate", nothing)
    state = iterative.Rounds(tmp_path, seed=0, base_dir=tmp_path, sizes=TINY)
    with pytest.raises(SystemExit, match="75"):
        state.train("round-1", "Round 1", [], start=None)
    assert not state.restore("round-1", "Round 1") and not list(tmp_path.rglob("*.json"))


def test_the_studies(tmp_path, monkeypatch, stopped):
    ablation, losses = load_study("ablation"), load_study("losses")
    for study in (ablation, losses):
        monkeypatch.setattr(study, "make_trainer", stopped)
        monkeypatch.setattr(study, "evaluate_policy", nothing)
    monkeypatch.setattr(ablation, "load_preferences", lambda *args, **kwargs: [])
    monkeypatch.setattr(losses, "preferences", lambda *args: [])
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(SystemExit, match="75"):
        ablation._train(ablation.RECIPES["longest"], 0, tmp_path, {}, [], tmp_path)
    with pytest.raises(SystemExit, match="75"):
        losses._train(DPO, 0, tmp_path, [], tmp_path)
    with pytest.raises(SystemExit):
        losses.cached(tmp_path / "one.json", lambda: losses._train(DPO, 0, tmp_path, [], tmp_path))
    assert not (tmp_path / "one.json").exists()
