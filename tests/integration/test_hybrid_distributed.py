"""Hybrid models in two processes, under DDP, ZeRO-2, ZeRO-3 and FSDP2, do what one process does in the same layout; and
every rank calls every mixer equally often, whatever its groups look like."""

import json

import pytest
from safetensors.torch import load_file

from tests.integration.test_distributed import KINDS, run_jobs
from tests.support.hybrid import qwen3_5

OPTIONS = {"self_test": False, "layout": "packed"}
CASES = {
    "lora": {"args": OPTIONS},
    "checkpointed": {"args": {**OPTIONS, "gradient_checkpointing": True}},
    "full": {"args": OPTIONS, "disk": True, "lora": False, "lr": 0.002},
    # 7 groups in batches of 3: of two ranks one is without a tree at times
    "trees": {
        "args": {**OPTIONS, "share_prefix": "image", "per_device_train_batch_size": 3, "num_train_epochs": 2},
        "data": "albums",
        "lr": 0.02,
    },
}
STEPS = 4
RUNS = [(mode, "lora") for mode in KINDS] + [("zero3", "checkpointed"), ("zero3", "full"), ("fsdp2", "full")]
RUNS += [("ddp", "trees"), ("zero3", "trees"), ("fsdp2", "trees")]


def spec(case, mode, out):
    given = dict(CASES[case])
    args = {**given.pop("args"), "gradient_accumulation_steps": 2 if mode == "single" else 1}
    model = {"model": str(out / "hybrid")} if given.pop("disk", False) else {}
    return {"data": "unequal", **given, **model, "family": "qwen3_5", "out": str(out / f"{mode}-{case}"), "args": args}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("hybrid")
    qwen3_5().save_pretrained(out / "hybrid")
    jobs = [("single", case) for case in CASES] + RUNS
    run_jobs([{"mode": mode, "spec": spec(case, mode, out)} for mode, case in jobs], out, 1100)
    return out


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("mode", "case"), RUNS)
def test_two_processes_train_as_one(runs, mode, case):
    one, two = (json.loads((runs / f"{m}-{case}" / "result.json").read_text()) for m in ("single", mode))
    assert (two["kind"], two["stage"], two["world"]) == (*KINDS[mode], 2)
    for key, tolerance in {"loss": 2e-5, "grad_norm": 2e-4}.items():
        alone, together = ([entry[key] for entry in r["log"] if key in entry] for r in (one, two))
        assert len(alone) == STEPS and together == pytest.approx(alone, rel=tolerance, abs=tolerance), key
    assert max(abs(e["loss"] - 0.693147) for e in one["log"] if "loss" in e) > 1e-3  # it trained
    file = "model.safetensors" if case == "full" else "adapter_model.safetensors"
    a, b = (load_file(runs / f"{m}-{case}" / "final" / file) for m in ("single", mode))
    assert a.keys() == b.keys() and any("linear_attn" in name for name in a)
    for name in a:
        assert (a[name] - b[name]).abs().max() <= 2e-5 * max(1.0, a[name].abs().max()), name


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("mode", "case"), RUNS)
def test_every_rank_calls_every_mixer_equally_often(runs, mode, case):
    counts = [json.loads((runs / f"{mode}-{case}" / f"calls.{rank}.json").read_text()) for rank in (0, 1)]
    policy = 2 if case == "checkpointed" else 1  # recomputed
    passes = STEPS * (1 + policy) if case != "full" else STEPS  # a second model is the reference, and not counted
    assert counts[0] == counts[1] and len(counts[0]) == 3
    # of every pass, whether its batch has a tree or not, and as many responses as calls or not
    calls = json.loads((runs / f"{mode}-{case}" / "result.json").read_text())["calls"]
    assert calls > (3 if case == "trees" else 2), "lengths of these groups want more than one call of responses"
    assert set(counts[0].values()) == {calls * passes}
