"""Tiny VLMs of every supported family, built from config with random weights, and processors with a word-level
tokenizer."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from silkie.model.processor import image_only_class

WORDS = "a the is are there what how many red blue green circle square cat dog on left right of yes no in image i see one two three and not describe table".split()
SPECIAL = [
    "<|pad|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<unk>",
]
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    roles = ["user", "assistant", "system"]
    vocab = {t: i for i, t in enumerate(SPECIAL + roles + WORDS + ["\n", ".", "?", ","])}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Punctuation()]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[1:7],
    )
    fast.chat_template = QWEN_TEMPLATE
    return fast


def tiny_processor(family: str = "qwen2_5_vl", image_side: int = 56) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    patch = 16 if family == "qwen3_vl" else 14
    unit = patch * 2
    size = {"shortest_edge": unit * unit, "longest_edge": max(4, (image_side // unit) ** 2) * unit * unit}
    image_processor = Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, size=size)
    cls = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}[family]
    tok = tiny_tokenizer()
    return image_only_class(getattr(transformers, cls))(
        image_processor=image_processor, tokenizer=tok, chat_template=tok.chat_template
    )


def tiny_model(
    family: str = "qwen2_5_vl",
    *,
    vocab_size: int | None = None,
    hidden: int = 32,
    layers: int = 2,
    seed: int = 0,
    tie: bool = False,
    **text_kwargs: Any,
) -> Any:
    tok = tiny_tokenizer()
    ids = {t: tok.convert_tokens_to_ids(t) for t in SPECIAL}
    text = dict(
        vocab_size=vocab_size or len(tok),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=tie,
        bos_token_id=None,
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|pad|>"],
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    top = dict(
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tie,
    )
    if family == "qwen2_5_vl":
        vision = dict(
            depth=2,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            out_hidden_size=hidden,
            patch_size=14,
            window_size=56,
            fullatt_block_indexes=[1],
        )
        text["rope_parameters"] = {**rope, "mrope_section": [1, 1, 2]}
        config = transformers.Qwen2_5_VLConfig(text_config={**text, **text_kwargs}, vision_config=vision, **top)
        cls = transformers.Qwen2_5_VLForConditionalGeneration
    elif family == "qwen2_vl":
        vision = dict(depth=2, embed_dim=32, num_heads=2, hidden_size=hidden, mlp_ratio=2, patch_size=14)
        text["rope_parameters"] = {**rope, "mrope_section": [1, 1, 2]}
        config = transformers.Qwen2VLConfig(text_config={**text, **text_kwargs}, vision_config=vision, **top)
        cls = transformers.Qwen2VLForConditionalGeneration
    elif family == "qwen3_vl":
        vision = dict(
            depth=2,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            out_hidden_size=hidden,
            patch_size=16,
            deepstack_visual_indexes=[0, 1],
            num_position_embeddings=256,
        )
        text["head_dim"] = hidden // 4
        text["rope_parameters"] = {**rope, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
        config = transformers.Qwen3VLConfig(text_config={**text, **text_kwargs}, vision_config=vision, **top)
        cls = transformers.Qwen3VLForConditionalGeneration
    else:
        raise ValueError(f"unknown family {family}")
    torch.manual_seed(seed)
    model = cls(config)
    # Random init leaves near-uniform outputs; spread the weights so that tests see the effect of masks and positions.
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(6.0 if family != "qwen3_vl" else 4.0)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|pad|>"]
    return model.eval()


def image(seed: int = 0, width: int = 56, height: int = 56) -> Image.Image:
    g = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=g, dtype=torch.uint8).numpy())


def conversation(question: str, n_images: int = 1) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [*({"type": "image"} for _ in range(n_images)), {"type": "text", "text": question}]}
    ]


def byte_level_tokenizer(texts: list[str], special: list[str], **kwargs: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE with Qwen's splitting rule, trained on `texts`: white space and letters merge as in a real
    vocabulary, so that tokens run over the boundary of prompt and response where a text lets them."""
    from tokenizers import Regex, decoders, normalizers, trainers

    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, min_frequency=2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tok.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, **kwargs)
    # as in Qwen's vocabulary, where the marks of reasoning are tokens but no control tokens
    marks = [token for token in special if token in ("<think>", "</think>")]
    fast.add_tokens([token for token in special if token not in marks], special_tokens=True)
    fast.add_tokens(marks)
    return fast
