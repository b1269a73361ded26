"""One training step of a full-size architecture without its weights: `python -m tests.support.full_size NAME OUT`.

The model is built from its config in bf16 with made-up weights, so nothing is downloaded. The run's own self-test
compares the packed layout with the model's plain forward before the step. OUT: a JSON file with what was seen."""

from __future__ import annotations

import json
import logging
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers.initialization import no_init_weights

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.data.schema import group_features
from silkie.model.adapters import default_lora_targets
from tests.support.data import group
from tests.support.tiny import SPECIAL, image, tiny_processor, tiny_tokenizer

SIDE = 448  # pixels: 256 image tokens
LONG = "a red cat on the left of two blue circle and one green square on the table , not a dog in the image"


def configs(name: str) -> Any:
    """The published shape, with the ids of the small tokenizer that the test's words are in."""
    tokenizer = tiny_tokenizer()
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL}
    tokens = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    text: dict[str, Any] = {
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|pad|>"],
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
        "hidden_size": 2048,
        "num_key_value_heads": 2,
    }
    if name == "Qwen2.5-VL-3B":
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        text |= {"intermediate_size": 11_008, "num_hidden_layers": 36, "num_attention_heads": 16}
        text |= {"vocab_size": 151_936, "rope_parameters": rope}
        vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "window_size": 112}
        vision |= {"fullatt_block_indexes": [7, 15, 23, 31], "patch_size": 14, "out_hidden_size": 2048}
        return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
    if name == "Qwen3.5-2B":
        rope = {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [11, 11, 10], "mrope_interleaved": True}
        text |= {"intermediate_size": 6144, "num_hidden_layers": 24, "num_attention_heads": 8, "head_dim": 256}
        text |= {"linear_num_key_heads": 16, "linear_num_value_heads": 16, "vocab_size": 248_320}
        text |= {"rope_parameters": {**rope, "partial_rotary_factor": 0.25}}
        # patches of 14 like the small processor's; the published ones have 16
        vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 14}
        vision |= {"out_hidden_size": 2048, "num_position_embeddings": 2304}
        return transformers.Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
    raise ValueError(name)


def build(name: str) -> Any:
    """The model in bf16. Its weights are one block of random numbers laid end to end: drawing billions takes minutes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with no_init_weights():
            config = configs(name)
            model = transformers.AutoModelForImageTextToText.from_config(config)
    finally:
        torch.set_default_dtype(before)
    block = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if part.endswith("A_log"):
                parameter.fill_(-3.0)  # states that decay slowly
            elif parameter.dim() == 1:
                # a norm's scale is its weight, or 1 + weight
                parameter.fill_(0.5 if part.endswith("weight") else 0.0)
            else:
                flat = parameter.view(-1)
                for start in range(0, flat.numel(), block.numel()):
                    piece = flat[start : start + block.numel()]
                    piece.copy_(block[: piece.numel()])
                parameter.mul_(0.02)
    model.tie_weights()
    return model


def run(name: str) -> dict[str, Any]:
    model = build(name)
    processor = tiny_processor("qwen2_5_vl", image_side=SIDE)
    responses = [f"{first} {LONG}" for first in ("yes", "no", "one", "there are three")]
    pairs = [[0, 1], [2, 1], [0, 3], [3, 2]]
    data = [group([image(0, SIDE, SIDE)], "what is in the image ?", responses, pairs, id="one")]
    with tempfile.TemporaryDirectory() as folder:
        trainer = SilkieDPOTrainer(
            model,
            args=SilkieDPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=True,
                report_to="none",
                save_strategy="no",
                max_steps=1,
                logging_steps=1,
                per_device_train_batch_size=1,
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_list(data, features=group_features(())),
            processing_class=processor,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=default_lora_targets(model.config)),
        )
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return {
        "parameters": sum(p.numel() for n, p in model.named_parameters() if "lora" not in n),
        "plan": trainer.plan_lines(),
        "loss": float(log["loss"]),
        "grad_norm": float(log["grad_norm"]),
        "cpu_seconds": round(seconds, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    Path(sys.argv[2]).write_text(json.dumps(run(sys.argv[1]), indent=1) + "\n", encoding="utf-8")
