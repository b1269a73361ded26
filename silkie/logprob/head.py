"""The weight an output head really applies: plain, LoRA-wrapped, trained in full by peft, or sharded.

Call these inside the head's own forward, where ZeRO-3 and FSDP2 have already gathered the module's parameters, so that a sharded head
is gathered once per pass and its gradient goes back through the framework's hooks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class HeadWeight(NamedTuple):
    """weight [V, D] and bias [V] or None, of one dtype, differentiable in whatever trains."""

    weight: Tensor
    bias: Tensor | None


class HeadOptions(NamedTuple):
    """Keyword arguments of `linear_logprob` that a model's config sets."""

    softcap: float | None
    logit_scale: float


def head_weight(module: nn.Module) -> HeadWeight:
    """The effective weight and bias of an output head.

    Handles `nn.Linear` and layers like it, peft's LoRA linear layer (base + scaling * B @ A for the active adapters; the base alone while
    adapters are disabled or already merged), peft's `modules_to_save` copy, DTensor parameters (FSDP2: `full_tensor`) and ZeRO-3
    parameters gathered by the module's hooks.

    Raises:
        ValueError: a parameter is still partitioned, the weight is quantised, or the adapter cannot be written as a weight (a LoRA variant
            such as DoRA, or active LoRA dropout).
    """
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        return head_weight(_saved_copy(module))
    if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
        return _lora_weight(module)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"head_weight: {type(module).__name__} has no weight; expected an nn.Linear, or a peft wrapper of one")
    bias = getattr(module, "bias", None)
    return HeadWeight(_full(weight, module), None if bias is None else _full(bias, module))


def head_options(config: Any) -> HeadOptions:
    """Soft-cap and logit scale that a transformers config asks for; a vision-language config keeps them in its text config.

    Soft-cap: `final_logit_softcapping` (Gemma). Scale: `logit_scale` (Cohere), `output_multiplier` (Muse), `lm_head_multiplier`
    (Falcon-H1), or `logits_scaling`, which Granite divides by and HyperCLOVA X multiplies by.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    softcap = getattr(text, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(text, name, None)
        if scale is not None:
            return HeadOptions(softcap, float(scale))
    scaling = getattr(text, "logits_scaling", None)
    if scaling is None:
        return HeadOptions(softcap, 1.0)
    return HeadOptions(softcap, float(scaling) if getattr(text, "model_type", "") == "hyperclovax" else 1.0 / float(scaling))


def _saved_copy(wrapper: nn.Module) -> nn.Module:
    """The module a `ModulesToSaveWrapper` runs: the trained copy of its active adapter, or the original while adapters are off."""
    active = list(wrapper.active_adapters)  # type: ignore[arg-type]
    if wrapper.disable_adapters or not active or active[0] not in wrapper.modules_to_save:  # type: ignore[operator]
        return wrapper.original_module  # type: ignore[return-value]
    return wrapper.modules_to_save[active[0]]  # type: ignore[index,return-value]


def _lora_weight(module: Any) -> HeadWeight:
    """W + sum over active adapters of scaling * B @ A.

    A and B are read by calling the adapter's own layers on an identity matrix, so that sharding hooks on those layers run.
    """
    weight, bias = head_weight(module.get_base_layer())
    if module.disable_adapters or module.merged:
        if module.disable_adapters and module.merged:
            raise ValueError("head_weight: adapters are disabled but still merged into the head; call `unmerge_adapter()` first")
        return HeadWeight(weight, bias)
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        if name in getattr(module, "lora_variant", {}):
            raise ValueError(
                f"head_weight: adapter {name!r} on the output head is a LoRA variant (such as DoRA); set use_fused_logprob=False"
            )
        dropout = module.lora_dropout[name]
        if isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training:
            raise ValueError(
                f"head_weight: adapter {name!r} applies dropout {dropout.p} before the output head, which no weight can express; "
                "set lora_dropout=0 or use_fused_logprob=False"
            )
        down, up, scaling = module.lora_A[name], module.lora_B[name], module.scaling[name]
        probe = torch.eye(weight.shape[1] + 1, weight.shape[1], dtype=down.weight.dtype, device=weight.device)
        rows = up(down(probe)) * scaling  # [D + 1, V]: the transposed product, and the adapter's bias in the last row
        if up.bias is not None:
            offset = rows[-1]
            rows = rows - offset
            bias = offset.to(weight.dtype) if bias is None else (bias + offset).to(weight.dtype)
        weight = (weight + rows[:-1].t()).to(weight.dtype)
    return HeadWeight(weight, bias)


def _full(parameter: Tensor, module: nn.Module) -> Tensor:
    """The whole parameter, checked."""
    if hasattr(parameter, "quant_state") or not parameter.is_floating_point():
        raise ValueError(
            f"head_weight: the output head ({type(module).__name__}) is quantised; keep it in full precision "
            "(`llm_int8_skip_modules=['lm_head']`) or set use_fused_logprob=False"
        )
    if hasattr(parameter, "ds_id") and getattr(getattr(parameter, "ds_status", None), "name", "AVAILABLE") != "AVAILABLE":
        raise ValueError(
            "head_weight: the output head is still partitioned by ZeRO-3; read it inside the head module's own forward, "
            "or under deepspeed.zero.GatheredParameters"
        )
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor()
    return parameter
