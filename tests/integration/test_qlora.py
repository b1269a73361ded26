"""QLoRA on a CPU: NF4 and 8-bit base weights, the vision tower and the head left alone, 8-bit AdamW; in one process,
and in two under DDP and ZeRO."""

import json

import pytest
import torch
from safetensors.torch import load_file

from silkie.model.vision import vision_parameters
from tests.integration.test_distributed import KINDS, run_jobs
from tests.support import train_run
from tests.support.tiny import tiny_model

ARGS = {"optim": "adamw_8bit", "num_train_epochs": 2, "logging_steps": 1}
LR = 0.01
# bitsandbytes computes an 8-bit product on a CPU in two ways: with rounded activations in eval mode (the reference),
# with plain ones in training mode (the policy). On CUDA both round. So the first loss is ln 2 but for the rounding.
FIRST_LOSS = {4: 1e-6, 8: 2e-3}


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_trains(tmp_path, bits):
    tiny_model().save_pretrained(tmp_path / "base")
    spec = {
        "out": str(tmp_path / "out"),
        "model": str(tmp_path / "base"),
        "bits": bits,
        "lr": LR,
        "args": {**ARGS, "gradient_accumulation_steps": 2},
    }
    trainer = train_run.make(spec, {"use_cpu": True})
    layers = {
        n: type(m).__name__
        for n, m in trainer.model.named_modules()
        if n.endswith(("q_proj.base_layer", "down_proj.base_layer"))
    }
    assert len(layers) == 4 and set(layers.values()) == {f"Linear{bits}bit{'Lt' if bits == 8 else ''}"}
    assert all(p.dtype == torch.float32 for p in vision_parameters(trainer.model))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert type(trainer.optimizer.optimizer).__name__ == "AdamW" and trainer.optimizer.optimizer.args.optim_bits == 8
    trained = [n for n, p in trainer.model.named_parameters() if n in before and not torch.equal(p, before[n])]
    assert set(trained) == set(before)  # gradients reach every adapter, also those below many quantised layers
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses[0] == pytest.approx(0.693147, abs=FIRST_LOSS[bits])
    assert sum(losses[-3:]) / 3 < 0.6


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("bits", [4, 8])
def test_two_processes_train_a_quantised_base_as_one(tmp_path, bits):
    """The adapters are bf16 (TRL, after the QLoRA paper), so that ZeRO's sums of gradients differ from DDP's by their
    rounding."""
    modes = ["single", "ddp", "zero2", *(["zero3"] if bits == 4 else [])]
    jobs = []
    for mode in modes:
        args = {**ARGS, "gradient_accumulation_steps": 2 if mode == "single" else 1}
        spec = {"out": str(tmp_path / mode), "model": str(tmp_path / "untied"), "bits": bits, "lr": LR, "args": args}
        jobs.append({"mode": mode, "spec": spec})
    run_jobs(jobs, tmp_path, 800)
    results = {mode: json.loads((tmp_path / mode / "result.json").read_text()) for mode in modes}
    losses = {mode: [e["loss"] for e in r["log"] if "loss" in e] for mode, r in results.items()}
    adapters = {mode: load_file(tmp_path / mode / "final" / "adapter_model.safetensors") for mode in modes}
    for mode in modes[1:]:
        assert (results[mode]["kind"], results[mode]["stage"], results[mode]["world"]) == (*KINDS[mode], 2)
        assert losses[mode] == pytest.approx(losses["single"], abs=1e-6 if mode == "ddp" else 1e-3)
        assert {n: t.shape for n, t in adapters[mode].items()} == {n: t.shape for n, t in adapters["single"].items()}
