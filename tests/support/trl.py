"""One step of TRL's trainer and of silkie's on the same preferences, for comparison."""

import torch
from datasets import Dataset, Image, List
from peft import LoraConfig
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.model import tiny
from silkie.model.adapters import with_default_targets
from silkie.model.processor import ask_for_token_types
from silkie.training.self_test import plain_logps
from tests.support.data import dataset


def pair_rows(groups):
    def answer(text):
        return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]

    rows = [
        {
            "images": g["images"],
            "prompt": g["prompt"],
            "chosen": answer(g["responses"][c]),
            "rejected": answer(g["responses"][r]),
        }
        for g in groups
        for c, r in g["pairs"]
    ]
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def options(tmp_path, **more):
    given = dict(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None)
    return {**given, **more}


def alive(trainer, dtype, seed=7):
    """Adapter factors with fixed random values: the policy differs from the reference and every gradient is alive."""
    torch.manual_seed(seed)
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape)
    trainer.model.to(dtype).train()
    return trainer


def loss_and_gradients(trainer, batch, **more):
    trainer.model.zero_grad()
    with trainer.accelerator.autocast():  # in bf16
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch), **more)
    loss.backward()
    return loss.detach().double(), {
        n: p.grad.double() for n, p in trainer.model.named_parameters() if p.grad is not None
    }


def distance(a, b):
    assert a.keys() == b.keys() and len(a) >= 12
    return torch.stack([(a[n] - b[n]).norm() for n in a]).norm().item()


def of_type(model_type, dtype=torch.float32):
    """A tiny model of a type of transformers, and its processor."""
    model, processor = tiny.tiny(model_type)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(
            "eager"
        )  # grouped products differ with the number of rows, and have no float64
    ask_for_token_types(processor, type(model).forward)
    return model.to(dtype), processor


def trl_step(folder, model_type, groups, dtype=torch.float32, change=lambda model, processor: None, seed=7, **more):
    """Loss, gradients and log of one step of stock TRL with silkie's default adapter; `change` changes model and processor first."""
    model, processor = of_type(model_type)
    change(model, processor)
    rows = pair_rows(groups)
    trainer = DPOTrainer(
        model,
        args=DPOConfig(per_device_train_batch_size=len(rows), **options(folder, **more)),
        train_dataset=rows,
        processing_class=processor,
        peft_config=with_default_targets(LoraConfig(r=4, lora_alpha=8), model),
    )
    alive(trainer, dtype, seed)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    if dtype is torch.float64:
        batch = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
    return *loss_and_gradients(trainer, batch), trainer


def silkie_step(folder, model_type, groups, layout, change=lambda model, processor: None, seed=7, **more):
    """The same of silkie."""
    model, processor = of_type(model_type)
    change(model, processor)
    trainer = SilkieDPOTrainer(
        model,
        args=SilkieDPOConfig(per_device_train_batch_size=len(groups), layout=layout, **options(folder, **more)),
        train_dataset=dataset(groups),
        processing_class=processor,
        peft_config=LoraConfig(r=4, lora_alpha=8),
    )
    alive(trainer, torch.float32, seed)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(groups))])
    return *loss_and_gradients(trainer, batch), trainer


def plain_step(trainer, groups):
    """The same of the model's plain forward, one sequence at a time in float64: DPO's loss written out. It takes the model
    and the rows of a trainer of silkie, which it leaves in float64."""
    model, losses = trainer.model.double(), []
    model.zero_grad()

    def sums(row):
        return [logps.sum() for logps in plain_logps(model, trainer.encoder, row, dict)]

    for row in (trainer.train_dataset[i] for i in range(len(groups))):
        policy = sums(row)
        with torch.no_grad(), model.disable_adapter():
            reference = sums(row)
        gains = [p - r for p, r in zip(policy, reference, strict=True)]
        losses += [-logsigmoid(trainer.args.beta * (gains[c] - gains[r])) for c, r in row["pairs"]]
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
