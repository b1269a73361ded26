"""The transformers model under a policy's wrappers, what it is made of, and the few families with a quirk of their own.

What a model can do is asked of the model: its masks in `silkie.model.attention`, its positions in
`silkie.model.positions`, its vision parts in `silkie.model.vision`, its linear layers in `silkie.model.adapters`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import nn
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from silkie.model.recurrent import CALLS, Calls, mask_kinds, why_not_forkable
from silkie.model.weightless import weightless

logger = logging.getLogger(__name__)

# Layers whose mask says everything about what a token sees; recurrent ones are `silkie.model.recurrent`'s.
PACKABLE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What a model type does that cannot be asked of its config, processor or forward.

    Attributes:
        first_position: position of the first prompt token.
        response_types: token input -> its value within a response, where that differs from other text.
        suffix: the processor takes the response apart from the prompt, as `suffix`.
    """

    first_position: int = 0
    suffix: bool = False
    response_types: Mapping[str, int] = field(default_factory=dict)


_PLAIN = Family()
FAMILIES: dict[str, Family] = {
    # Positions start at one; the processor gives type 1 to a text passed as `suffix`, and the prompt before it is
    # bidirectional
    "paligemma": Family(first_position=1, suffix=True, response_types={"token_type_ids": 1}),
}


def family_of(config: PretrainedConfig) -> Family:
    """The quirks of a model type; most have none."""
    return FAMILIES.get(config.model_type, _PLAIN)


def causal_lm(model: Any) -> PreTrainedModel:
    """The transformers model under peft and distributed wrappers (the one that owns the output head)."""
    while not isinstance(model, PreTrainedModel):
        model = model.get_base_model() if isinstance(model, PeftModel) else model.module
    return model


def backbone(model: Any) -> Any:
    """The module under the output head: it merges image features into the text and runs the language model."""
    return causal_lm(model).base_model


def language_model(model: Any) -> nn.Module:
    """The text decoder.

    Raises:
        ValueError: the model does not tell its decoder from its other parts.
    """
    base: Any = causal_lm(model)
    inner = backbone(base)
    decoder, head, text = base.get_decoder(), base.get_output_embeddings(), base.config.get_text_config()
    above = [base, inner]
    if decoder not in above and any(m is head for m in decoder.modules()):
        above.append(decoder)  # a causal language model as a whole (Llama 4)
    if decoder in above:
        # not under one of transformers' usual names: the module that runs on the text config
        found = [m for m in decoder.modules() if isinstance(m, PreTrainedModel) and m not in above]
        decoder = next((m for m in found if m.config is text or m.config.model_type == text.model_type), decoder)
    if decoder is inner and not reads_images(base.config):
        return inner  # a language model is its own text decoder
    if decoder in above:
        raise ValueError(f"{type(base).__name__} keeps its text decoder in no module: silkie cannot train it.")
    return decoder


def shell(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config without weights (on the meta device): its structure can be asked before it is loaded.

    Raises:
        ValueError: transformers has no class for the config.
    """
    names = getattr(config, "architectures", None) or []
    cls: Any = getattr(transformers, names[0], None) if names else None
    if cls is None:
        cls = _image_text_class(config)
        if cls is None:
            raise ValueError(f"transformers has no image-text-to-text class for {config.model_type!r}.")
    with weightless():
        return cls(copy.deepcopy(config))


def reads_images(config: PretrainedConfig) -> bool:
    """Whether transformers has a class for this config that reads images."""
    return _image_text_class(config) is not None


def _image_text_class(config: PretrainedConfig) -> Any:
    """transformers' class for models of this config that read images and write text; None where it has none. Private:
    the public way to it loads a model."""
    mapping: Any = AutoModelForImageTextToText._model_mapping
    return mapping.get(type(config), None)


def loaded_from(config: PretrainedConfig) -> str:
    """The directory or hub name that a config was loaded from; empty where there is none. Private in transformers."""
    return str(config._name_or_path or "")


def attention_implementation(config: PretrainedConfig) -> str:
    """The name of the attention that a model of this config runs. Private: there is a public setter only."""
    return str(config._attn_implementation)


def check_merges_images(model: Any) -> None:
    """Whether a model puts image features in the place of image tokens, which is what silkie hands to it.

    Raises:
        ValueError: it reads images in another way (cross-attention as in Mllama, image tokens of a codebook).
    """
    base = causal_lm(model)
    name = type(base).__name__
    if base.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model: silkie trains decoders that continue their prompt.")
    if reads_images(base.config) and not hasattr(backbone(model), "get_image_features"):
        raise ValueError(
            f"{name} does not merge image features into its text (it has no get_image_features): silkie cannot"
            " train it."
        )
    if base.get_output_embeddings() is None:
        raise ValueError(
            f"{name} does not name its output head (get_output_embeddings gives None): silkie cannot train it."
        )


def why_not_packable(
    config: PretrainedConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    calls: Calls = CALLS,
    try_out: bool = True,
) -> str | None:
    """The reason why a model must train in the `rows` layout, or None where nothing that it is made of speaks against
    packing (the self-test has the last word).

    Args:
        device, dtype: of the run; recurrent layers are tried out there.
        calls: of a recurrent mixer in a forward pass of the run.
        try_out: False: recurrent layers are looked at, not run, which takes seconds.
    """
    attention, _ = mask_kinds(config)
    if other := attention - PACKABLE_LAYERS:
        return f"{config.model_type} has {', '.join(sorted(other))} layers, which no mask of silkie keeps apart"
    if (top := getattr(config.get_text_config(), "index_topk", None)) is not None:
        return f"{config.model_type} has an indexer that picks {top} keys along the row, siblings among them"
    # recurrent layers last, because the question runs a mixer
    return why_not_forkable(config, torch.device(device), dtype, calls=calls, try_out=try_out)


def layer_types(config: PretrainedConfig) -> set[str]:
    """Attention types of the language model's layers."""
    return set(getattr(config.get_text_config(), "layer_types", None) or ["full_attention"])


def keep_used_conversions(model: Any) -> None:
    """Makes a model that was loaded under ZeRO-3 save its weights under the names they were loaded from.

    Saving reverses the renamings of loading. transformers' ordinary loader remembers those that the files needed, its
    ZeRO-3 loader all of the family's, among them a prefix that only other versions' files lack.
    """
    base: Any = causal_lm(model)
    if conversions := getattr(base, "_weight_conversions", None):
        base._weight_conversions = [conversion for conversion in conversions if conversion.was_used()]
