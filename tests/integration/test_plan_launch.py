"""The files that the planner writes start a run as they are, but for the data's name, on CPUs. FSDP2 has no CPU run
under accelerate, and silkie refuses it there (`silkie/training/guards.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from silkie.plan import Workload, estimate, load_shape
from silkie.plan.write import write_plan
from tests.support.tiny import image, tiny_model, tiny_processor

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("planned")
    tiny_model().save_pretrained(root / "model")
    tiny_processor().save_pretrained(root / "model")
    with (root / "data.jsonl").open("w") as file:
        for n in range(4):
            image(n).save(root / f"{n}.png")
            row = {"images": [f"{n}.png"], "prompt": "what is it ?", "responses": ["a red cat", "a dog on the table"]}
            file.write(json.dumps(row | {"pairs": [[0, 1]]}) + "\n")
    return root / "model"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "gpus", "options"),
    [
        ("ddp", 1, {}),
        ("ddp", 1, {"training": "qlora", "optimizer_8bit": True}),
        ("ddp", 2, {"layout": "rows"}),
        ("zero2", 2, {"training": "full", "second_model": True}),
        ("zero3", 2, {"training": "full", "second_model": True, "reference_cached": True}),
        ("zero3_offload", 1, {"training": "full", "second_model": True}),
    ],
)
def test_what_the_planner_writes_starts_a_run(model, tmp_path, engine, gpus, options):
    plan = estimate(load_shape(str(model)), Workload(**options), engine=engine, gpus=gpus)
    words = write_plan(tmp_path / "plan", str(model), plan).split()
    assert words[:2] == ["silkie", "train"]
    written = tmp_path / "plan" / "train.yaml"
    written.write_text(
        written.read_text().replace("dataset_name: DATA", f"dataset_name: {model.parent / 'data.jsonl'}")
    )
    # of the machine that the plan is not for: its device, and its size
    here = ["--use_cpu", "--max_steps", "1", "--output_dir", str(tmp_path / "out")]
    run = subprocess.run(
        [sys.executable, "-m", "silkie", *words[1:], *here],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    adapted = yaml.safe_load(written.read_text()).get("use_peft", False)
    assert (tmp_path / "out" / ("adapter_model.safetensors" if adapted else "model.safetensors")).exists()
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 1
