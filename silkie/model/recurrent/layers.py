"""Which layers of a language model are recurrent, and which modules mix tokens in them. Asked of transformers and of
the modules themselves, never looked up by name of a model.

A mixer is a module that keeps convolution or recurrent states in transformers' cache. It can be forked where its
forward takes `hidden_states`, `attention_mask` and the cache; whether it then computes the right thing is found out by
`silkie.model.recurrent.probe`.
"""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any

from torch import nn
from transformers import PretrainedConfig
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, create_recurrent_attention_mask

_STORES = {"update_conv_state", "update_recurrent_state"}  # methods of transformers' cache that only mixers call
_TOKEN_WISE = {"moe", "mlp", "dense", "sparse"}  # layers of Nemotron-H and others that mix no tokens, and take no mask
_CACHES = ("cache", "cache_params", "past_key_values")  # what mixers call their cache; transformers 5.24 on: the first


def mask_kinds(config: PretrainedConfig) -> tuple[set[str], set[str]]:
    """Under which names the layers of a language model look their mask up: (attention, recurrent). A parallel hybrid
    layer asks for one of each."""
    attention: set[str] = set()
    recurrent: set[str] = set()
    for layer in _layers(config):
        for name, function in _masks(layer).items():
            (recurrent if function is create_recurrent_attention_mask else attention).add(name)
    return attention, recurrent


def count_recurrent(config: PretrainedConfig) -> int:
    """Layers of a language model that are recurrent, in whole or in part."""
    return sum(create_recurrent_attention_mask in _masks(layer).values() for layer in _layers(config))


def _layers(config: PretrainedConfig) -> list[str]:
    """The type of each layer."""
    return list(getattr(config.get_text_config(), "layer_types", None) or ["full_attention"])


def _masks(layer: str) -> dict[str, Any]:
    """Name of a mask -> transformers' function that makes it (None: it knows no such layer)."""
    if layer in _TOKEN_WISE:
        return {}
    functions = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING.get(layer)
    return functions if isinstance(functions, dict) else {layer: functions}


def mixers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the recurrent mixers that a fork can run.

    Raises:
        ValueError: a module keeps states and cannot be run apart from its row.
    """
    found = []
    for name, module in model.named_modules():
        if keeps_states(type(module)):
            if reason := why_not_a_mixer(type(module)):
                raise ValueError(reason)
            found.append((name, module))
    return found


def keeps_states(module: type[nn.Module]) -> bool:
    """Whether a method of a class of modules stores convolution or recurrent states in a cache."""
    functions = [f for base in module.__mro__ if base is not nn.Module for f in vars(base).values()]
    return any(_STORES & set(inspect.unwrap(f).__code__.co_names) for f in functions if isinstance(f, FunctionType))


def why_not_a_mixer(module: type[nn.Module]) -> str | None:
    """The reason why the forward of a module that keeps states cannot be given prompts and responses apart, or None."""
    parameters = inspect.signature(module.forward).parameters
    missing = [name for name in ("hidden_states", "attention_mask") if name not in parameters]
    missing += [] if any(name in parameters for name in _CACHES) else ["a cache"]
    return (
        f"{module.__name__} keeps states along a row, and its forward does not take {missing[0]}" if missing else None
    )


def cache_argument(mixer: type[nn.Module]) -> str:
    """What a mixer's forward calls its cache."""
    parameters: Any = inspect.signature(mixer.forward).parameters
    return next(name for name in _CACHES if name in parameters)
