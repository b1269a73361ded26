"""The recipe as a person runs it: VLFeedback files and a model directory in, adapter out; dry run; wrong arguments."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from trl import ModelConfig, TrlParser

from recipes import dpo_silkie
from silkie import SilkieDPOConfig
from silkie import run as recipe
from silkie.data import DataError
from tests.support.tiny import image, tiny_model, tiny_processor

ROOT = Path(__file__).parents[2]
ASPECTS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model directory and a VLFeedback directory in the schema of the public data set."""
    root = tmp_path_factory.mktemp("recipe")
    tiny_model().save_pretrained(root / "model")
    tiny_processor().save_pretrained(root / "model")
    (root / "data" / "images").mkdir(parents=True)
    responses = ["a red cat", "a dog on the table", "yes", "not one"]
    with (root / "data" / "vlfeedback.jsonl").open("w") as file:
        for n in range(8):
            image(n).save(root / "data" / "images" / f"{n}.png")
            annotations = [
                {
                    a: {"Rating": str(1 + (i + n + j) % 5) if (n, i) != (3, 0) else "N/A", "Rationale": "because"}
                    for j, a in enumerate(ASPECTS)
                }
                for i in range(4)
            ]
            completions = {"annotations": annotations, "model": ["a", "b", "c", "d"], "response": responses}
            record = {
                "id": f"svit-{n}",
                "prompt": f"what is in image {n} ?",
                "models": ["a", "b", "c", "d"],
                "completions": completions,
                "img_path": f"images/{n}.png",
            }
            file.write(json.dumps(record) + "\n")
    return root


def launch(inputs, out, *extra, check=True):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        str(ROOT / "recipes" / "dpo_silkie.py"),
        "--model_name_or_path",
        str(inputs / "model"),
        "--dataset_name",
        str(inputs / "data" / "vlfeedback.jsonl"),
        "--image_root",
        str(inputs / "data"),
        "--output_dir",
        str(out),
        "--use_peft",
        "--use_cpu",
        "--bf16",
        "false",
        "--report_to",
        "none",
        "--per_device_train_batch_size",
        "2",
        "--num_train_epochs",
        "1",
        "--logging_steps",
        "1",
        *extra,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=check)


def test_dry_run_prints_the_plan_and_saves_nothing(inputs, tmp_path):
    result = launch(inputs, tmp_path / "dry", "--dry_run", "--eval_size", "0.3", "--precompute_ref_log_probs", "true")
    for text in (
        "Plan",
        "groups",
        "pairs",
        "layout: packed",
        "attention: segments",
        "silkie.logprob",
        "adapter off",
        "peak",
    ):
        assert text in result.stdout, text
    assert re.search(r"ddp on 1 GPU\(s\): \S+ GiB per GPU, fits in 74.5 GiB \(estimate\)", result.stdout)
    for part in ("weights", "gradients", "optimizer", "activations", "logits", "features", "overhead"):
        assert re.search(rf"{part} [\d.e+]+ (GiB|MiB)", result.stdout), part
    assert "TFLOP per GPU and micro-batch" in result.stdout and "no GPU here: assuming one of 80 GB" in result.stdout
    assert not list(Path(tmp_path / "dry").glob("checkpoint-*"))
    assert not Path(tmp_path / "dry" / "reference_cache").exists()  # the pass over all groups is not for a dry run


def test_the_demos_dry_run_prints_the_plan(tmp_path):
    command = [sys.executable, str(ROOT / "recipes" / "dpo_silkie.py"), "--dry_run", "--output_dir", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    for text in (
        "Plan",
        "layout: packed",
        "GiB per GPU, fits in",
        "weights",
        "TFLOP per GPU",
        "first step",
        "peak",
        "Dry run:",
    ):
        assert text in result.stdout, text
    assert not (tmp_path / "table.md").exists()


def test_it_trains_and_saves_an_adapter(inputs, tmp_path):
    out = tmp_path / "out"
    launch(inputs, out, "--save_steps", "2", "--precompute_ref_log_probs", "true")
    state = json.loads((out / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    assert len(logged) == 4 and logged[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert (out / "adapter_model.safetensors").exists() and "svit" not in (out / "README.md").read_text()
    again = launch(inputs, out, "--save_steps", "2", "--precompute_ref_log_probs", "true")
    assert (
        "8 groups known, 0 of 8 to compute" in again.stderr
    )  # the second run reads the reference and goes on from the last checkpoint


@pytest.mark.parametrize(
    ("named", "resume", "given"),
    [("out/checkpoint-5", True, "out/checkpoint-5"), (None, True, True), (None, False, False)],
)
def test_which_checkpoint_is_gone_on_from(monkeypatch, tmp_path, named, resume, given):
    seen = []
    trainer = SimpleNamespace(train=lambda **options: seen.append(options), preempted=True)
    monkeypatch.setattr(recipe, "load_data", lambda *args: (None, None))
    monkeypatch.setattr(recipe, "make_trainer", lambda *args: trainer)
    args = SilkieDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, resume_from_checkpoint=named)
    with pytest.raises(SystemExit, match="75"):
        recipe.run(
            recipe.RunArguments(dataset_name="data", resume=resume), args, ModelConfig(model_name_or_path="model")
        )
    assert seen == [{"resume_from_checkpoint": given}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_groups": 0}, "`max_groups` must be positive, not 0"),
        ({"max_pixels": -5}, "`max_pixels` must be positive, not -5"),
        ({"min_pixels": 100, "max_pixels": 10}, "`min_pixels=100` is above `max_pixels=10`"),
        ({"eval_size": 2.0}, r"in \[0, 1\), not 2.0"),
        ({"eval_split_by": "images"}, "eval_split_by='images' is not known; choose from both, image, prompt"),
        ({"eval_size": 0.1, "eval_dataset_name": "x"}, "pass one of them"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        recipe.RunArguments(dataset_name="data", **options)


def test_a_stock_prompt_can_be_on_both_sides(tmp_path):
    lines = []
    for n in range(6):
        image(n).save(tmp_path / f"{n}.png")
        lines.append(
            json.dumps(
                {"images": [f"{n}.png"], "prompt": "Describe the image.", "responses": ["a", "b"], "pairs": [[0, 1]]}
            )
        )
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:4]))
    (tmp_path / "held_out.jsonl").write_text("\n".join(lines[4:]))
    args = SilkieDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    for held_out in ({"eval_size": 0.5}, {"eval_dataset_name": str(tmp_path / "held_out.jsonl")}):
        data = {"dataset_name": str(tmp_path / "train.jsonl"), **held_out}
        with pytest.raises(DataError, match="--eval_split_by image"):
            recipe.load_data(recipe.RunArguments(**data), args)
        train, evaluation = recipe.load_data(recipe.RunArguments(**data, eval_split_by="image"), args)
        assert len(train) + len(evaluation) == (4 if "eval_size" in held_out else 6) and len(evaluation) == 2


@pytest.mark.parametrize(
    ("line", "demo"),
    [
        ("", True),
        ("--dry_run --output_dir out", True),
        ("--no_controls --seed 3", True),
        ("--output_dir out --use_peft", False),
        ("--dataset_name x --seed 1", False),
        ("--config c.yaml", False),
        ("--help", False),
    ],
)
def test_the_demo_runs_where_nothing_but_its_own_options_is_named(line, demo):
    assert dpo_silkie.is_demo(line.split()) is demo


@pytest.mark.parametrize("flag", [["--config", "{}"], ["--config={}"]])
def test_a_misspelt_key_of_a_config_file_is_an_error(tmp_path, capsys, flag):
    (tmp_path / "typo.yaml").write_text(
        "dataset_name: x\noutput_dir: y\nuse_cpu: true\nbf16: false\nlerning_rate: 1.0e-5\n"
    )
    assert dpo_silkie.main([part.format(tmp_path / "typo.yaml") for part in flag]) == 2
    *loading, error = capsys.readouterr().err.splitlines()
    assert all(line.startswith("silkie: loading") for line in loading)
    assert error == "error: unknown option `lerning_rate` of the config file: did you mean `learning_rate`?"


def test_wrong_data_is_an_error_before_the_model_is_loaded(inputs, tmp_path):
    result = launch(inputs, tmp_path / "x", "--dataset_name", str(inputs / "nothing.jsonl"), check=False)
    assert result.returncode != 0 and "nothing.jsonl" in result.stderr
    assert "Loading weights" not in result.stderr


def test_the_paper_recipe_parses_and_holds_the_paper_hyper_parameters():
    from trl import ModelConfig

    from silkie import SilkieDPOConfig
    from silkie import run as recipe

    path = ROOT / "recipes" / "silkie_qwen2_5_vl_7b.yaml"
    parser = TrlParser((recipe.RunArguments, SilkieDPOConfig, ModelConfig))
    run, args, model = parser.parse_args_and_config(
        args=["--config", str(path), "--use_cpu", "--bf16", "false", "--tf32", "false"]
    )
    assert run.dataset_name == "MMInstruction/VLFeedback"
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (64, 16, 0.05)
    assert (args.beta, args.learning_rate, args.weight_decay, args.adam_beta2, args.num_train_epochs) == (
        0.1,
        1e-5,
        0.05,
        0.98,
        3,
    )
    assert set(yaml.safe_load(path.read_text())) <= {f for c in (run, args, model) for f in vars(c)}
