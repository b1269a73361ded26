"""The architectures that people train, at their full size and without their weights: one packed step on a CPU, within
the memory that is stated here. Every run's self-test has compared its log-probs with the model's plain forward."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

# name -> billions of parameters, GB of resident memory that a step may take
SIZES = {"Qwen2.5-VL-3B": (3.75, 12), "Qwen3.5-2B": (2.2, 9)}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_one_packed_step_at_full_size(name, tmp_path):
    billions, limit = SIZES[name]
    if psutil.virtual_memory().available < 1e9 * limit:
        pytest.skip(f"{name} takes up to {limit} GB, and less is free")
    out = tmp_path / "seen.json"
    command = [sys.executable, "-m", "tests.support.full_size", name, str(out)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(out.read_text())
    print(json.dumps(seen, indent=1))
    assert abs(seen["parameters"] / 1e9 - billions) < 0.05
    assert "packed" in " ".join(seen["plan"])
    assert abs(seen["loss"] - math.log(2)) < 0.02, "before the first step policy and reference are equal"
    assert 0 < seen["grad_norm"] < math.inf
    assert seen["peak_gb"] < limit
    assert "self-test" in done.stderr.lower() or "self-test" in done.stdout.lower(), done.stderr[-2000:]
