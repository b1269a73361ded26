"""A tiny model of any vision-language type of transformers, with random weights, and its own processor.

The config of a type is shrunk by what its numbers mean (their names), so that the type of next month works without an
entry here; a few types need a number that their names do not tell. Used by `python -m silkie.model` and by tests.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from silkie.model.processor import image_only_class, torchvision_works

WIDTH, SIDE, PATCH = 64, 56, 14
WORDS = """a the is are there what how many red blue green circle square cat dog on left right of yes no in image i see
one two three and not describe table user assistant system""".split()  # noqa: SIM905  (a list would be one word a line)
_LETTERS = [*".?,:;!'\"-_/\\()[]{}<>|=+*#%&@$^~`", *"0123456789"]

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
_PINPOINTS = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
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
    "llava_onevision": {"": {"image_grid_pinpoints": _PINPOINTS}},
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
# The processor ends the prompt itself, and a response with nothing but the end token.
_PALIGEMMA = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'][0]['text'] }}<end>{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
)
_OMNI_IMAGE = "<vision_bos><image><vision_eos>"
_PROCESSORS: dict[str, dict[str, Any]] = {
    "minimax_m3_vl": {
        "_tokens": {name: f"]<]{name}[>[" for name in ("image", "video", "start of image", "end of image")}
    },
    "aya_vision": {"img_size": SIDE, "patch_size": PATCH, "downsample_factor": 2},
    "cohere2_vision": {"_images": {"pil": "GotOcr2ImageProcessorPil"}, "_settings": {"patch_size": 2}},
    "gemma4_unified": {
        "_images": {"pil": "Gemma4ImageProcessorPil"},
        "_settings": {"pooling_kernel_size": 1, "patch_size": 42},
    },
    "granite4_vision": {"downsample_rate": "1/2"},
    "llava_onevision": {"_settings": {"image_grid_pinpoints": _PINPOINTS}},
    "hunyuan_vl": {"_image": "<image_start><image><image_end>"},
    "ovis2": {"image_seq_length": 16},
    "paligemma": {"_settings": {"image_seq_length": 16}, "_template": _PALIGEMMA},
    "deepseek_vl_hybrid": {"_settings": {"high_res_size": {"height": SIDE, "width": SIDE}}},
    "gemma3": {"_image": "<boi>"},
    "molmo2": {"_settings": {"overlap_margins": [1, 1], "max_crops": 2}},
    "qianfan_ocr": {"_image": "<image>"},
    "inkling2": {"_settings": {"size": {"height": 2 * PATCH, "width": 2 * PATCH}}},
    "inkling_mm_model": {"_settings": {"size": {"height": 16, "width": 16}}},
    "step3p7": {"_settings": {"size": {"height": SIDE, "width": SIDE}, "patch_size": SIDE}},
    "glm_ocr": {"_class": "Glm46VProcessor", "_images": {"pil": "Glm46VImageProcessorPil"}},
    "glmga": {"_class": "Glm46VProcessor"},
    "glm4v_moe": {"_images": {"pil": "Glm4vImageProcessorPil"}},
    "qwen3_vl_moe": {"_images": {"pil": "Qwen2VLImageProcessorPil"}},
    "qwen2_5_omni_thinker": {
        "_class": "Qwen2_5OmniProcessor",
        "_image": _OMNI_IMAGE,
        "_images": {"pil": "Qwen2VLImageProcessorPil"},
    },
    "qwen3_omni_moe_thinker": {
        "_class": "Qwen3OmniMoeProcessor",
        "_image": _OMNI_IMAGE,
        "_images": {"pil": "Qwen2VLImageProcessorPil"},
    },
    "smolvlm": {"_class": "Idefics3Processor"},  # its own differs for videos only, and wants a further package
}


def types() -> list[str]:
    """Every model type that transformers maps from image and text to text."""
    return list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def tiny(model_type: str, *, seed: int = 0) -> tuple[Any, ProcessorMixin]:
    """A tiny model and its processor.

    Raises:
        KeyError: transformers has no such type.
        Exception: whatever the type's own classes raise where they cannot be built this small, or lack a package.
    """
    processor = tiny_processor(model_type)
    return tiny_model(tiny_config(model_type, processor), seed=seed), processor


def needed_packages(model_type: str) -> list[str]:
    """Packages that a type does not work without: torchvision where its processor's module imports it, or no image
    processor of its own uses PIL; timm where the tower's config names one of timm's architectures."""
    out = []
    images = _PROCESSORS.get(model_type, {}).get("_images") or IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}
    name = _PROCESSORS.get(model_type, {}).get("_class") or PROCESSOR_MAPPING_NAMES.get(model_type)
    module = getattr(transformers, "_class_to_module").get(name, "")  # noqa: B009  (of the lazy module)
    if ("torchvision" in images and "pil" not in images) or _imports_torchvision(f"transformers.{module}"):
        out.append("torchvision")
    if any(hasattr(part, "architecture") for part in _parts(CONFIG_MAPPING[model_type]()).values()):
        out.append("timm")
    return out


def _imports_torchvision(module: str) -> bool:
    """Whether a module, or one of image processors that it imports, does so at its top. Nothing is imported."""
    spec = importlib.util.find_spec(module)
    source = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
    if re.search(r"^(?:from|import) torchvision", source, re.MULTILINE):
        return True
    package = module.rpartition(".")[0]
    beside = re.findall(r"^ *from (\.image_processing_\w+) import", source, re.MULTILINE)
    return any(_imports_torchvision(package + name) for name in beside)


def tiny_model(config: PretrainedConfig, *, seed: int = 0) -> Any:
    """The model of a config with random weights, spread so that masks and positions show in its outputs."""
    cls = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[config.model_type])
    torch.manual_seed(seed)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.isfinite().all() or (parameter.dim() > 1 and not parameter.any()):
                nn.init.normal_(parameter, std=0.1)  # made empty, or zero, through which no image would reach the text
            elif parameter.dim() > 1:
                parameter.mul_(4.0)
    return model.eval()


def tiny_config(model_type: str, processor: ProcessorMixin) -> PretrainedConfig:
    """The default config of a type with small numbers, and the token ids of a processor."""
    cls = CONFIG_MAPPING[model_type]
    default = cls()
    whole = _parts(default)
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
    for name, part in _parts(config).items():
        if getattr(config, name) is None:
            setattr(config, name, part)
    return config


def _parts(config: PretrainedConfig) -> dict[str, PretrainedConfig]:
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


# -- processors ---------------------------------------------------------------------------------------------------


def tiny_processor(model_type: str) -> ProcessorMixin:
    """The type's processor, for images of about 56 pixels, and a word-level tokenizer with its special tokens."""
    cls, override = _processor_class(model_type), _PROCESSORS.get(model_type, {})
    images = _image_processor(model_type)
    tokenizer = _tokenizer(model_type, cls)
    without = ["feature_extractor", "audio_processor"]
    video = _video_processor(model_type) if "video_processor" in cls.get_attributes() else None
    image_only = image_only_class(cls, without=(*without, *([] if video else ["video_processor"])))
    accepted = inspect.signature(cls.__init__).parameters
    known: dict[str, Any] = {"patch_size": PATCH, "num_image_tokens": 16, "image_seq_length": 4, "image_seq_len": 4}
    config = CONFIG_MAPPING[model_type]()
    for part in (config, getattr(config, "vision_config", None)):
        known["spatial_merge_size"] = known.get("spatial_merge_size") or getattr(part, "spatial_merge_size", None)
    known = {name: value for name, value in known.items() if value is not None}
    more: dict[str, Any] = {name: value for name, value in known.items() if name in accepted}
    more.update({name: value for name, value in override.items() if not name.startswith("_")})
    if video:
        more["video_processor"] = video
    if "chat_template" in accepted:
        more["chat_template"] = "x"
    processor = image_only(image_processor=images, tokenizer=tokenizer, **more)
    processor.chat_template = tokenizer.chat_template = _template(model_type, processor)
    return processor


def _processor_class(model_type: str) -> type[ProcessorMixin]:
    name = _PROCESSORS.get(model_type, {}).get("_class") or PROCESSOR_MAPPING_NAMES.get(model_type)
    if name is None:
        raise ValueError(f"transformers names no processor for {model_type!r}")
    return getattr(transformers, name)


def _image_processor(model_type: str) -> Any:
    override = _PROCESSORS.get(model_type, {})
    names = override.get("_images") or IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}
    if torchvision_works() and "torchvision" in names:
        name = names["torchvision"]
    elif "pil" in names:
        name = names["pil"]
    elif names:
        raise ImportError(f"the image processor of {model_type!r} needs torchvision")
    else:
        raise ValueError(f"transformers names no image processor for {model_type!r}")
    cls = _find(name)
    default = cls()
    settings = {k: _small(getattr(default, k, None)) for k in ("size", "crop_size", "max_image_size", "pad_size")}
    fewer = {"max_patches": 4, "max_num_tiles": 2, "max_soft_tokens": 70, "max_image_tiles": 2}
    settings.update({k: v for k, v in fewer.items() if hasattr(default, k)})
    config = CONFIG_MAPPING[model_type]()
    settings.update(_same_as_vision(default, _parts(config).get("vision_config")))
    settings.update(override.get("_settings", {}))
    return cls(**{k: v for k, v in settings.items() if v is not None})


def _video_processor(model_type: str) -> Any:
    """The type's video processor, which some processors read settings of; None where it cannot be had."""
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

    found: Any = VIDEO_PROCESSOR_MAPPING_NAMES.get(model_type)
    name = found.get("torchvision") if isinstance(found, Mapping) else found
    made = getattr(transformers, name)() if name and torchvision_works() else None
    try:
        return made and made.to_dict() and made
    except ValueError:  # it wants a file of a checkpoint (ERNIE: a font)
        return None


def _same_as_vision(images: Any, vision: PretrainedConfig | None) -> dict[str, Any]:
    """Settings of an image processor that the vision config decides."""
    out = {}
    for name, theirs in (
        ("patch_size", ("patch_size",)),
        ("merge_size", ("spatial_merge_size", "merge_size")),
        ("temporal_patch_size", ("temporal_patch_size",)),
        ("pooling_kernel_size", ("pooling_kernel_size",)),
    ):
        value = next((v for t in theirs if isinstance(v := getattr(vision, t, None), int)), None)
        if value is not None and isinstance(getattr(images, name, None), int):
            out[name] = PATCH if name == "patch_size" else value
    return out


def _small(size: Any) -> Any:
    """A size of about 56 pixels in the form of a given one. Numbers beyond any edge count pixels."""
    if size is None or isinstance(size, bool):
        return None
    if isinstance(size, int):
        return SIDE
    values = {k: v for k, v in (size.items() if isinstance(size, Mapping) else vars(size).items()) if v is not None}
    if any(isinstance(v, int) and v > 4096 for v in values.values()):
        return {"shortest_edge": 28 * 28, "longest_edge": 84 * 84}
    return dict.fromkeys(values, SIDE)


def _find(name: str) -> Any:
    if hasattr(transformers, name):
        return getattr(transformers, name)
    raise ImportError(f"transformers has no {name}")


def _tokenizer(model_type: str, cls: type) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with the special tokens that the processor's code names."""
    source = inspect.getsource(importlib.import_module(cls.__module__))
    attributes = sorted(set(re.findall(r"tokenizer(?:\.|, \")(\w+_token)\b", source)))
    written = re.findall(r"[\"'](<[^<>\"'{}\s]+>|\[[A-Z_]+\]|<\|[^\"'{}\s]+\|>)[\"']", source)
    more = _PROCESSORS.get(model_type, {}).get("_tokens", {})
    named = {
        name: more.get(name, f"<{name.removesuffix('_token')}>")
        for name in attributes
        if name not in ("pad_token", "bos_token", "eos_token", "unk_token", "cls_token", "sep_token", "mask_token")
        and not name.startswith("add_")
    }
    base = ["<pad>", "<bos>", "<end>", "<unk>", "<turn>", "<spare>"]
    grid = [f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)]
    special = list(dict.fromkeys([*base, *named.values(), *written, *grid, *more.values()]))
    words = list(dict.fromkeys([*WORDS, "\n", *_LETTERS]))
    tok = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*special, *words])}, unk_token="<unk>"))
    parts = [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Punctuation()]
    tok.pre_tokenizer = pre_tokenizers.Sequence(parts)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token="<bos>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=named,
    )
    fast.add_tokens([t for t in special if t not in base[:4]], special_tokens=True)
    return fast


def _template(model_type: str, processor: ProcessorMixin) -> str:
    """A chat template that writes an image as the type's processor expects it."""
    if (written := _PROCESSORS.get(model_type, {}).get("_template")) is not None:
        return str(written)
    image = _PROCESSORS.get(model_type, {}).get("_image") or getattr(processor, "image_token", None) or "<image>"
    return (
        "{% for m in messages %}<turn>{{ m['role'] }}\n{% for p in m['content'] %}{% if p['type'] == 'image' %}"
        + str(image)
        + "\n{% else %}{{ p['text'] }}{% endif %}{% endfor %}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
    )


def tiny_groups(images: Sequence[Any]) -> list[dict[str, Any]]:
    """Four preference groups of 4, 2, 3 and 2 responses: one image, two, none, one."""

    def group(pictures: Sequence[Any], question: str, responses: list[str]) -> dict[str, Any]:
        content = [*({"type": "image", "text": None} for _ in pictures), {"type": "text", "text": question}]
        return {
            "images": list(pictures),
            "prompt": [{"role": "user", "content": content}],
            "responses": responses,
            "pairs": [[0, 1]],
        }

    a, b, c, d = images
    return [
        group([a], "what is in image ?", ["a red cat", "yes", "no not a dog on the table", "is it ?"]),
        group([b, c], "how many cat are there in the image ?", ["two cat", "one"]),
        group([], "is there a dog", ["no", "yes yes", "one two three"]),
        group([d], "describe the table on the left", ["red table", "a blue square of one"]),
    ]
