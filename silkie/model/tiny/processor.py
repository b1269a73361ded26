"""The processor of a type, for small images, with a word-level tokenizer and a chat template."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PretrainedConfig, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from silkie.model.processor import image_only_class, torchvision_works
from silkie.model.tiny.config import PATCH, PINPOINTS, SIDE, parts_of

WORDS = """a the is are there what how many red blue green circle square cat dog on left right of yes no in image i see
one two three and not describe table user assistant system""".split()  # noqa: SIM905  (a list would be one word a line)
_LETTERS = [*".?,:;!'\"-_/\\()[]{}<>|=+*#%&@$^~`", *"0123456789"]

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
    "llava_onevision": {"_settings": {"image_grid_pinpoints": PINPOINTS}},
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
    settings.update(_same_as_vision(default, parts_of(config).get("vision_config")))
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


def needed_packages(model_type: str) -> list[str]:
    """Packages that a type does not work without: torchvision where its processor's module imports it, or no image
    processor of its own uses PIL; timm where the tower's config names one of timm's architectures."""
    out = []
    images = _PROCESSORS.get(model_type, {}).get("_images") or IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}
    name = _PROCESSORS.get(model_type, {}).get("_class") or PROCESSOR_MAPPING_NAMES.get(model_type)
    module = getattr(transformers, "_class_to_module").get(name, "")  # noqa: B009  (of the lazy module)
    if ("torchvision" in images and "pil" not in images) or _imports_torchvision(f"transformers.{module}"):
        out.append("torchvision")
    if any(hasattr(part, "architecture") for part in parts_of(CONFIG_MAPPING[model_type]()).values()):
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
