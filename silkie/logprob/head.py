"""The operands an output head really multiplies: plain, LoRA-wrapped, trained in full by peft, or sharded.

Call `head_operands` inside the head's own forward, where ZeRO-3 and FSDP2 have already gathered the module's
parameters: a sharded head is then gathered once per pass, and its gradient goes back through the framework's hooks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class HeadOperands(NamedTuple):
    """hidden [N, D], weight [V, D] and bias [V] or None, of one dtype, differentiable in whatever trains.

    `hidden @ weight.T + bias` are the head's raw logits. Under an active LoRA adapter of rank r, D is the hidden size +
    r."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class HeadOptions(NamedTuple):
    """Keyword arguments of `linear_logprob` that a model's config sets."""

    softcap: float | None
    logit_scale: float


def head_operands(module: nn.Module, hidden: Tensor) -> HeadOperands:
    """What `linear_logprob` needs to score hidden states [N, D] with an output head.

    Handles `nn.Linear` and layers like it, peft's LoRA linear layer, peft's `modules_to_save` copy, DTensor parameters
    (FSDP2: `full_tensor`) and ZeRO-3 parameters gathered by the module's hooks. An active LoRA adapter becomes r
    further columns, `[h, scaling * A h]` against `[W, B]`: exact, where adding B @ A to a bf16 W would round a young
    adapter away. Disabled or merged adapters leave the base.

    Raises:
        ValueError: a parameter is still partitioned, the weight is quantised, or the adapter is a LoRA variant (such as
            DoRA).
    """
    # By what they have and not by class: this room knows torch only, and peft need not be installed.
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        return head_operands(_saved_copy(module), hidden)
    if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
        return _lora_operands(module, hidden)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"head_operands: {type(module).__name__} has no weight; expected an nn.Linear, or a peft wrapper of one"
        )
    bias = getattr(module, "bias", None)
    return HeadOperands(hidden, _full(weight, module), None if bias is None else _full(bias, module))


def head_options(config: Any) -> HeadOptions:
    """Soft-cap and logit scale that a transformers config asks for; a vision-language config keeps them in its text
    config.

    Soft-cap: `final_logit_softcapping` (Gemma). Scale: `logit_scale` (Cohere), `output_multiplier` (Muse),
    `lm_head_multiplier` (Falcon-H1), or `logits_scaling`, which Granite divides by and HyperCLOVA X multiplies by."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    softcap = getattr(text, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(text, name, None)
        if scale is not None:
            return HeadOptions(softcap, float(scale))
    scaling = getattr(text, "logits_scaling", None)
    if scaling is None:
        return HeadOptions(softcap, 1.0)
    return HeadOptions(
        softcap, float(scaling) if getattr(text, "model_type", "") == "hyperclovax" else 1.0 / float(scaling)
    )


def _saved_copy(wrapper: nn.Module) -> nn.Module:
    """The module a `ModulesToSaveWrapper` runs: the trained copy of its active adapter, or the original while adapters
    are off."""
    active = list(wrapper.active_adapters)  # type: ignore[arg-type]
    if wrapper.disable_adapters or not active or active[0] not in wrapper.modules_to_save:  # type: ignore[operator]
        return wrapper.original_module  # type: ignore[return-value]
    return wrapper.modules_to_save[active[0]]  # type: ignore[index,return-value]


def _lora_operands(module: Any, hidden: Tensor) -> HeadOperands:
    """B is read by calling the adapter's own layer on an identity matrix, so that sharding hooks on that layer run."""
    plain = head_operands(module.get_base_layer(), hidden)
    if module.disable_adapters or module.merged:
        if module.disable_adapters and module.merged:
            raise ValueError(
                "head_operands: adapters are disabled but still merged into the head; call `unmerge_adapter()` first"
            )
        return plain
    inputs, columns, bias = [hidden], [plain.weight], plain.bias
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        if name in getattr(module, "lora_variant", {}):
            raise ValueError(
                f"head_operands: adapter {name!r} on the head is a LoRA variant (such as DoRA); set"
                " use_fused_logprob=False"
            )
        down, up = module.lora_A[name], module.lora_B[name]
        dtype = down.weight.dtype
        inputs.append((down(module.lora_dropout[name](hidden.to(dtype))) * module.scaling[name]).to(hidden.dtype))
        rank = module.r[name]
        # [r + 1, V]: B transposed, and in the last row its bias
        rows = up(torch.eye(rank + 1, rank, dtype=dtype, device=hidden.device))
        if up.bias is not None:
            offset = rows[-1] * module.scaling[name]
            bias = offset.to(hidden.dtype) if bias is None else (bias + offset).to(bias.dtype)
            rows = rows - rows[-1]
        columns.append(rows[:-1].t().to(plain.weight.dtype))
    return HeadOperands(torch.cat(inputs, 1), torch.cat(columns, 1), bias)


def _full(parameter: Tensor, module: nn.Module) -> Tensor:
    """The whole parameter, checked."""
    if hasattr(parameter, "quant_state") or not parameter.is_floating_point():
        raise ValueError(
            f"head_operands: the output head ({type(module).__name__}) is quantised; keep it in full precision "
            "(`llm_int8_skip_modules=['lm_head']`) or set use_fused_logprob=False"
        )
    if (
        hasattr(parameter, "ds_id")
        and getattr(getattr(parameter, "ds_status", None), "name", "AVAILABLE") != "AVAILABLE"
    ):
        raise ValueError(
            "head_operands: the output head is still partitioned by ZeRO-3; read it inside the head module's own"
            " forward, or under deepspeed.zero.GatheredParameters"
        )
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor()
    return parameter
