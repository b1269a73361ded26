"""One small training run, described by a JSON file, for tests that launch processes: `python -m tests.support.train_run
SPEC [--use_cpu]`.

Writes `result.json` (the log, one entry per step, and what the process saw) beside the checkpoints, and the final
weights to `final/`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoConfig, BitsAndBytesConfig, TrainerCallback

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.model.checkpointing import checkpointable_layers
from silkie.model.families import shell
from silkie.model.vision import unquantized_modules
from silkie.plan import checkpointing
from tests.support.data import dataset, group, mixed_groups
from tests.support.hybrid import TARGETS, qwen3_5, unequal_groups
from tests.support.tiny import image, tiny_model, tiny_processor
from tests.support.trees import album_rows


def many_groups() -> list[dict[str, Any]]:
    """12 groups of 1 to 3 pairs, a third of them without an image, so that ranks differ in pairs and images."""
    rows = mixed_groups()
    for i in range(8):
        images = [] if i % 3 == 0 else [image(10 + i)]
        responses = ["yes", "no", "a red cat on the table"][: 2 + i % 2]
        pairs = [[0, 1]] if i % 2 == 0 else [[0, 1], [2, 1], [0, 2]]
        rows.append(
            group(images, "is there a cat" if i % 2 else "how many dog are there", responses, pairs, id=f"more {i}")
        )
    return rows


def text_and_images() -> list[dict[str, Any]]:
    """4 groups, two of them without an image: in batches of one group and seed 0, a rank is without an image while the
    other has one."""
    return [
        g
        for row in mixed_groups()[:2]
        for g in (row, group([], "is there a dog", ["no", "yes yes"], [[0, 1]], id="text"))
    ]


def odd_groups() -> list[dict[str, Any]]:
    """11 groups: one of two ranks runs out of them first."""
    return many_groups()[:11]


def unequal_and_more() -> list[dict[str, Any]]:
    """7 groups whose prompts and responses differ much in length: of two ranks one ends on an empty group."""
    return [g for pair in zip(unequal_groups(), many_groups()[4:8], strict=True) for g in pair][:7]


DATA = {
    "unequal": unequal_and_more,
    "mixed": mixed_groups,
    "many": many_groups,
    "odd": odd_groups,
    "text_and_images": text_and_images,
    "albums": album_rows,
}


def make(spec: dict[str, Any], extra: dict[str, Any]) -> SilkieDPOTrainer:
    torch.manual_seed(0)
    data: Any = dataset(DATA[spec.get("data", "many")]())
    if spec.get("stream"):
        data = data.to_iterable_dataset()
    lora = spec.get("lora", True)
    options = dict(
        output_dir=spec["out"],
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        learning_rate=spec.get("lr", 0.05),
        optim="sgd",
        lr_scheduler_type="constant",
        per_device_train_batch_size=1,
        num_train_epochs=1,
        seed=0,
        gradient_checkpointing=False,
        max_grad_norm=1e6,
        **extra,
    )
    options.update(spec.get("args", {}))
    family, directory = spec.get("family", "qwen2_5_vl"), spec.get("model")
    quantization = None
    if directory:
        options.setdefault("model_init_kwargs", {"dtype": "float32"})
    if spec.get("bits"):
        skipped = unquantized_modules(shell(AutoConfig.from_pretrained(directory)))
        kind = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if spec["bits"] == 4 else {"load_in_8bit": True}
        quantization = BitsAndBytesConfig(llm_int8_skip_modules=skipped, **kind)
    if "layers" in spec:
        chosen = checkpointing.Checkpointing(spec["layers"], 2, "said here", fixed="out_of_memory" not in spec)
        checkpointing.choose_checkpointing = lambda trainer: chosen
    hybrid = family == "qwen3_5"
    build = qwen3_5 if hybrid else partial(tiny_model, family)
    return SilkieDPOTrainer(
        directory or build(),
        ref_model=None if lora or directory else build(),
        args=SilkieDPOConfig(**options),
        train_dataset=data,
        eval_dataset=data.select(range(spec["eval"])) if "eval" in spec else None,
        processing_class=tiny_processor("qwen2_5_vl" if hybrid else family),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS if hybrid else None) if lora else None,
        quantization_config=quantization,
    )


def without_compiled_collectives() -> None:
    """DeepSpeed would compile shared-memory collectives on first use (minutes); gloo does the same."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def fsdp_on_cpu() -> None:
    """Has accelerate run FSDP on gloo processes. FSDP2 itself works there, but accelerate asks for it only where it
    finds accelerators, and runs DDP elsewhere."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


class Started(TrainerCallback):
    """Leaves a file once training begins, for tests that kill the run at a chosen time after it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Path(args.output_dir, "training").touch()


def count_mixer_calls(model: torch.nn.Module) -> dict[str, int]:
    """Counts, from now on, how often each recurrent mixer of a model runs."""
    counts: dict[str, int] = {}

    def counter(name: str) -> Callable[..., None]:
        def count(*args: Any) -> None:
            counts[name] = counts.get(name, 0) + 1

        return count

    for name, module in model.named_modules():
        if name.endswith("linear_attn.norm"):  # once per call; the mixer's own hooks see the fork as one
            module.register_forward_hook(counter(name))
    return counts


def run_out_of_memory(model: torch.nn.Module, after: int) -> None:
    """Raises CUDA's error in the last layer of the model's language part, once, after so many forward passes."""
    passes = [0]

    def fail(*_: Any) -> None:
        passes[0] += 1
        if passes[0] == after + 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    checkpointable_layers(model)[-1].register_forward_pre_hook(fail)


def run(spec: dict[str, Any], use_cpu: bool) -> None:
    """Trains, saves to `final/`, and writes `result.json`."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        without_compiled_collectives()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        fsdp_on_cpu()
    torch.set_num_threads(1)
    trainer = make(spec, {"use_cpu": True} if use_cpu else {})
    trainer.add_callback(Started())
    if "out_of_memory" in spec and trainer.accelerator.process_index == 1:
        run_out_of_memory(trainer.model, spec["out_of_memory"])
    calls = count_mixer_calls(trainer.model)
    trainer.train(resume_from_checkpoint=spec.get("resume"))
    trainer.save_model(str(Path(spec["out"]) / "final"))
    Path(spec["out"], f"calls.{trainer.accelerator.process_index}.json").write_text(json.dumps(calls))
    if (kept := trainer.passes.vision_cache) is not None:
        counts = {"encoded": kept.encoded, "read": kept.read}
        Path(spec["out"], f"features.{trainer.accelerator.process_index}.json").write_text(json.dumps(counts))
    if trainer.accelerator.is_main_process:
        plugin, fsdp = trainer.accelerator.deepspeed_plugin, getattr(trainer.accelerator.state, "fsdp_plugin", None)
        result = {
            "log": [
                {k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k}
                for entry in trainer.state.log_history
            ],
            "world": trainer.accelerator.num_processes,
            "kind": trainer.accelerator.distributed_type.value,
            "stage": plugin.zero_stage if plugin else None,
            "fsdp_precision": fsdp and str(fsdp.mixed_precision_policy),
            "preempted": trainer.preempted,
            "calls": trainer.choice.calls.total,
            "checkpointed": sum(layer.gradient_checkpointing for layer in checkpointable_layers(trainer.model)),
            "objective": trainer.objective.state_dict(),
        }
        Path(spec["out"], "result.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text()), "--use_cpu" in sys.argv)
