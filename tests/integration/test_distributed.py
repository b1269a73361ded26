"""Two processes under DDP, ZeRO-2, ZeRO-3 and FSDP2 do what one does: losses, gradient norms and saved weights on the
same global batches. SGD makes the saved weights a sum of gradients, so their agreement is that of the gradients.

The data (12 groups of 1 to 3 pairs, a third without an image, one group per process and step) gives processes different
numbers of pairs and steps in which one process has no image."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.support.tiny import tiny_model
from tests.support.train_run import many_groups

ROOT = Path(__file__).parents[2]
CASES = {
    "lora": {
        "from_disk": True,
        "eval": 7,
        "args": {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 1},
    },
    "full": {"from_disk": True, "lora": False, "lr": 0.002},
    "full_tied": {"from_disk": True, "tie": True, "lora": False, "lr": 0.002},
    "trained_vision": {"from_disk": True, "lora": False, "lr": 0.002, "args": {"freeze_vision": False}},
    "rows_cached_checkpointed": {
        "args": {"layout": "rows", "precompute_ref_log_probs": True, "gradient_checkpointing": True}
    },
    # one process with no layer checkpointed, two with the first of two
    "some_layers": {"layers": 1, "args": {"gradient_checkpointing": "auto"}},
    # both ranks keep features in the one folder
    "kept_features": {"args": {"precompute_ref_log_probs": True, "num_train_epochs": 2}},
    "plain_head": {"args": {"use_fused_logprob": False}},
    "accumulated": {
        "data": "odd",
        "args": {"gradient_accumulation_steps": 3, "num_train_epochs": 3, "log_token_stats": True},
    },
}
KINDS = {"ddp": ("MULTI_CPU", None), "zero2": ("DEEPSPEED", 2), "zero3": ("DEEPSPEED", 3), "fsdp2": ("FSDP", None)}
CI = [
    ("ddp", "lora"),
    ("ddp", "trained_vision"),
    ("zero2", "full"),
    ("zero3", "lora"),
    ("zero3", "full"),
    ("zero3", "trained_vision"),
]
CI += [("zero3", "rows_cached_checkpointed"), ("zero2", "lora"), ("zero3", "accumulated")]
CI += [("ddp", "kept_features"), ("ddp", "some_layers"), ("zero3", "some_layers"), ("fsdp2", "some_layers")]
CI += [("fsdp2", "lora"), ("fsdp2", "full"), ("fsdp2", "rows_cached_checkpointed")]
REST = [(mode, case) for mode in KINDS for case in CASES if (mode, case) not in CI]


def spec(case, mode, out):
    given = {k: v for k, v in CASES[case].items() if k != "layers" or mode != "single"}
    args = dict(given.get("args", {}))
    if mode == "single":
        args["gradient_accumulation_steps"] = 2 * args.get("gradient_accumulation_steps", 1)
    model = {"model": str(out / ("tied" if given.get("tie") else "untied"))} if given.get("from_disk") else {}
    return {**given, **model, "out": str(out / f"{mode}-{case}"), "args": args}


def run_jobs(jobs, directory, timeout):
    tiny_model().save_pretrained(directory / "untied")
    tiny_model(tie=True).save_pretrained(directory / "tied")
    path = directory / "jobs.json"
    path.write_text(json.dumps(jobs))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.fork_run", str(path)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for job, result in zip(jobs, json.loads(path.with_suffix(".out").read_text()), strict=True):
        logs = "\n".join(p.read_text()[-3000:] for p in Path(job["spec"]["out"]).glob("log.*"))
        assert not any(result["codes"]), f"{job['mode']}: {logs}"


def compare(out, mode, case):
    one, two = (json.loads((out / f"{m}-{case}" / "result.json").read_text()) for m in ("single", mode))
    assert (one["world"], two["world"]) == (1, 2)
    assert (two["kind"], two["stage"]) == KINDS[mode]
    if "layers" in CASES[case]:
        assert (one["checkpointed"], two["checkpointed"]) == (0, CASES[case]["layers"])
    tolerances = {"loss": 2e-6, "grad_norm": 2e-5, "rewards/margins": 1e-5, "num_tokens": 0}
    tolerances |= {"eval_loss": 2e-6, "eval_rewards/margins": 1e-5} if "eval" in CASES[case] else {}
    tolerances |= {"entropy": 2e-5} if "log_token_stats" in CASES[case].get("args", {}) else {}
    for key, tolerance in tolerances.items():
        alone, together = ([entry[key] for entry in r["log"] if key in entry] for r in (one, two))
        assert together == pytest.approx(alone, abs=tolerance, rel=2e-5 if tolerance else 0), key
        assert len(alone) >= 2, key
    assert max(abs(e["loss"] - 0.693147) for e in one["log"] if "loss" in e) > 1e-3  # it trained
    alone, together = (out / f"{m}-{case}" / "final" for m in ("single", mode))
    names = {p.name for p in alone.iterdir()}
    assert names == {p.name for p in together.iterdir()}
    weights = "adapter_model.safetensors" if CASES[case].get("lora", True) else "model.safetensors"
    a, b = load_file(alone / weights), load_file(together / weights)
    assert a.keys() == b.keys() and a
    for name in a:
        assert a[name].shape == b[name].shape and (a[name] - b[name]).abs().max() <= 2e-6, name
    return together


@pytest.fixture(scope="module")
def ci_runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("distributed")
    cases = list(dict.fromkeys(case for _, case in CI))
    jobs = [{"mode": mode, "spec": spec(case, mode, out)} for mode, case in [*(("single", c) for c in cases), *CI]]
    run_jobs(jobs, out, 700)
    return out


@pytest.mark.timeout(750)
@pytest.mark.parametrize(("mode", "case"), CI)
def test_two_processes_train_as_one(ci_runs, mode, case):
    saved = compare(ci_runs, mode, case)
    if case == "full":  # what ZeRO saves is a plain transformers checkpoint
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(saved, output_loading_info=True)
        assert (
            not info["missing_keys"]
            and not info["unexpected_keys"]
            and all(torch.isfinite(p).all() for p in model.parameters())
        )


@pytest.mark.timeout(750)
def test_two_processes_share_the_features_on_disk(ci_runs):
    """Together they encode each image once, but for the two that both try at start-up; alone each would encode nearly
    all that it meets in the reference's pass and two epochs."""
    run = ci_runs / "ddp-kept_features"
    ranks = [json.loads((run / f"features.{rank}.json").read_text()) for rank in (0, 1)]
    kept = len(list(run.glob("vision_cache/*/*/*.safetensors")))
    assert kept == sum(bool(g["images"]) for g in many_groups())
    assert kept <= sum(r["encoded"] for r in ranks) <= kept + 2 and all(r["encoded"] for r in ranks)
    assert sum(r["encoded"] + r["read"] for r in ranks) == 3 * kept + 4


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_mode_trains_as_one_process(tmp_path):
    jobs = [
        {"mode": mode, "spec": spec(case, mode, tmp_path)} for mode, case in [*(("single", c) for c in CASES), *REST]
    ]
    run_jobs(jobs, tmp_path, 1100)
    for mode, case in REST:
        compare(tmp_path, mode, case)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_log_probs_under_fsdp2_and_bf16_are_not_rounded(tmp_path):
    """accelerate's policy for bf16 would cast what every module returns to bf16, log-probs of about -20 to steps of
    0.125."""
    options = {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}, "max_steps": 2}
    jobs = [
        {
            "mode": mode,
            "spec": {
                "out": str(tmp_path / mode),
                "model": str(tmp_path / "untied"),
                "args": {**options, "gradient_accumulation_steps": steps},
            },
        }
        for mode, steps in (("single", 2), ("fsdp2", 1))
    ]
    run_jobs(jobs, tmp_path, 500)
    one, two = (json.loads((tmp_path / mode / "result.json").read_text()) for mode in ("single", "fsdp2"))
    assert "param_dtype=torch.bfloat16" in two["fsdp_precision"] and "output_dtype=None" in two["fsdp_precision"]
    for alone, together in zip(one["log"][:2], two["log"][:2], strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], abs=3e-3)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("config", ["single", "ddp", "zero2", "zero3"])
def test_the_recipes_configs_launch(tmp_path, config):
    """The files of recipes/accelerate through `accelerate launch` itself."""
    (tmp_path / "spec.json").write_text(json.dumps({"out": str(tmp_path / "out"), "args": {"max_steps": 2}}))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = "1" if config == "single" else "2"
    cpu = ["--cpu"] if config == "single" else []
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *cpu,
        "--config_file",
        f"recipes/accelerate/{config}.yaml",
        "--num_processes",
        processes,
        "--main_process_port",
        "0",
    ]
    done = subprocess.run(
        [*command, "-m", "tests.support.train_run", str(tmp_path / "spec.json"), "--use_cpu"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["world"], result["stage"]) == {
        "single": (1, None),
        "ddp": (2, None),
        "zero2": (2, 2),
        "zero3": (2, 3),
    }[config]
