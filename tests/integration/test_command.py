"""`silkie train` as a person starts it: one process and two, silent about what the user did not cause."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny import image, tiny_model, tiny_processor

ROOT = Path(__file__).parents[2]
LINE = re.compile(
    r"\d\d:\d\d:\d\d silkie\."  # silkie's log
    r"|(Generating|Measuring|Loading weights|\s*\d+%)"  # progress
    r"|silkie train: loading|starting the run through accelerate"
    r"|\[rank\d\]:\[W.*find_unused_parameters"  # torch, C++; an expert that no token is sent to would need it
)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("command")
    tiny_model().save_pretrained(root / "model")
    tiny_processor().save_pretrained(root / "model")
    with (root / "data.jsonl").open("w") as file:
        for n in range(4):
            image(n).save(root / f"{n}.png")
            responses = ["a red cat", "a dog on the table"]
            row = {"images": [f"{n}.png"], "prompt": f"what is in image {n} ?", "responses": responses}
            file.write(json.dumps(row | {"pairs": [[0, 1]]}) + "\n")
    (root / "config.yaml").write_text(
        f"model_name_or_path: {root / 'model'}\ndataset_name: {root / 'data.jsonl'}\nuse_peft: true\nuse_cpu: true\n"
        "bf16: false\nreport_to: none\nper_device_train_batch_size: 1\nnum_train_epochs: 1\nsave_strategy: 'no'\n"
        "logging_steps: 1\n"
    )
    return root / "config.yaml"


def silkie(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONWARNINGS", "SILKIE_DEBUG")}
    command = [sys.executable, "-m", "silkie", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.parametrize("processes", [1, 2])
def test_it_trains_and_says_nothing_but_what_is_its_own(config, tmp_path, processes):
    words = ["--num_processes", str(processes)] if processes > 1 else []
    result = silkie("train", "--config", str(config), "--output_dir", str(tmp_path), *words)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "adapter_model.safetensors").exists()
    steps = json.loads((tmp_path / "trainer_state.json").read_text())["global_step"]
    assert steps == 4 // processes
    lines = [part for line in result.stderr.splitlines() for part in line.split("\r") if part.strip()]
    assert lines[0].startswith("silkie train: loading")
    assert [line for line in lines if not LINE.match(line)] == []


def test_a_failure_in_two_processes_is_one_line(config, tmp_path):
    result = silkie(
        "train", "--config", str(config), "--output_dir", str(tmp_path), "--num_processes", "2", "--beta", "-1"
    )
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert errors == ["error: `beta` must be > 0, got -1.0."]
    assert "Traceback" not in result.stderr
