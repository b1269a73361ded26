"""Stages of `gpu_run.py` that have no script of their own: `python tests/benchmarks/gpu_stages.py NAME [--rehearse]`.

The last line printed is JSON: the figures of the stage. Random weights of Qwen2.5-VL-3B's shape in bf16, 576 image
tokens, four responses; with --rehearse a tiny shape on the CPU."""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
from datasets import Dataset
from peft import LoraConfig
from step_setting import build_groups, build_model
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.data.schema import group_features
from silkie.model.adapters import default_lora_targets
from silkie.model.families import shell
from silkie.model.vision import unquantized_modules
from silkie.plan.workload import plan_of
from tests.support.tiny import tiny_processor
from tests.support.train_run import without_compiled_collectives

ROOT = Path(__file__).parents[2]
GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """Sizes of a stage."""

    device: str
    shape: str
    image_tokens: int
    most_groups: int  # of a micro-batch, where the largest is looked for


REAL = Setting("cuda", "3b", 576, 64)
REHEARSED = Setting("cpu", "tiny", 16, 2)


def trainer_of(model: Any, groups: int, folder: str, setting: Setting, **options: Any) -> SilkieDPOTrainer:
    """A run with `groups` in its micro-batch; two groups more than that are in the data."""
    args = SilkieDPOConfig(
        output_dir=folder,
        use_cpu=setting.device == "cpu",
        bf16=setting.device == "cuda",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        max_steps=2,
        per_device_train_batch_size=groups,
        vision_cache="off",
        dataloader_num_workers=0,
        **options,
    )
    rows = build_groups(setting.image_tokens, 4, groups + 2)
    return SilkieDPOTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list(rows, features=group_features(())),
        processing_class=tiny_processor(image_side=28 * 40),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=default_lora_targets(model.config)),
    )


def losses_of(trainer: SilkieDPOTrainer) -> list[float]:
    return [round(float(e["loss"]), 4) for e in trainer.state.log_history if "loss" in e]


def peak(setting: Setting) -> float:
    """GiB: the allocator's peak on CUDA, the process's on a CPU."""
    if setting.device == "cuda":
        return round(torch.cuda.max_memory_allocated() / GIB, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 2)


def largest(setting: Setting, folder: str) -> dict[str, Any]:
    """Groups of a micro-batch, doubled until one does not fit."""
    model, fits, why = build_model(setting.shape, setting.device), 0, "the most that was tried"
    groups = 1
    while groups <= setting.most_groups:
        if setting.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            trainer = trainer_of(model, groups, folder, setting, self_test=False)
            trainer.train()
        except torch.OutOfMemoryError:
            why = f"{groups} is out of memory"
            break
        fits, memory, model = groups, peak(setting), trainer.model.unload()
        print(f"{groups} groups: peak {memory} GiB", flush=True)
        groups *= 2
    return {"largest micro-batch (groups of 4)": fits, "why not more": why, "peak GiB": memory}


def planner(setting: Setting, folder: str) -> dict[str, Any]:
    """The plan of a run, and the memory that it took."""
    trainer = trainer_of(build_model(setting.shape, setting.device), 2, folder, setting)
    plan, source = plan_of(trainer, next(iter(trainer.get_train_dataloader())))
    trainer.train()
    planned = round(plan.total / GIB, 2)
    return {"planned GiB": planned, "measured GiB": peak(setting), "losses": losses_of(trainer), "memory": source}


def qlora(setting: Setting, folder: str) -> dict[str, Any]:
    """NF4 weights of the language model, a LoRA adapter, two steps."""
    build_model(setting.shape, setting.device).save_pretrained(f"{folder}/base")
    if setting.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    from transformers import AutoConfig

    skipped = unquantized_modules(shell(AutoConfig.from_pretrained(f"{folder}/base")))
    half = torch.bfloat16 if setting.device == "cuda" else torch.float32
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=half, llm_int8_skip_modules=skipped
    )
    place = {"": 0 if setting.device == "cuda" else "cpu"}
    model = AutoModelForImageTextToText.from_pretrained(
        f"{folder}/base", quantization_config=nf4, device_map=place, dtype=half
    )
    trainer = trainer_of(model, 1, folder, setting)
    trainer.train()
    return {"losses": losses_of(trainer), "peak GiB": peak(setting)}


def zero3(setting: Setting, folder: str) -> dict[str, Any]:
    """DeepSpeed's ZeRO-3 with one process: its hooks and its optimizer, not its traffic."""
    if setting.device == "cpu":
        without_compiled_collectives()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_DEEPSPEED="true",
        ACCELERATE_DEEPSPEED_CONFIG_FILE=str(ROOT / "recipes/accelerate/deepspeed_zero3.json"),
        ACCELERATE_DEEPSPEED_ZERO3_INIT="false",
    )
    trainer = trainer_of(build_model(setting.shape, setting.device), 1, folder, setting)
    trainer.train()
    return {
        "engine": str(trainer.accelerator.distributed_type),
        "losses": losses_of(trainer),
        "peak GiB": peak(setting),
    }


STAGES = {"largest": largest, "planner": planner, "qlora": qlora, "zero3": zero3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=tuple(STAGES))
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="silkie-gpu-") as folder:
        figures = STAGES[args.stage](REHEARSED if args.rehearse else REAL, folder)
    print("\n" + json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
