"""The planner's estimate of a run that is set up: its workload from a real batch, its engine from the launcher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType

from silkie.batch.batch import Batch
from silkie.model.families import causal_lm, reads_images
from silkie.plan.memory import Engine, Plan, Training, Workload, estimate
from silkie.plan.shapes import shape_of

if TYPE_CHECKING:
    from silkie.trainer import SilkieDPOTrainer

ASSUMED_MEMORY = 80e9  # of a GPU, where there is none


def workload_of(trainer: SilkieDPOTrainer, batch: Batch) -> Workload:
    """What the planner needs to know of a run and one of its micro-batches, as means over its groups.

    Args:
        batch: from the trainer's collator.
    """
    groups, responses = len(batch["rows"]), len(batch["lengths"])
    images = sum(batch["image_tokens"])
    in_group = torch.bincount(batch["group"], minlength=groups)
    real = int((batch["segment_ids"] >= 0).sum())
    scored = len(batch["target"])
    # Prompt tokens of a batch: what its real tokens are besides responses. Rows repeat the prompt for every response.
    if trainer.choice.layout == "packed":
        prompts = real - scored
    else:
        first = torch.cat([torch.zeros(1, dtype=torch.long), in_group.cumsum(0)[:-1].cpu()])
        row_lengths = (batch["segment_ids"] >= 0).sum(1).cpu()
        prompts = int((row_lengths - batch["lengths"].cpu())[first].sum())
    return Workload(
        groups=groups,
        responses=responses / groups,
        image_tokens=images / groups,
        prompt_tokens=(prompts - images) / groups,
        response_tokens=scored / responses,
        **_how(trainer),
    )


def largest_workload(trainer: SilkieDPOTrainer) -> Workload:
    """The largest micro-batch that can come in a run: as many groups as one holds, each with as many responses and
    tokens as any has, padding included."""
    args, choice, data = trainer.args, trainer.choice, trainer.train_dataset
    mismatched = "kl" in trainer.objective.needs  # each group also scores the responses of another one
    shapes = choice.shapes(data, mismatched=mismatched)
    lengths = [own * (1 + mismatched) for own in data["response_lengths"]]
    rows, tokens = (max(size) for size in zip(*shapes, strict=True))
    groups = trainer.groups_per_batch
    if args.max_tokens_per_batch is not None:
        budget = max(args.max_tokens_per_batch, max(r * t for r, t in shapes))
        groups = -(-budget // (rows * tokens))
        tokens = budget / (groups * rows)
    responses, scored = max(map(len, lengths)), max(map(sum, lengths))
    prompt = max(tokens - (scored if choice.layout == "packed" else scored / responses), 0)
    has_images = reads_images(causal_lm(trainer.model).config)
    return Workload(
        groups=groups,
        responses=responses,
        image_tokens=prompt if has_images else 0,  # at most
        prompt_tokens=0 if has_images else prompt,
        response_tokens=scored / responses,
        **_how(trainer),
    )


def _how(trainer: SilkieDPOTrainer) -> dict[str, Any]:
    """How a run trains: the fields of a workload that are the same for every batch."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    base: Any = causal_lm(model)
    bits = 4 if getattr(base, "is_loaded_in_4bit", False) else 8 if getattr(base, "is_loaded_in_8bit", False) else None
    adapter = getattr(model, "peft_config", {}).get("default")
    training: Training = "full" if adapter is None else "qlora" if bits else "lora"
    return {
        "layout": trainer.choice.layout,
        "training": training,
        "quantised_bits": bits or 4,
        "lora_rank": getattr(adapter, "r", 0),
        "checkpointing": bool(args.gradient_checkpointing),
        "checkpointed": trainer.checkpointing.layers if trainer.checkpointing else None,
        "fused": args.use_fused_logprob,
        "reference_cached": trainer.reference is None or args.precompute_ref_log_probs,
        "second_model": trainer.ref_model is not None,
        "optimizer_8bit": "8bit" in str(getattr(args.optim, "value", args.optim)),
        "half": next(base.parameters()).dtype in (torch.bfloat16, torch.float16),
    }


def engine_of(accelerator: Any) -> Engine:
    """The engine that accelerate runs."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp2"
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return "ddp"
    plugin = accelerator.deepspeed_plugin
    if plugin.zero_stage < 3:
        return "zero2"
    config = plugin.deepspeed_config.get("zero_optimization", {})
    return "zero3_offload" if config.get("offload_optimizer", {}).get("device", "none") != "none" else "zero3"


def device_memory(device: torch.device) -> tuple[float, str]:
    """Bytes of a GPU, and where the number is from."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return float(properties.total_memory), properties.name
    return ASSUMED_MEMORY, f"no GPU here: assuming one of {ASSUMED_MEMORY / 1e9:.0f} GB"


def plan_of(trainer: SilkieDPOTrainer, batch: Batch) -> tuple[Plan, str]:
    """The planner's estimate of a run whose micro-batches are like `batch`, and where the GPU's memory is from."""
    memory, source = device_memory(trainer.accelerator.device)
    plan = estimate(
        shape_of(causal_lm(trainer.model).config),
        workload_of(trainer, batch),
        engine=engine_of(trainer.accelerator),
        gpus=trainer.accelerator.num_processes,
        memory=memory,
    )
    return plan, source
