"""The planner's files are those of recipes/accelerate, its recommendation is that of README and YAML, and a run takes
what it writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from silkie.plan import __main__ as command
from silkie.plan import memory as plan
from silkie.plan.write import accelerate_config, deepspeed_config
from silkie.run import command as train

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "accelerate"


@pytest.mark.parametrize(
    ("file", "engine", "gpus"),
    [
        ("single", "ddp", 1),
        ("ddp", "ddp", 8),
        ("zero2", "zero2", 8),
        ("zero3", "zero3", 8),
        ("zero3_offload", "zero3_offload", 8),
        ("fsdp2", "fsdp2", 8),
        ("multinode_zero3", "zero3", 16),
    ],
)
def test_written_configs_are_those_of_the_recipes(file, engine, gpus):
    recipe = yaml.safe_load((RECIPES / f"{file}.yaml").read_text())
    name = recipe.get("deepspeed_config", {}).get("deepspeed_config_file", "")
    assert accelerate_config(engine, gpus, name) == recipe
    if name:
        assert deepspeed_config(engine) == json.loads((ROOT / name).read_text())


def test_readme_recipe_and_planner_recommend_the_same():
    """The command that starts the paper's recipe, on the GPUs that the recipe's batch is made for."""
    recipe = ROOT / "recipes" / "silkie_qwen2_5_vl_7b.yaml"
    options = yaml.safe_load(recipe.read_text())
    workload = plan.Workload(
        groups=options["per_device_train_batch_size"],
        image_tokens=options["max_pixels"] / 28**2,
        lora_rank=options["lora_r"],
        checkpointing=bool(options["gradient_checkpointing"]),
        reference_cached=options["precompute_ref_log_probs"],
    )
    best, _ = plan.choose(plan.SHAPES["qwen2.5-vl-7b"], workload, gpus=8, memory=80e9)
    file = command._config(best.engine, 8).split()[0]
    for text in (recipe.read_text(), (ROOT / "README.md").read_text()):
        lines = [line for line in text.replace("\\\n", "").splitlines() if f"--config recipes/{recipe.name}" in line]
        named = {word for line in lines for word in re.findall(r"--config_file (\S+)", line)}
        assert named == {file}


@pytest.mark.parametrize(
    ("words", "engine", "files"),
    [
        (["--gpus", "8"], "ddp", {"accelerate.yaml", "train.yaml"}),
        (["--gpus", "8", "--full"], "zero3", {"accelerate.yaml", "train.yaml", "deepspeed.json"}),
        (["--qlora", "--optimizer-8bit", "--memory", "24GB"], "ddp", {"accelerate.yaml", "train.yaml"}),
    ],
)
def test_what_is_written_can_be_run(tmp_path, capsys, words, engine, files):
    out = tmp_path / "plan"
    assert command.main(["qwen2.5-vl-7b", *words, "--write", str(out)]) == 0
    text = capsys.readouterr().out
    assert {file.name for file in out.iterdir()} == files
    assert f"silkie train --config_file {out / 'accelerate.yaml'} --config {out / 'train.yaml'}" in text
    asked = train.read_command(["--config_file", str(out / "accelerate.yaml"), "--config", str(out / "train.yaml")])
    assert asked.launch == {"config_file": str(out / "accelerate.yaml")}
    written = yaml.safe_load((out / "train.yaml").read_text())
    assert written["model_name_or_path"] == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert ("load_in_4bit" in written) is ("--qlora" in words) and ("use_peft" in written) is ("--full" not in words)
    if engine.startswith("zero"):
        launch = yaml.safe_load((out / "accelerate.yaml").read_text())
        assert Path(launch["deepspeed_config"]["deepspeed_config_file"]).is_file()
    assert command.main(["qwen2.5-vl-7b", *words, "--write", str(out)]) == 2
    assert "accelerate.yaml exists" in capsys.readouterr().err


def test_nothing_is_written_where_nothing_fits(tmp_path, capsys):
    assert command.main(["qwen2.5-vl-7b", "--full", "--memory", "8GB", "--write", str(tmp_path / "plan")]) == 2
    assert "nothing fits" in capsys.readouterr().err and not (tmp_path / "plan").exists()


def test_precision_follows_the_device(monkeypatch):
    assert train.precision(use_cpu=True) == {"bf16": False, "tf32": None}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for capability, expected in (((8, 0), {"bf16": True, "tf32": True}), ((7, 0), {"bf16": False, "tf32": None})):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_, c=capability: c)
        assert train.precision(use_cpu=False) == expected
    assert train.precision(use_cpu=True) == {"bf16": False, "tf32": None}
