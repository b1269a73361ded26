"""The setting of `bench_step.py`: a model of Qwen2.5-VL's or Qwen3.5's shape, preference data of a given size, and one
run of a contender."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset, Image, List
from peft import LoraConfig
from step_meter import StepMeter
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)
from trl import DPOConfig, DPOTrainer

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.data.schema import group_features
from silkie.model.adapters import default_lora_targets
from tests.support.data import group
from tests.support.tiny import SPECIAL, WORDS, image, tiny_processor, tiny_tokenizer

SHARED = "packed + shared image"
AUTO, WITHOUT = " + auto checkpointing", " without checkpointing"  # the others checkpoint every layer, TRL's default
KEPT = " + features on disk"  # the warm-up step encodes, the timed ones read
CONTENDERS = ("TRL", "rows", "packed", SHARED, "packed + precomputed reference")
CONTENDERS += ("TRL" + WITHOUT, "packed" + AUTO, "packed + precomputed reference" + AUTO)
CONTENDERS += ("packed" + KEPT, "packed + precomputed reference" + KEPT)
IMAGE_GRIDS = {16: (4, 4), 256: (16, 16), 576: (24, 24), 1280: (32, 40)}  # image tokens -> rows, columns of 28 pixels
PROMPT_WORDS = 50  # with the template's own tokens: 60 of prompt text
# Words of the responses; the template's end of turn makes two more tokens of each. Both add up to the same: 120 on
# average.
RESPONSE_WORDS: dict[str, dict[int, tuple[int, ...]]] = {
    "equal": {2: (118, 118), 4: (118, 118, 118, 118)},
    "unequal": {2: (48, 188), 4: (28, 58, 118, 268)},
}
FAMILIES = ("qwen2_5_vl", "qwen3_5")

_TINY_TEXT = dict(
    hidden_size=128,
    intermediate_size=688,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=1024,
)
_ENCODER = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, fullatt_block_indexes=[7, 15, 23, 31])

# Widths of the language model; "tiny" keeps the share of the head in the parameters (about a tenth) and the GQA of the
# 3B model.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "text": _TINY_TEXT,
        "vision": dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, fullatt_block_indexes=[1]),
        "mrope": [2, 3, 3],
    },
    # four times the arithmetic of "tiny": less of a step is overhead, and the ratios come nearer to those of a real
    # model
    "small": {
        "text": dict(
            hidden_size=256,
            intermediate_size=1376,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            vocab_size=2048,
        ),
        "vision": dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, fullatt_block_indexes=[1]),
        "mrope": [4, 6, 6],
    },
    # "tiny" with an encoder that does as much arithmetic per image token, against the language model, as that of the 3B
    # model
    "balanced": {
        "text": _TINY_TEXT,
        "vision": dict(depth=4, hidden_size=64, intermediate_size=171, num_heads=4, fullatt_block_indexes=[3]),
        "mrope": [2, 3, 3],
    },
    # The language models of Qwen2.5, with Qwen2.5-VL's encoder.
    "0.5b": {
        "text": dict(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=151936,
        ),
        "vision": _ENCODER,
        "mrope": [8, 12, 12],
    },
    "1.5b": {
        "text": dict(
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            vocab_size=151936,
        ),
        "vision": _ENCODER,
        "mrope": [16, 24, 24],
    },
    "3b": {
        "text": dict(
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
            vocab_size=151936,
        ),
        "vision": _ENCODER,
        "mrope": [16, 24, 24],
    },
}


# Qwen3.5's language models beside those widths: heads of 256 where attention's are 128, and three gated delta nets for
# each attention layer, with two value heads per key head.
HYBRID: dict[str, dict[str, Any]] = {
    "tiny": dict(
        head_dim=32, linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=8, linear_num_value_heads=16
    ),
    "small": dict(
        head_dim=64, linear_key_head_dim=32, linear_value_head_dim=32, linear_num_key_heads=8, linear_num_value_heads=16
    ),
    "3b": dict(
        head_dim=256,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
    ),
}
HYBRID_TARGETS = (
    r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    r"|in_proj_qkv|in_proj_z|in_proj_b|in_proj_a|out_proj)$"
)


def build_model(shape: str, device: str, family: str = "qwen2_5_vl") -> Any:
    """Random weights (seed 0); bf16 on CUDA, fp32 on the CPU."""
    config, model = _CONFIGS[family](shape)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    try:
        with torch.device(device):
            return model(config)
    finally:
        torch.set_default_dtype(before)


def _qwen2_5_vl(shape: str) -> tuple[Any, Any]:
    spec = SHAPES[shape]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": spec["mrope"]}
    text = {**_text(shape), "rope_parameters": rope}
    vision = {**spec["vision"], "out_hidden_size": text["hidden_size"], "patch_size": 14, "window_size": 112}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special_ids(), tie_word_embeddings=_tied(shape))
    return config, Qwen2_5_VLForConditionalGeneration


def _qwen3_5(shape: str) -> tuple[Any, Any]:
    """The same widths and depth, three of four layers recurrent."""
    hybrid, vision = HYBRID[shape], dict(SHAPES[shape]["vision"])
    vision.pop("fullatt_block_indexes")
    rotated = hybrid["head_dim"] // 8  # half of the quarter of a head that Qwen3.5 rotates
    rope = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [rotated - 2 * (rotated // 3), rotated // 3, rotated // 3],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.25,
    }
    text = {**_text(shape), **hybrid, "rope_parameters": rope}
    more = {"out_hidden_size": text["hidden_size"], "patch_size": 14, "num_position_embeddings": 2304}
    config = Qwen3_5Config(
        text_config=text, vision_config={**vision, **more}, **special_ids(), tie_word_embeddings=_tied(shape)
    )
    return config, Qwen3_5ForConditionalGeneration


def _tied(shape: str) -> bool:
    """Whether head and embedding are one matrix, as in Qwen's models up to 3B."""
    return SHAPES[shape]["text"]["vocab_size"] == 151936


def _text(shape: str) -> dict[str, Any]:
    return {
        **SHAPES[shape]["text"],
        "max_position_embeddings": 32768,
        "tie_word_embeddings": _tied(shape),
        "bos_token_id": None,
        "eos_token_id": tiny_tokenizer().convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tiny_tokenizer().convert_tokens_to_ids("<|pad|>"),
    }


def special_ids() -> dict[str, int]:
    tok = tiny_tokenizer()
    ids = {t: tok.convert_tokens_to_ids(t) for t in SPECIAL}
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


_CONFIGS = {"qwen2_5_vl": _qwen2_5_vl, "qwen3_5": _qwen3_5}


def build_groups(
    image_tokens: int, k: int, count: int, lengths: str = "equal", questions: int = 1
) -> list[dict[str, Any]]:
    """`count` groups of k random responses of the given lengths, `questions` of them about each image; all pairs of the
    responses."""
    gen = torch.Generator().manual_seed(0)
    rows_of_28, columns = IMAGE_GRIDS[image_tokens]

    def words(n: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=gen).tolist())

    pairs = [[i, j] for i in range(k) for j in range(i + 1, k)]
    return [
        group(
            [image(n // questions, columns * 28, rows_of_28 * 28)],
            words(PROMPT_WORDS),
            [words(n) for n in RESPONSE_WORDS[lengths][k]],
            pairs,
        )
        for n in range(count)
    ]


def pair_rows(groups: list[dict[str, Any]]) -> Dataset:
    """The same preferences as TRL wants them: a row per pair."""
    turns = [
        {
            "images": g["images"],
            "prompt": g["prompt"],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": g["responses"][c]}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": g["responses"][r]}]}],
        }
        for g in groups
        for c, r in g["pairs"]
    ]
    return Dataset.from_list(turns).cast_column("images", List(Image()))


def run(
    contender: str,
    *,
    shape: str,
    device: str,
    image_tokens: int,
    k: int,
    groups_per_step: int,
    timed: int,
    learning_rate: float = 1e-4,
    backend: str = "auto",
    family: str = "qwen2_5_vl",
    lengths: str = "equal",
    questions: int = 1,
) -> dict[str, Any]:
    """Trains a warm-up and the timed steps and returns what was measured."""
    pairs = k * (k - 1) // 2 * groups_per_step
    groups = build_groups(image_tokens, k, groups_per_step, lengths, questions)
    model = build_model(shape, device, family)
    targets = HYBRID_TARGETS if family == "qwen3_5" else default_lora_targets(model.config)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets)
    meter = StepMeter(device)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = dict(
            output_dir=folder,
            use_cpu=device == "cpu",
            bf16=device == "cuda",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            max_steps=timed + 1,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            dataloader_num_workers=0,  # a step is all that this process does
            gradient_checkpointing="auto" if AUTO in contender else WITHOUT not in contender,
            max_length=None,
        )
        processor, common = tiny_processor(image_side=28 * 40), dict(callbacks=[meter], peft_config=lora)
        trainer: Any
        if contender.startswith("TRL"):
            # a question at a time: all at once would hold as many times the memory
            args = DPOConfig(
                per_device_train_batch_size=pairs // questions, gradient_accumulation_steps=questions, **options
            )
            trainer = DPOTrainer(
                model, args=args, train_dataset=pair_rows(groups), processing_class=processor, **common
            )
        else:
            mine = SilkieDPOConfig(
                per_device_train_batch_size=groups_per_step,
                layout=contender.split()[0],
                precompute_ref_log_probs="precomputed" in contender,
                self_test=False,
                attention_backend=backend if "packed" in contender else "auto",
                vision_cache=f"{folder}/features" if KEPT in contender else "off",
                share_prefix="image" if contender == SHARED else "off",
                share_prefix_groups=questions,
                **options,
            )
            data = Dataset.from_list(groups, features=group_features(()))
            trainer = SilkieDPOTrainer(model, args=mine, train_dataset=data, processing_class=processor, **common)
        trainer.train()
        calls = "" if contender == "TRL" else trainer.choice.calls_reason
    best = min(meter.seconds)
    return {
        "contender": contender,
        "family": family,
        "lengths": lengths,
        "image_tokens": image_tokens,
        "questions": questions,
        "k": k,
        "pairs": pairs,
        "groups_per_step": groups_per_step,
        "seconds": best,
        "all_seconds": meter.seconds,
        "best_of_repeats": [best],
        "pairs_per_second": pairs / best,
        "flops": meter.flops,
        "tokens": meter.tokens,
        "extra_bytes": meter.extra_bytes,
        "losses": meter.losses,
        "backend": backend,
        "calls": calls,
    }
