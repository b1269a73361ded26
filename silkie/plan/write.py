"""The files of a plan: what `accelerate launch --config_file` and `silkie train --config` take.

`tests/unit/test_plan_write.py` holds them equal to those of recipes/accelerate.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from silkie.plan.memory import Engine, Plan

__all__ = ["accelerate_config", "deepspeed_config", "training_config", "write_plan"]

GPUS_PER_MACHINE = 8
HUB = {"Qwen2-VL-2B", "Qwen2.5-VL-3B", "Qwen2.5-VL-7B"}  # names of `SHAPES`, all of them Qwen's


def machines_of(gpus: int) -> int:
    return -(-gpus // GPUS_PER_MACHINE)


def accelerate_config(engine: Engine, gpus: int, deepspeed_file: str) -> dict[str, Any]:
    """The configuration of accelerate for an engine on `gpus` GPUs, 8 of them in a machine."""
    kind = "NO" if gpus == 1 and engine == "ddp" else {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(engine, "DEEPSPEED")
    config: dict[str, Any] = {"compute_environment": "LOCAL_MACHINE", "distributed_type": kind}
    if kind == "DEEPSPEED":
        several = {"deepspeed_multinode_launcher": "standard"} if machines_of(gpus) > 1 else {}
        config["deepspeed_config"] = {
            "deepspeed_config_file": deepspeed_file,
            "zero3_init_flag": engine != "zero2",
            **several,
        }
    elif kind == "FSDP":
        config["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": True,
            "fsdp_cpu_ram_efficient_loading": True,
            "fsdp_offload_params": False,
            "fsdp_state_dict_type": "FULL_STATE_DICT",
        }
    if kind != "DEEPSPEED":  # DeepSpeed's own file says it
        config["mixed_precision"] = "bf16" if kind == "FSDP" else "no"
    config |= {
        "num_machines": machines_of(gpus),
        "num_processes": gpus,
        "machine_rank": 0,
        "main_training_function": "main",
        "downcast_bf16": "no",
        "use_cpu": False,
    }
    if machines_of(gpus) > 1:
        config |= {"rdzv_backend": "static", "same_network": True}
    return config


def deepspeed_config(engine: Engine) -> dict[str, Any]:
    """DeepSpeed's configuration of a ZeRO engine."""
    stage2 = {"reduce_scatter": True, "allgather_bucket_size": 200_000_000}
    stage3 = {
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "steps_per_print": 1_000_000_000,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 2 if engine == "zero2" else 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": "auto",
            **(stage2 if engine == "zero2" else stage3),
            **(offload if engine == "zero3_offload" else {}),
        },
    }


def training_config(model: str, plan: Plan) -> dict[str, Any]:
    """Options of `silkie train` for the plan's workload. The data are the caller's to name."""
    w = plan.workload
    config: dict[str, Any] = {
        "model_name_or_path": f"Qwen/{plan.model}-Instruct" if plan.model in HUB else model,
        "dtype": "bfloat16",
        "dataset_name": "DATA",
    }
    if w.training != "full":
        config |= {"use_peft": True, "lora_r": w.lora_rank, "lora_alpha": max(1, w.lora_rank // 4)}  # as Silkie's
    if w.training == "qlora":
        config["load_in_4bit"] = True
    if w.layout == "rows":
        config["layout"] = "rows"
    config |= {
        "learning_rate": 1e-6 if w.training == "full" else 1e-5,
        "per_device_train_batch_size": w.groups,
        "gradient_checkpointing": "auto" if w.checkpointing else False,
        "precompute_ref_log_probs": w.reference_cached,
    }
    if w.optimizer_8bit:
        config["optim"] = "adamw_bnb_8bit"
    return config | {"output_dir": "outputs/run"}


def write_plan(directory: str | Path, model: str, plan: Plan) -> str:
    """Write `accelerate.yaml`, `train.yaml`, and `deepspeed.json` where the engine is DeepSpeed's.

    Returns:
        the command that starts the run.

    Raises:
        FileExistsError: one of the files is there.
    """
    folder = Path(directory)
    launch, train, deepspeed = (folder / name for name in ("accelerate.yaml", "train.yaml", "deepspeed.json"))
    if there := [file for file in (launch, train, deepspeed) if file.exists()]:
        raise FileExistsError(f"{there[0]} exists; name another directory, or move it away.")
    folder.mkdir(parents=True, exist_ok=True)
    zero = plan.engine.startswith("zero")
    config = accelerate_config(plan.engine, plan.gpus, str(deepspeed))
    launch.write_text(f"# silkie plan: {plan.lines()[0]}\n{_yaml(config)}", encoding="utf-8")
    train.write_text(
        "# Name your data as `dataset_name`. bf16 and tf32 follow the GPU unless they are set here.\n"
        + _yaml(training_config(model, plan)),
        encoding="utf-8",
    )
    if zero:
        deepspeed.write_text(json.dumps(deepspeed_config(plan.engine), indent=2) + "\n", encoding="utf-8")
    return f"silkie train --config_file {launch} --config {train}"


def _yaml(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False)
