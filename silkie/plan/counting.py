"""The shape of any image-text model, counted on the weightless model of its config."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from silkie.model.adapters import with_default_targets
from silkie.model.families import check_merges_images, language_model, loaded_from, shell, why_not_packable
from silkie.model.recurrent.layers import count_recurrent
from silkie.model.vision import vision_parameters, vision_parts
from silkie.plan.shapes import Counts, ModelShape

__all__ = ["counted_shape"]

# What transformers' classes raise where a config's numbers do not fit together
_BUILDS_NO_MODEL = (ValueError, AttributeError, TypeError, KeyError, ImportError, NotImplementedError)


def counted_shape(config: Any, remedy: str = "") -> ModelShape:
    """The shape of a transformers config of any image-text model, counted on its weightless model.

    Args:
        remedy: said with the error of a config that builds no model.

    Raises:
        ValueError: silkie cannot train the model, or its config does not build one.
    """
    name = loaded_from(config) or config.model_type
    try:
        model = shell(config)
    except _BUILDS_NO_MODEL as error:
        raise ValueError(_unknown(name, error) + remedy) from error
    check_merges_images(model)
    try:
        if not list(vision_parts(model)):
            raise ValueError("it has no vision tower, so it is no vision-language model")
        return _shape(name, config, model)
    except _BUILDS_NO_MODEL as error:
        raise ValueError(_unknown(name, error)) from error


def _unknown(name: str, error: Exception) -> str:
    return f"The planner cannot tell the sizes of {name}: {' '.join(str(error).split()).rstrip('.')}."


def _shape(name: str, config: Any, model: Any) -> ModelShape:
    text, vision = config.get_text_config(), getattr(config, "vision_config", None) or config
    width, inner, depth = _vision_sizes(model)
    heads = _first(text, "num_attention_heads", "n_heads", "num_heads") or 1
    hidden = model.get_output_embeddings().weight.shape[1]
    patch, windowed = getattr(vision, "patch_size", None) or 14, config.model_type in ("qwen2_5_vl",)
    return ModelShape(
        name=name,
        hidden=hidden,
        intermediate=_first(text, "intermediate_size", "moe_intermediate_size", "ffn_hidden_size") or 4 * hidden,
        layers=len(decoder_layers(model)),
        heads=heads,
        kv_heads=_first(text, "num_key_value_heads") or heads,
        head_dim=_first(text, "head_dim") or hidden // heads,
        vocab=model.get_output_embeddings().weight.shape[0],
        tied=model.get_input_embeddings().weight is model.get_output_embeddings().weight,
        vision_hidden=width,
        vision_intermediate=inner,
        vision_layers=depth,
        vision_gated=windowed,
        vision_window=getattr(vision, "window_size", None) if windowed else None,
        patch=int(patch if isinstance(patch, int) else patch[0]),  # InternVL gives height and width
        merge=int(getattr(vision, "spatial_merge_size", 2)),
        attention_bias=config.model_type in ("qwen2_vl", "qwen2_5_vl"),
        counts=count_parts(config, model),
        unpackable=why_not_packable(config, try_out=False),
    )


def count_parts(config: Any, model: Any) -> Counts:
    """The counts of a weightless model."""
    layers, chosen = decoder_layers(model), _chosen_experts(config.get_text_config())
    counts = Counts(
        parameters=sum(p.numel() for p in model.parameters()),
        vision=sum(p.numel() for p in {id(p): p for p in vision_parameters(model)}.values()),
        head=model.get_output_embeddings().weight.numel(),
        largest_layer=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
        active=round(sum(_active(layer, chosen) for layer in layers)),
        kept=round(sum(_kept(layer, chosen) for layer in layers)),
        lora=0,
        attending=len(layers) - count_recurrent(config),
    )
    return replace(counts, lora=_lora_per_rank(model))  # last, since it changes the model


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers of the text decoder: its longest list of modules.

    Raises:
        ValueError: it has none.
    """
    lists = [m for m in language_model(model).modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise ValueError("its text decoder has no list of layers")
    weights = [sum(p.numel() for p in found.parameters()) for found in lists]
    return list(lists[weights.index(max(weights))])


def _chosen_experts(text: Any) -> int:
    return _first(text, "num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "moe_top_k") or 1


def _weights(layer: nn.Module, chosen: int) -> Iterator[tuple[nn.Module, int, int, float]]:
    """Module, input width, output width and times used per token of every matrix of a layer: linear layers, and stacked
    experts, of which a token passes `chosen`."""
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            yield module, module.in_features, module.out_features, 1.0
        elif not isinstance(module, nn.modules.conv._ConvNd):
            for weight in module.parameters(recurse=False):
                if weight.dim() == 3 and min(weight.shape) > 1:
                    yield module, weight.shape[2], weight.shape[1], min(chosen, weight.shape[0])


def _active(layer: nn.Module, chosen: int) -> float:
    return sum(wide * out * times for _, wide, out, times in _weights(layer, chosen))


def _kept(layer: nn.Module, chosen: int) -> float:
    """The outputs of matrices that lead inside, the inputs of those that lead out; a gated product is two more than
    what its matrices show: the activation of the gate besides gate, up and product."""
    matrices = list(_weights(layer, chosen))
    hidden = Counter(wide for _, wide, _, _ in matrices).most_common(1)[0][0]
    total = 0.0
    for _, wide, out, times in matrices:
        gated = out == hidden and sum(o in (wide, 2 * wide) for _, i, o, _ in matrices if i == hidden) > 0
        mlp = gated and wide > hidden
        total += times * ((out if out != hidden else 0) + (wide * (2 if mlp else 1) if wide != hidden else 0))
    return total + sum(out * times for _, wide, out, times in matrices if wide == out == hidden)


def _lora_per_rank(model: Any) -> int:
    """Asked of peft, which gives the fused experts of some mixtures twice the rank. The adapter stays on the model."""
    config = with_default_targets(LoraConfig(r=1), model)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def _vision_sizes(model: Any) -> tuple[int, int, int]:
    """Width, inner width and layers of the vision tower: those of its longest list of blocks with linear layers (a
    decoder of pictures beside it, as Janus has, is made of convolutions)."""
    towers = [part for _, part in vision_parts(model) if isinstance(part, nn.Module)]
    lists = [m for tower in towers for m in tower.modules() if isinstance(m, nn.ModuleList) and _has_linear(m)]
    blocks = max(lists, key=len, default=None)
    linear = [m for m in (blocks or nn.ModuleList(towers)).modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ValueError("its vision tower has no linear layers")
    width = Counter(m.in_features for m in linear).most_common(1)[0][0]
    inner = [m.out_features for m in linear if m.in_features == width and m.out_features % width]
    wide = [m.in_features for m in linear if m.out_features == width and m.in_features != width]
    return width, (wide or inner or [4 * width])[0], len(blocks) if blocks is not None else 1


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(m, nn.Linear) for m in module.modules())


def _first(config: Any, *names: str) -> int | None:
    """The first of these fields that is a positive number; a field with a value per layer gives its largest."""
    fields = {key: value for key, value in config.to_dict().items() if value is not None}
    for name in names:
        value = fields.get(config.attribute_map.get(name, name))
        if isinstance(value, (list, tuple)):
            value = max((v for v in value if isinstance(v, int)), default=None)
        if isinstance(value, int) and value > 0:
            return value
    return None
