"""The whole demo, small: side by side in processes it measures what it measures one after the other."""

from __future__ import annotations

import json

import pytest
import torch

from silkie.demo.run import run_demo
from tests.integration.test_iterative import TINY


@pytest.mark.slow
def test_side_by_side_measures_the_same(tmp_path, capfd, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr("silkie.demo.processes.cores", lambda: 2)  # one thread in each process
    summaries = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        summaries[processes] = run_demo(out, sizes=TINY, processes=processes)
        said = capfd.readouterr().err
        assert "Base against DPO, with the answers side by side" in said
        assert "still to come: SFT on the best" in said
        assert "Still to be trained" not in (out / "demo.html").read_text()
        assert (out / "adapter" / "adapter_model.safetensors").is_file()
        scores = json.loads((out / "results.json").read_text())["scores"]
        assert list(scores) == ["base", "dpo", "sft", "shuffled", "longest"]
    assert summaries[1].scores == summaries[2].scores
    assert (tmp_path / "2" / "demo.log").is_file() and not (tmp_path / "1" / "demo.log").exists()
