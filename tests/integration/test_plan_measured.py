"""The planner against training runs of a small model: bytes of weights, gradients, optimizer states and kept
activations."""

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.model.checkpointing import checkpoint_first
from silkie.plan.checkpointing import Checkpointing
from silkie.plan.workload import largest_workload, plan_of
from tests.support.data import dataset, group
from tests.support.tiny import WORDS, image, tiny_model, tiny_processor

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}


def rows():
    texts = [" ".join(WORDS[(7 * i + j) % len(WORDS)] for j in range(100)) for i in range(4)]
    return [
        group(
            [image(i, 112, 112)],
            "what is in image ?",
            [f"{w} {text}" for w in ("a", "the", "is", "are")],
            [[0, 1], [2, 3]],
            id=str(i),
        )
        for i, text in enumerate(texts)
    ]


class Gradients(TrainerCallback):
    """Bytes of all gradients just before the optimizer step."""

    nbytes = 0

    def __init__(self, model):
        self.model = model

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.nbytes = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)


def measured(tmp_path, *, lora, half, layout="packed", checkpointing=False, optim="adamw_torch", layers=None):
    """The plan of a run of one step, and the bytes it really had. `layers`: how many gradient_checkpointing="auto" is
    to choose."""
    dtype = torch.bfloat16 if half else torch.float32
    models = [
        tiny_model(hidden=256, layers=6, vocab_size=4096, rope_parameters=ROPE).to(dtype)
        for _ in range(1 if lora else 2)
    ]
    args = SilkieDPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=half,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=2,
        max_steps=1,
        gradient_checkpointing=checkpointing,
        layout=layout,
        optim=optim,
        self_test=False,
        attention_backend="sdpa",
    )
    trainer = SilkieDPOTrainer(
        models[0],
        ref_model=None if lora else models[1],
        args=args,
        train_dataset=dataset(rows()),
        processing_class=tiny_processor(image_side=112),
        peft_config=LoraConfig(r=16) if lora else None,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    if checkpointing == "auto":
        chosen = Checkpointing(layers, 6, "said here")
        trainer._set_checkpointing = lambda: checkpoint_first(trainer.model, layers)
        trainer.checkpointing = chosen
    plan, source = plan_of(trainer, batch)
    assert largest_workload(trainer).tokens >= plan.workload.tokens
    assert "80 GB" in source and plan.workload.tokens == pytest.approx(int((batch["segment_ids"] >= 0).sum()))
    weights = {
        p.data_ptr(): p.nbytes for m in (trainer.model, trainer.ref_model) if m is not None for p in m.parameters()
    }
    kept, gradients, loss = {}, Gradients(trainer.model), trainer.compute_loss

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def compute_loss(*given, **options):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            return loss(*given, **options)

    trainer.compute_loss = compute_loss
    trainer.add_callback(gradients)
    trainer.train()
    states = [t for state in trainer.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    return plan, {
        "weights": sum(weights.values()),
        "gradients": gradients.nbytes,
        "optimizer": sum(t.nbytes for t in states),
        "kept": sum(kept.values()),
    }


CASES = [{"lora": True, "half": False}, {"lora": True, "half": False, "layout": "rows"}, {"lora": True, "half": True}]
CASES += [{"lora": False, "half": True}, {"lora": False, "half": False}]


@pytest.mark.parametrize("case", CASES)
def test_parts_are_as_measured(tmp_path, case):
    plan, real = measured(tmp_path, **case)
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(plan, part) == pytest.approx(real[part], rel=1e-3), part
    fused_head = (
        plan.workload.scored * 256 * plan.workload.bytes
    )  # the stored gradient of the log-probs, planned under `logits`
    print(case, f"kept {real['kept'] / 2**20:.1f} MiB, planned {(plan.activations + fused_head) / 2**20:.1f} MiB")
    assert plan.activations + fused_head == pytest.approx(real["kept"], rel=0.25)


def test_an_8bit_optimizer_is_planned(tmp_path):
    """bitsandbytes keeps the states of small tensors in fp32."""
    plan, real = measured(tmp_path, lora=True, half=False, optim="adamw_8bit")
    assert plan.optimizer == pytest.approx(real["optimizer"], rel=0.3)


def test_checkpointing_keeps_one_state_per_layer(tmp_path):
    """The plan adds the one layer that is recomputed at a time, which is alive in the backward pass only."""
    plan, real = measured(tmp_path, lora=True, half=False, checkpointing=True)
    boundaries = 6 * plan.workload.tokens * 256 * 4
    assert boundaries < real["kept"] < plan.activations + plan.workload.scored * 256 * 4


@pytest.mark.parametrize("layers", [0, 2, 4])
def test_layers_that_are_not_checkpointed_keep_everything(tmp_path, layers):
    plan, real = measured(tmp_path, lora=True, half=False, checkpointing="auto", layers=layers)
    fused_head = plan.workload.scored * 256 * plan.workload.bytes
    assert plan.workload.checkpointed == layers
    assert plan.activations + fused_head == pytest.approx(real["kept"], rel=0.25)
