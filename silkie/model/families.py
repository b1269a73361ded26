"""What differs between VLM families: where the vision tower is, how positions are made, which tokens see each other in
both directions."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from silkie.model.recurrent import mask_kinds, why_not_forkable

logger = logging.getLogger(__name__)

PACKABLE_LAYERS = {"full_attention", "sliding_attention"}  # besides recurrent ones that can be forked
LANGUAGE_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One VLM family.

    Attributes:
        vision: names of the modules and parameters, under the base model, that turn pixels into features.
        first_position: position of the first prompt token.
        two_way: which prompt tokens attend in both directions: "none", the tokens of one "image", or the whole "prefix"
            (prompt).
        dict_mask: whether the text model takes one mask per layer type as a dict.
        token_types: name of the per-token input that the model wants besides ids (None: it wants none when positions
            are given).
    """

    vision: tuple[str, ...]
    first_position: int = 0
    two_way: Literal["none", "image", "prefix"] = "none"
    dict_mask: bool = True
    token_types: str | None = None


_QWEN = Family(vision=("visual",))
_LLAVA = Family(vision=("vision_tower", "multi_modal_projector", "image_newline"))
_IDEFICS = Family(vision=("vision_model", "connector"))

# Families on which packed = separate is tested. Others train in the `rows` layout.
FAMILIES: dict[str, Family] = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_5": _QWEN,
    "llava_onevision": _LLAVA,
    "internvl": _LLAVA,
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "gemma3": Family(vision=("vision_tower", "multi_modal_projector"), two_way="image", token_types="token_type_ids"),
    "paligemma": Family(
        vision=("vision_tower", "multi_modal_projector"),
        first_position=1,
        two_way="prefix",
        dict_mask=False,
        token_types="token_type_ids",
    ),
}
_UNKNOWN = Family(vision=("visual", "vision_tower", "vision_model", "multi_modal_projector", "connector"))


def causal_lm(model: Any) -> PreTrainedModel:
    """The transformers model under peft and distributed wrappers (the one that owns the output head)."""
    while not isinstance(model, PreTrainedModel):
        model = model.get_base_model() if isinstance(model, PeftModel) else model.module
    return model


def backbone(model: Any) -> Any:
    """The module under the output head: it merges image features into the text and runs the language model."""
    return causal_lm(model).base_model


def check_merges_images(model: Any) -> None:
    """Whether a model puts image features in the place of image tokens, which is what silkie hands to it.

    Raises:
        ValueError: it reads images in another way (cross-attention as in Mllama, image tokens of a codebook).
    """
    if not hasattr(backbone(model), "get_image_features"):
        name = type(causal_lm(model)).__name__
        raise ValueError(
            f"{name} does not merge image features into its text (it has no get_image_features): silkie cannot"
            " train it."
        )


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model config; a permissive default for families that silkie does not list."""
    return FAMILIES.get(config.model_type, _UNKNOWN)


def why_not_packable(
    config: PretrainedConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> str | None:
    """The reason why a model must train in the `rows` layout, or None where packing is exact.

    Args:
        device, dtype: of the run; recurrent layers are tried out there.
    """
    layers, _ = mask_kinds(config)
    if other := layers - PACKABLE_LAYERS:
        return f"{config.model_type} has {', '.join(sorted(other))} layers, which no mask of silkie keeps apart"
    if config.model_type not in FAMILIES:
        return f"model type {config.model_type!r} is not among the tested families ({', '.join(FAMILIES)})"
    if "sliding_attention" in layers and not family_of(config).dict_mask:
        return f"{config.model_type} with sliding-window layers takes no mask per layer type"
    # recurrent layers: one question to silkie.model.recurrent, last because it runs a mixer
    return why_not_forkable(config, torch.device(device), dtype)


def layer_types(config: PretrainedConfig) -> set[str]:
    """Attention types of the language model's layers."""
    return set(getattr(config.get_text_config(), "layer_types", None) or ["full_attention"])


def sliding_window(config: PretrainedConfig) -> int | None:
    """Window of the sliding layers in tokens, None where no layer slides."""
    return config.get_text_config().sliding_window if "sliding_attention" in layer_types(config) else None


def vision_parts(model: Any) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    """The modules and parameters of a model that turn pixels into features."""
    inner = backbone(model)
    for name in family_of(causal_lm(model).config).vision:
        if isinstance(part := getattr(inner, name, None), (nn.Module, nn.Parameter)):
            yield name, part


def vision_parameters(model: Any) -> list[nn.Parameter]:
    """All parameters of the vision tower and its projector, adapters included."""
    return [
        p for _, part in vision_parts(model) for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())
    ]


def vision_is_frozen(model: Any) -> bool:
    """Whether no parameter of the vision tower or its projector trains."""
    return not any(p.requires_grad for p in vision_parameters(model))


def freeze_vision(model: Any) -> None:
    """Takes the vision tower and its projector out of training."""
    for parameter in vision_parameters(model):
        parameter.requires_grad_(False)


def unhook_vision(base: PreTrainedModel) -> None:
    """Removes the hooks that gradient checkpointing puts on the input embeddings of a frozen vision tower, which would
    back-propagate it for nothing."""
    for _, part in vision_parts(base):
        for module in part.modules() if isinstance(part, nn.Module) else ():
            for key, hook in list(module._forward_hooks.items()):
                if "make_inputs_require_grad" in getattr(hook, "__qualname__", ""):
                    del module._forward_hooks[key]


def default_lora_targets(config: PretrainedConfig) -> str:
    """Regular expression of the language model's attention and MLP projections (not the vision tower's modules of the
    same name)."""
    skip = "|".join(family_of(config).vision)
    return rf"^(?!.*\b(?:{skip})\b).*\.({'|'.join(LANGUAGE_PROJECTIONS)})$"


def with_default_targets(peft_config: PeftConfig, config: PretrainedConfig) -> PeftConfig:
    """`peft_config` with the language model's projections as targets where it names none."""
    if isinstance(peft_config, LoraConfig) and not peft_config.target_modules and not peft_config.target_parameters:
        # the caller's own stays as it is: on a model of another family these targets would hit the vision tower
        peft_config = copy.copy(peft_config)
        peft_config.target_modules = default_lora_targets(config)
        logger.info("LoRA targets: the attention and MLP projections of the language model")
    return peft_config


def unquantized_modules(config: PretrainedConfig) -> list[str]:
    """Modules that bitsandbytes must leave alone: the vision tower (it is small, and its features feed every token) and
    the output head."""
    # transformers matches these names from the start of a module's path, and the backbone is called `model` in every
    # family
    return [*(f"model.{name}" for name in family_of(config).vision), "lm_head"]


def keep_used_conversions(model: Any) -> None:
    """Makes a model that was loaded under ZeRO-3 save its weights under the names they were loaded from.

    Saving reverses the renamings of loading. transformers' ordinary loader remembers those that the files needed, its
    ZeRO-3 loader all of the family's, among them a prefix that only other versions' files lack.
    """
    base: Any = causal_lm(model)
    if conversions := getattr(base, "_weight_conversions", None):
        base._weight_conversions = [conversion for conversion in conversions if conversion.was_used()]


class PromptPositions:
    """Rotary positions of prompts, computed on the CPU by the model's own rule without its weights (so that data
    workers can do it).

    Args:
        model: the policy, wrapped or not. Only its class and config are kept.
    """

    def __init__(self, model: Any) -> None:
        inner = backbone(model)
        config = causal_lm(model).config
        self.first = family_of(config).first_position
        self.channels = 1
        self._rule = None
        if hasattr(type(inner), "get_rope_index"):
            # Qwen's rule reads nothing but the config, so a shell without weights can run it.
            shell = object.__new__(type(inner))
            object.__setattr__(shell, "config", inner.config)
            self._rule = shell
            self.channels = 3

    def __call__(self, prompt_ids: Tensor, token_types: Tensor, vision: dict[str, Tensor]) -> Tensor:
        """[C, L] positions of a prompt with token types [L] and the image tensors of its group."""
        if self._rule is None or "image_grid_thw" not in vision:
            steps = torch.arange(self.first, self.first + len(prompt_ids))
            return steps.expand(self.channels, -1)
        positions, _ = type(self._rule).get_rope_index(
            self._rule,
            prompt_ids[None],
            mm_token_type_ids=token_types[None].int(),
            image_grid_thw=vision["image_grid_thw"],
        )
        return positions[:, 0]
