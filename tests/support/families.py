"""Tiny models and processors of the VLM families besides Qwen's, built from config with random weights (no hub)."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from silkie.model.processor import image_only_class
from tests.support.tiny import WORDS, tiny_model, tiny_processor

FAMILIES = ["llava", "llava_onevision", "internvl", "smolvlm", "idefics3", "gemma3", "paligemma"]
QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]

_BASE = ["<pad>", "<bos>", "<turn>", "<end>", "<unk>"]
_NAMED = {
    "llava": {"image_token": "<image>"},
    "llava_onevision": {"image_token": "<image>", "video_token": "<video>"},
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "smolvlm": {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
        "video_token": "<video>",
    },
    "idefics3": {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "end_of_utterance_token": "<end_of_utterance>",
    },
    "gemma3": {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    "paligemma": {"image_token": "<image>"},
}
# What the chat template writes for an image; the processor expands it.
_PLACEHOLDER = {"internvl": "<IMG_CONTEXT>", "gemma3": "<start_of_image>"}


def family_tokenizer(family: str) -> PreTrainedTokenizerFast:
    named = _NAMED[family]
    grid = (
        [f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)] + ["<global-img>"]
        if family in ("smolvlm", "idefics3")
        else []
    )
    special = list(dict.fromkeys([*_BASE, *named.values(), *grid]))
    words = [*WORDS, "user", "assistant", "system", "\n", ".", "?", ","]
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
    fast.add_tokens(["<turn>", *grid], special_tokens=True)
    image = _PLACEHOLDER.get(family, "<image>")
    if (
        family == "paligemma"
    ):  # images come first, the text follows, and the processor writes the line break that ends the prompt
        fast.chat_template = (
            "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'][0]['text'] }}<end>"
            "{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %}"
            + image
            + "{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
            "{% endif %}{% endfor %}"
        )
    else:
        fast.chat_template = (
            "{% for m in messages %}<turn>{{ m['role'] }}\n{% for p in m['content'] %}{% if p['type'] == 'image' %}"
            + image
            + "{% else %}"
            "{{ p['text'] }}{% endif %}{% endfor %}<end>\n{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
        )
    return fast


def family_processor(family: str) -> Any:
    """The family's processor with a word-level tokenizer and the PIL image processor, on images of 56 pixels."""
    if family in QWEN:
        return tiny_processor(family)
    tok = family_tokenizer(family)
    keep = {"tokenizer": tok, "chat_template": tok.chat_template}
    if family == "llava":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        size = {"height": 56, "width": 56}
        images = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
        cls, more = transformers.LlavaProcessor, {"patch_size": 14, "vision_feature_select_strategy": "full"}
    elif family == "llava_onevision":
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )

        grid = [[28, 28], [28, 56], [56, 28], [56, 56]]
        images = LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, image_grid_pinpoints=grid)
        cls, more = (
            transformers.LlavaOnevisionProcessor,
            {"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
        )
    elif family == "internvl":
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        images = GotOcr2ImageProcessorPil(size={"height": 56, "width": 56}, max_patches=4, min_patches=1)
        cls, more = transformers.InternVLProcessor, {"image_seq_length": 4}
    elif family == "smolvlm":
        from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

        images = SmolVLMImageProcessorPil(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
        # SmolVLM's own processor differs for videos only, and wants a package that writes out their time stamps
        cls, more = transformers.Idefics3Processor, {"image_seq_len": 4}
    elif family == "idefics3":
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

        images = Idefics3ImageProcessorPil(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
        cls, more = transformers.Idefics3Processor, {"image_seq_len": 4}
    elif family == "gemma3":
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

        images = Gemma3ImageProcessorPil(size={"height": 56, "width": 56}, do_pan_and_scan=False)
        cls, more = transformers.Gemma3Processor, {"image_seq_length": 4}
    else:
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        images = SiglipImageProcessorPil(size={"height": 56, "width": 56})
        images.image_seq_length = 16
        cls, more = transformers.PaliGemmaProcessor, {}
    return image_only_class(cls)(image_processor=images, **keep, **more)


def family_model(family: str, *, seed: int = 0, **text_kwargs: Any) -> Any:
    """A model of the family: 2 (Gemma3: 3) text layers of width 32, 2 vision layers."""
    if family in QWEN:
        return tiny_model(family, seed=seed, **text_kwargs)
    tok = family_processor(family).tokenizer
    text = dict(
        vocab_size=len(tok),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
        **text_kwargs,
    )
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=56
    )
    siglip = {**vision, "model_type": "siglip_vision_model", "vision_use_head": False}
    ids = {name: tok.convert_tokens_to_ids(token) for name, token in _NAMED[family].items()}
    common = {"tie_word_embeddings": False}
    if family == "llava":
        config = transformers.LlavaConfig(
            text_config={"model_type": "llama", **text},
            vision_config={**siglip, "image_size": 56},
            image_token_index=ids["image_token"],
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
            **common,
        )
        cls = transformers.LlavaForConditionalGeneration
    elif family == "llava_onevision":
        config = transformers.LlavaOnevisionConfig(
            text_config={"model_type": "qwen2", **text},
            vision_config={**siglip, "image_size": 28},
            image_token_index=ids["image_token"],
            video_token_index=ids["video_token"],
            image_grid_pinpoints=[[28, 28], [28, 56], [56, 28], [56, 56]],
            **common,
        )
        cls = transformers.LlavaOnevisionForConditionalGeneration
    elif family == "internvl":
        square = {"patch_size": [14, 14], "image_size": [56, 56]}
        config = transformers.InternVLConfig(
            text_config={"model_type": "qwen2", **text},
            vision_config={**vision, **square},
            image_token_id=ids["context_image_token"],
            image_seq_length=4,
            **common,
        )
        cls = transformers.InternVLForConditionalGeneration
    elif family in ("smolvlm", "idefics3"):
        make, cls = {
            "smolvlm": (transformers.SmolVLMConfig, transformers.SmolVLMForConditionalGeneration),
            "idefics3": (transformers.Idefics3Config, transformers.Idefics3ForConditionalGeneration),
        }[family]
        config = make(
            text_config={"model_type": "llama", **text},
            vision_config=vision,
            image_token_id=ids["image_token"],
            scale_factor=2,
            pad_token_id=tok.pad_token_id,
            **common,
        )
    elif family == "gemma3":
        # a window shorter than the prompt, so that a wrong one shows
        layers = {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
        }
        config = transformers.Gemma3Config(
            text_config={**text, **layers},
            vision_config=siglip,
            mm_tokens_per_image=4,
            image_token_index=ids["image_token"],
            boi_token_index=ids["boi_token"],
            eoi_token_index=ids["eoi_token"],
            **common,
        )
        cls = transformers.Gemma3ForConditionalGeneration
    else:
        config = transformers.PaliGemmaConfig(
            text_config={"model_type": "gemma", **text},
            vision_config=siglip,
            image_token_index=ids["image_token"],
            projection_dim=32,
            hidden_size=32,
            **common,
        )
        cls = transformers.PaliGemmaForConditionalGeneration
    torch.manual_seed(seed)
    model = cls(config)
    with (
        torch.no_grad()
    ):  # random init leaves near-uniform outputs; spread the weights so that masks and positions show
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(6.0)
            if p.dim() > 1 and not p.any():  # Gemma3's projector starts at zero: no image would reach the text
                torch.nn.init.normal_(p, std=0.2)
    return model.eval()
