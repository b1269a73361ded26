"""One DPO run of another tool, in its own environment: `python peer_entry.py PEER FOLDER`, where FOLDER is what
`peer_data.write` left. Imports nothing of silkie; prints one line, `result: {...}`.

Each tool gets its own options for the recipe of `bench_step.py`: sigmoid loss, beta, LoRA on every linear layer of the
language model without dropout, vision frozen, every layer checkpointed, AdamW at a constant rate without decay, fp32,
no system prompt, no cut of image or text."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")


def llamafactory(setting: dict[str, Any], meter: Any) -> None:
    """`llamafactory-cli train`: its `run_exp` with the words of a YAML file."""
    folder = Path(setting["folder"])
    rows = [
        {
            "conversations": [{"from": "human", "value": f"<image>{pair['prompt']}"}],
            "chosen": {"from": "gpt", "value": pair["chosen"]},
            "rejected": {"from": "gpt", "value": pair["rejected"]},
            "images": [pair["image"]],
        }
        for pair in setting["pairs"]
    ]
    (folder / "pairs.json").write_text(json.dumps(rows))
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"}
    info = {"pairs": {"file_name": "pairs.json", "ranking": True, "formatting": "sharegpt", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    from llamafactory.train.tuner import run_exp

    run_exp(
        {
            **_common(setting),
            "model_name_or_path": str(folder / "model"),
            "stage": "dpo",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_target": "all",
            "lora_rank": setting["lora"]["r"],
            "lora_alpha": setting["lora"]["alpha"],
            "lora_dropout": 0.0,
            "pref_beta": setting["beta"],
            "pref_loss": "sigmoid",
            "dataset": "pairs",
            "dataset_dir": str(folder),
            "template": "qwen2_vl",
            "default_system": "",
            "cutoff_len": 32768,
            "image_max_pixels": 10 * setting["pixels"],
            "overwrite_cache": True,
            "use_cpu": True,
            "trust_remote_code": False,
        },
        callbacks=[meter],
    )


def ms_swift(setting: dict[str, Any], meter: Any) -> None:
    """`swift rlhf`: its `rlhf_main` with the words of the command line. The template's image tokens are those of Qwen's
    own vocabulary, so that a plug-in, which is how ms-swift takes new models, names this model's."""
    folder = Path(setting["folder"])
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"<image>{pair['prompt']}"},
                {"role": "assistant", "content": pair["chosen"]},
            ],
            "rejected_response": pair["rejected"],
            "images": [pair["image"]],
        }
        for pair in setting["pairs"]
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from swift.callbacks import callbacks_map
    from swift.template import register_template
    from swift.template.templates.qwen import Qwen2_5VLTemplate, QwenTemplateMeta

    class Tiny(Qwen2_5VLTemplate):
        image_token_id = setting["image_token_id"]
        video_token_id = setting["video_token_id"]

    register_template(QwenTemplateMeta("tiny", template_cls=Tiny, default_system=None))
    callbacks_map["meter"] = lambda args, trainer: meter
    from swift.pipelines import rlhf_main

    options = {
        **_common(setting),
        "rlhf_type": "dpo",
        "model": str(folder / "model"),
        "model_type": "qwen2_5_vl",
        "template": "tiny",
        "tuner_type": "lora",
        "target_modules": "all-linear",
        "lora_rank": setting["lora"]["r"],
        "lora_alpha": setting["lora"]["alpha"],
        "lora_dropout": 0.0,
        "beta": setting["beta"],
        "loss_type": "sigmoid",
        "dataset": str(folder / "pairs.jsonl"),
        "split_dataset_ratio": 0,
        "max_length": 32768,
        "torch_dtype": "float32",
        "callbacks": "meter",
        "load_from_cache_file": False,
        "use_hf": True,
        "add_version": False,
    }
    rlhf_main([word for name, value in options.items() for word in (f"--{name}", str(value))])


def unsloth(setting: dict[str, Any], meter: Any) -> None:
    """Its entry for vision-language models, which refuses a CPU (2026.10.9); so no run of it could be written or seen."""
    from unsloth import FastVisionModel

    model, processor = FastVisionModel.from_pretrained(
        str(Path(setting["folder"]) / "model"), load_in_4bit=False, use_gradient_checkpointing=True
    )
    raise NotImplementedError(
        f"unsloth loaded {type(model).__name__} with {type(processor).__name__}; the run after it is yet to be written"
    )


def _common(setting: dict[str, Any]) -> dict[str, Any]:
    """What all of them hand to transformers' Trainer."""
    return {
        "output_dir": str(Path(setting["folder"]) / "out"),
        "per_device_train_batch_size": len(setting["pairs"]),
        "gradient_accumulation_steps": 1,
        "max_steps": setting["steps"],
        "learning_rate": setting["learning_rate"],
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "adam_beta2": 0.999,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "bf16": False,
        "fp16": False,
        "seed": 0,
    }


PEERS: dict[str, Callable[[dict[str, Any], Any], None]] = {
    "llamafactory": llamafactory,
    "ms-swift": ms_swift,
    "unsloth": unsloth,
}


def main() -> None:
    peer, folder = sys.argv[1:]
    setting = json.loads((Path(folder) / "setting.json").read_text())
    os.environ.update(WANDB_DISABLED="true", HF_HUB_OFFLINE="1")
    from step_meter import StepMeter

    meter = StepMeter("cpu")
    PEERS[peer](setting, meter)
    found = {
        "losses": meter.losses,
        "all_seconds": meter.seconds,
        "flops": meter.flops,
        "tokens": meter.tokens,
        "extra_bytes": meter.extra_bytes,
        "versions": {name: metadata.version(name) for name in (peer, *PACKAGES)},
    }
    print("\nresult: " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
