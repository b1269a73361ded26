"""The config of a type, shrunk by what its numbers mean."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import re
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig, ProcessorMixin
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WIDTH, SIDE, PATCH = 64, 56, 14
PINPOINTS = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]

# Meaning of a number in a config -> its size in a tiny model. Text and vision parts differ in a few.
_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "embedding_dim", "n_embd", "dim", "projection_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "ffn_hidden_size", "encoder_ffn_dim"), 2 * WIDTH),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), WIDTH // 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads", "num_query_groups"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim"), WIDTH // 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "moe_top_k", "topk_group"), 2),
    **dict.fromkeys(("n_group", "n_shared_experts", "moe_num_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "o_lora_rank"), 16),
    "qk_rope_head_dim": 8,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim", "ssm_state_size"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "mamba_num_heads", "n_groups"), 4),
    "hidden_size_per_layer_input": 16,
    "max_position_embeddings": 4096,
    "num_kv_shared_layers": 0,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "sliding_window": 6,
    "attention_chunk_size": 16,
    **dict.fromkeys(("downsample_factor", "scale_factor"), 2),
    "mm_tokens_per_image": 4,
    "index_topk": 2048,
    "conv_dim": WIDTH,
    "block_ff_dim": 2 * WIDTH,
}
_LAYERS = ("num_hidden_layers", "depth", "num_layers", "n_layers", "encoder_layers", "decoder_layers")

# What the names do not tell: type -> part of its config ("" for the top) -> values.
_OMNI = {"vision_start_token_id": "<vision_bos>", "audio_start_token_id": "<audio_bos>"}
_CONV = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}
_OVERRIDES: dict[str, dict[str, dict[str, Any]]] = {
    "gemma3": {"": {"image_token_index": "<image>"}},
    "cohere_compass": {
        "text_config": {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
            }
        }
    },
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            "ple_layer_ids": [1],
            "ple_embed_dim": WIDTH,
            "ngram_vocab_size_base": 100,
            "split_ngram_parts": 4,
            "hc_lowrank": 16,
        }
    },
    "granite4_vision": {
        "": {"deepstack_layer_map": [[0, 0], [1, 1]], "spatial_target_layers": [1], "downsample_rate": "1/2"}
    },
    "hunyuan_vl": {"text_config": {"head_dim": 16}},
    "idefics2": {"perceiver_config": {"resampler_n_latents": 4}},
    "llava_onevision": {"": {"image_grid_pinpoints": PINPOINTS}},
    "llama4": {
        "": {"image_token_id": "<|patch|>"},
        "vision_config": {
            "vision_output_dim": WIDTH,
            "projector_input_dim": WIDTH,
            "projector_output_dim": WIDTH,
            "intermediate_size": 4 * WIDTH,
        },
    },
    "minicpmv4_6": {"": {"insert_layer_id": 0}},
    "minicpmv4_7": {"": {"insert_layer_id": 0}},
    "ovis2": {"": {"image_token_id": "<IMG_ATOM>"}},
    "glm4v_moe": {"text_config": {"topk_group": 1}},
    "kimi_k25": {"text_config": {"topk_group": 1, "head_dim": 8}},
    "dots3_note": {"text_config": {"topk_group": 1, "num_key_value_heads": 4}},
    "mistral_large4": {"text_config": {"topk_group": 1}},
    "lfm2_vl": {"vision_config": {"patch_size": 16}, "text_config": _CONV},
    "molmo2": {
        "": {"image_patch_id": "<im_patch>", "image_start_token_id": "<im_start>", "image_end_token_id": "<im_end>"},
        "vision_config": {"num_position_embeddings": (SIDE // PATCH) ** 2},
        "adapter_config": {"vision_feature_layer": [-1, -2], "text_hidden_size": WIDTH},
    },
    "nemotron_h_omni": {"text_config": {"topk_group": 1}},
    "glm5_next": {
        "text_config": {
            "num_key_value_heads": 4,
            "qk_rope_head_dim": 0,
            "topk_group": 1,
            "linear_num_heads": 2,
            "linear_head_dim": 16,
            "index_topk": 8,
            "index_kpool": 2,
            "index_head_dim": 16,
        }
    },
    "inkling2": {"vision_config": {"text_hidden_size": WIDTH}},
    "inkling_mm_model": {
        "vision_config": {"text_hidden_size": WIDTH, "patch_size": 16},
        "audio_config": {"text_hidden_size": WIDTH},
    },
    "muse_glimmer": {"": {"out_hidden_size": 4 * WIDTH, "projector_hidden_size": WIDTH}},
    "muse_spark": {"": {"out_hidden_size": 4 * WIDTH, "projector_hidden_size": WIDTH}},
    "qwen2_5_omni_thinker": {"": _OMNI},
    "qwen3_omni_moe_thinker": {"": _OMNI},
    "step3p7": {"text_config": {"sliding_window": 6}},
}


def tiny_config(model_type: str, processor: ProcessorMixin) -> PretrainedConfig:
    """The default config of a type with small numbers, and the token ids of a processor."""
    cls = CONFIG_MAPPING[model_type]
    default = cls()
    whole = parts_of(default)
    parts = {name: _shrunk(part, name) for name, part in whole.items()}
    top = _shrunk(default, "", skip=set(parts))
    wide = {getattr(part, "hidden_size", None) for part in whole.values()} - {None}
    for part in (top, *parts.values()):  # further numbers that are as wide as a part are so by its width
        part.update(
            {k: WIDTH for k, v in part.items() if isinstance(v, int) and v in wide and re.search("size|dim|width", k)}
        )
    tokenizer = processor.tokenizer
    for name, part in [("", top), *parts.items()]:
        part.update(_token_ids(part, processor))
        if "vocab_size" in part:
            part["vocab_size"] = len(tokenizer)
        part.update(_resolved(_OVERRIDES.get(model_type, {}).get(name, {}), tokenizer))
    text = parts.get("text_config", top)
    for name, part in parts.items():
        if name != "text_config":
            part.update({k: text["hidden_size"] for k in ("out_hidden_size", "output_dim") if k in part})
            part.update(_resolved(_OVERRIDES.get(model_type, {}).get(name, {}), tokenizer))
    return cls(**{**top, **parts})


def whole_config(model_type: str) -> PretrainedConfig:
    """The default config of a type, its vision part included where the default leaves that out."""
    config = CONFIG_MAPPING[model_type]()
    for name, part in parts_of(config).items():
        if getattr(config, name) is None:
            setattr(config, name, part)
    return config


def parts_of(config: PretrainedConfig) -> dict[str, PretrainedConfig]:
    """The configs within a config. One of vision is made where it is optional and left out by default."""
    whole = {name: getattr(config, name, None) for name in config.sub_configs}
    if "vision_config" in whole and whole["vision_config"] is None:
        spec: Any = config.sub_configs["vision_config"]
        whole["vision_config"] = getattr(spec, "config_class", spec)()
    return {name: part for name, part in whole.items() if part is not None}


def _resolved(values: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Overrides with the ids of the tokens that they name as "<...>"."""
    return {
        k: tokenizer.convert_tokens_to_ids(v) if isinstance(v, str) and v.startswith("<") else v
        for k, v in values.items()
    }


def _shrunk(config: PretrainedConfig, name: str, skip: set[str] | frozenset[str] = frozenset()) -> dict[str, Any]:
    """The fields of one config with small numbers."""
    fields = {k: v for k, v in config.to_dict().items() if k not in skip and not k.startswith("_")}
    for gone in ("architectures", "transformers_version", "dtype", "torch_dtype", "id2label", "label2id"):
        fields.pop(gone, None)
    count = next((fields[k] for k in _LAYERS if isinstance(fields.get(k), int)), None)
    layers = _representatives(fields, count) if count else []
    out = {}
    for key, value in fields.items():
        if isinstance(value, Mapping) and "model_type" in value and hasattr(config, key):
            out[key] = _shrunk(getattr(config, key), name or key)
        else:
            out[key] = _shrunk_value(key, value, count, layers)
    if out.get("kv_lora_rank"):  # latent attention: keys are made for every head
        out["num_key_value_heads"] = out["num_attention_heads"]
    return _with_rope(out, config)


def _shrunk_value(key: str, value: Any, count: int | None, layers: list[int]) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    listed = isinstance(value, (list, tuple)) and bool(value)
    if whole and key in _LAYERS:
        return len(layers)
    if listed and count and count > 1 and len(value) == count:
        return [value[i] for i in layers]
    if listed and all(isinstance(v, int) for v in value) and "layer" in key:
        return [max(-len(layers), min(v, len(layers) - 1)) for v in value]
    if _by_layer(value):
        numbered = {int(k): _small_fields(v) for k, v in value.items()}
        return {str(new): numbered[old] for new, old in enumerate(layers) if old in numbered}
    if listed and key.endswith(("_indexes", "_indices")):
        return sorted({min(v, len(layers) - 1) for v in value})
    if whole and key in _SIZES:
        return _SIZES[key]
    if key in ("image_size", "patch_size") and value is not None and not isinstance(value, Mapping):
        small = SIDE if key == "image_size" else PATCH
        return small if whole else [small] * len(value)
    return value


def _by_layer(value: Any) -> bool:
    """Whether a value says something of single layers, by their numbers."""
    if not isinstance(value, Mapping) or not value:
        return False
    return all(str(k).isdigit() and isinstance(v, Mapping) for k, v in value.items())


def _small_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: 2 * _SIZES[k] if k == "head_dim" else _SIZES.get(k, v) for k, v in fields.items()}


def _representatives(fields: Mapping[str, Any], count: int) -> list[int]:
    """Numbers of layers that stand for all kinds of layers, two at least."""
    lists = [v for v in fields.values() if isinstance(v, (list, tuple)) and len(v) == count and count > 1]
    single = [{int(k): v for k, v in value.items()} for value in fields.values() if _by_layer(value)]
    lists += [[v.get(i) for i in range(count)] for v in single]
    kinds: dict[str, int] = {}
    for i in range(count):
        kinds.setdefault(repr([values[i] for values in lists]), i)
    chosen = sorted(kinds.values())[:4]
    return chosen if len(chosen) > 1 else [0, min(1, count - 1)]


def _with_rope(fields: dict[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """`fields` with rotary sections that fill the head, where the type's code reads sections."""
    rope = fields.get("rope_parameters")
    if not isinstance(rope, Mapping) or "rope_type" not in rope:
        return fields
    rope = copy.deepcopy(dict(rope))
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor")) or 1.0
    head = fields.get("head_dim") or fields.get("hidden_size", WIDTH) // (fields.get("num_attention_heads") or 4)
    if partial < 1 and "head_dim" in fields:
        head = fields["head_dim"] = 32
    sections = rope.get("mrope_section") or _written_sections(config)
    if sections:
        total = int(head * partial) // 2
        share = [max(1, total * s // sum(sections)) for s in sections]
        share[-1] += total - sum(share)
        rope["mrope_section"] = share
    return {**fields, "rope_parameters": rope}


def _written_sections(config: PretrainedConfig) -> list[int] | None:
    """Default rotary sections, which some types write in their modelling code."""
    module = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
        source = inspect.getsource(importlib.import_module(module))
    except (ImportError, OSError):
        return None
    found = re.search(r"mrope_section\W+\[([\d, ]+)\]", source)
    if found:
        return [int(n) for n in found[1].split(",")]
    return [16, 24, 24] if "mrope_section" in source else None


def _token_ids(fields: Mapping[str, Any], processor: ProcessorMixin) -> dict[str, Any]:
    """Special token ids of a config: those that the processor or its tokenizer knows under the same name, else ids of
    tokens that no text holds."""
    tokenizer, out = processor.tokenizer, {}
    for key, value in fields.items():
        match = re.fullmatch(r"(\w+)_token_(?:id|index)", key)
        if not match or isinstance(value, (list, Mapping)):
            continue
        name = f"{match[1]}_token"
        number = getattr(processor, f"{name}_id", None)
        found = getattr(processor, name, None) or getattr(tokenizer, name, None)
        if isinstance(number, int):
            out[key] = number
        elif isinstance(found, str):
            out[key] = tokenizer.convert_tokens_to_ids(found)
        elif value is not None or match[1] in ("pad", "bos", "eos"):
            out[key] = {
                "pad": tokenizer.pad_token_id,
                "bos": tokenizer.bos_token_id,
                "eos": tokenizer.eos_token_id,
            }.get(match[1], tokenizer.convert_tokens_to_ids("<spare>"))
    return out
