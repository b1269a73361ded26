"""Tiny hybrid models (recurrent and attention layers), their modelling code in float64, and rows that show errors."""

from __future__ import annotations

import functools
import importlib.util
import linecache
import random
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.support.data import group
from tests.support.tiny import SPECIAL, WORDS, image, tiny_tokenizer

# All projections of the language model, those of its recurrent mixers included.
TARGETS = (
    r".*(language_model|layers).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    r"|in_proj_qkv|in_proj_z|in_proj_b|in_proj_a|in_proj|out_proj|w1|w2|w3)$"
)


@functools.cache
def in_float64(family: str) -> types.ModuleType:
    """transformers' modelling code of a family with float32 read as float64: it computes norms and the delta rule in
    float32 whatever the dtype, which would hide everything below 1e-6. A module beside the real one, which stays."""
    name = f"transformers.models.{family}.modeling_{family}"
    pytest.importorskip(name.rpartition(".")[0])  # older releases lack the newest families
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    text = Path(spec.origin).read_text()
    for single, double in (
        ("torch.float32", "torch.float64"),
        (".float()", ".double()"),
        ("dtype=torch.float)", "dtype=torch.float64)"),
    ):
        text = text.replace(single, double)
    file = Path(tempfile.gettempdir()) / f"silkie_float64_{family}.py"
    file.write_text(text)  # silkie reads the source of the model's forward
    linecache.checkcache(str(file))
    module = importlib.util.module_from_spec(spec)
    real = sys.modules.get(name)
    sys.modules[name] = module  # its classes look their annotations up there while they are made
    try:
        exec(compile(text, str(file), "exec"), module.__dict__)
    finally:
        if real is not None:
            sys.modules[name] = real
        else:
            del sys.modules[name]

    def from_config(config: Any) -> Any:
        """In place of AutoModel's, which would build the real parts."""
        return getattr(module, type(config).__name__.removesuffix("Config") + "Model")(config)

    module.AutoModel = types.SimpleNamespace(from_config=from_config)  # type: ignore[attr-defined]
    return module


def qwen3_5_config(hidden: int = 32, layers: int = 4, **text_more: Any) -> Any:
    """Qwen3.5: three gated delta nets, then one layer of full attention."""
    tok = tiny_tokenizer()
    ids = {t: tok.convert_tokens_to_ids(t) for t in SPECIAL}
    text = dict(
        vocab_size=len(tok),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        max_position_embeddings=4096,
        eos_token_id=ids["<|im_end|>"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
            "partial_rotary_factor": 0.25,
        },
    )
    vision = dict(
        depth=1,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=hidden,
        patch_size=14,
        num_position_embeddings=256,
    )
    return transformers.Qwen3_5Config(
        text_config={**text, **text_more},
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def qwen3_5(*, double: bool = False, seed: int = 0, **text_more: Any) -> Any:
    torch.manual_seed(seed)
    code = in_float64("qwen3_5") if double else transformers
    model = code.Qwen3_5ForConditionalGeneration(qwen3_5_config(**text_more))
    remembering(model, 4.0)
    return model.double() if double else model


def remembering(model: nn.Module, spread: float) -> None:
    """Random weights that let errors show: wide projections, states that decay slowly (a lost prompt is seen far on),
    biases alive."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(spread)
            if name.endswith("A_log"):
                parameter.copy_(torch.empty_like(parameter).uniform_(0.01, 0.2, generator=generator).log())
            if name.endswith("dt_bias"):
                parameter.copy_(torch.empty_like(parameter).uniform_(-2, 0, generator=generator))


def with_lora(model: Any) -> Any:
    """LoRA on every projection of the language model, both factors random, so that every gradient is alive."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch.manual_seed(5)
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS), autocast_adapter_dtype=False)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return peft


def words(n: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=n))


def unequal_groups() -> list[dict[str, Any]]:
    """One image, two, none, one; prompts and responses of many lengths, beyond the 64 tokens that chunked rules take at
    a time; responses of one word."""

    def row(images: list[Any], question: str, lengths: list[int], seed: int) -> dict[str, Any]:
        pairs = [[0, 1]] if len(lengths) > 1 else []
        return group(images, question, [words(n, seed + j) for j, n in enumerate(lengths)], pairs, id=f"group {seed}")

    return [
        row([image(0)], words(5, 1), [3, 1, 70, 20], 10),
        row([image(1, 112, 56), image(2)], words(80, 2), [2, 9], 20),
        row([], "is", [4, 30, 5], 30),
        row([image(3)], words(70, 4), [1, 1], 40),
    ]


_TEXT = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
_DELTA = dict(
    linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, head_dim=16
)
_MAMBA = dict(
    mamba_n_heads=4,
    mamba_d_head=16,
    mamba_n_groups=1,
    mamba_d_state=8,
    mamba_d_conv=4,
    mamba_expand=2,
    mamba_chunk_size=8,
)
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
_CONVS = dict(
    num_hidden_layers=4,
    layer_types=["conv", "conv", "full_attention", "conv"],
    block_auto_adjust_ff_dim=False,
)
_LINEAR = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
_ROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [1, 1, 0],
        "partial_rotary_factor": 0.25,
    }
}
# Text backbones of hybrid models: (prefix of the class, family whose modelling code it is, config).
BACKBONES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_5": ("Qwen3_5Text", "qwen3_5", dict(num_hidden_layers=4, **_DELTA, **_ROPE)),
    "qwen3_5_moe": ("Qwen3_5MoeText", "qwen3_5_moe", dict(num_hidden_layers=4, **_EXPERTS, **_DELTA, **_ROPE)),
    "qwen3_next": ("Qwen3Next", "qwen3_next", dict(num_hidden_layers=4, **_EXPERTS, **_DELTA)),
    "olmo_hybrid": (
        "OlmoHybrid",
        "olmo_hybrid",
        dict(
            num_hidden_layers=4,
            layer_types=_LINEAR,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=16,
        ),
    ),
    "kimi_linear": (
        "KimiLinear",
        "kimi_linear",
        dict(
            num_hidden_layers=4,
            layer_types=_LINEAR,
            num_key_value_heads=4,
            num_local_experts=4,
            linear_head_dim=8,
            linear_num_heads=2,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            kv_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
        ),
    ),
    "lfm2": ("Lfm2", "lfm2", dict(**_CONVS, conv_bias=True)),
    "lfm3": ("Lfm3", "lfm3", _CONVS),
    "nemotron_h": (
        "NemotronH",
        "nemotron_h",
        dict(
            layers_block_type=["linear_attention", "full_attention", "moe", "linear_attention"],
            mamba_num_heads=4,
            mamba_head_dim=16,
            ssm_state_size=8,
            n_groups=2,
            conv_kernel=4,
            chunk_size=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            moe_shared_expert_intermediate_size=16,
            n_group=1,
            topk_group=1,
            head_dim=8,
        ),
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        "granitemoehybrid",
        dict(
            num_hidden_layers=3,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
            num_local_experts=0,
            shared_intermediate_size=48,
            **_MAMBA,
        ),
    ),
    "bamba": ("Bamba", "bamba", dict(num_hidden_layers=3, attn_layer_indices=[1], **_MAMBA)),
    "falcon_h1": ("FalconH1", "falcon_h1", dict(num_hidden_layers=2, mamba_d_ssm=64, head_dim=8, **_MAMBA)),
    "jamba": (
        "Jamba",
        "jamba",
        dict(
            num_hidden_layers=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=2,
            mamba_d_state=8,
            mamba_d_conv=4,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
    ),
}


def backbone_config(name: str) -> Any:
    prefix, family, more = BACKBONES[name]
    pytest.importorskip(f"transformers.models.{family}")
    config = getattr(transformers, prefix + "Config")(**{**_TEXT, **more})
    config._attn_implementation = "sdpa"
    return config


def backbone(name: str) -> Any:
    """A causal language model of the backbone in float64, every bias alive."""
    prefix, family, _ = BACKBONES[name]
    torch.manual_seed(0)
    model = getattr(in_float64(family), prefix.removesuffix("Text") + "ForCausalLM")(backbone_config(name))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products have no float64
    remembering(model, 3.0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(".bias"):
                parameter.normal_(std=0.5)
    return model.double().train()
