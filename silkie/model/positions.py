"""Rotary positions of prompts by the model's own rule."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from silkie.model.families import backbone, causal_lm, family_of


class PromptPositions:
    """Rotary positions of prompts, computed on the CPU by the model's own rule without its weights (so that data
    workers can do it).

    Args:
        model: the policy, wrapped or not. Only its class, config and plain attributes are kept.
    """

    def __init__(self, model: Any) -> None:
        inner = backbone(model)
        config = causal_lm(model).config
        family = family_of(config)
        self.first = family.first_position
        self.response_types = dict(family.response_types)
        self.channels = 1
        self._rule = None
        if hasattr(type(inner), "get_rope_index"):
            self._rule = _without_weights(inner)
            self.channels = _channels(config)

    def __call__(self, prompt_ids: Tensor, token_inputs: Mapping[str, Tensor], vision: Mapping[str, Any]) -> Tensor:
        """[C, L] positions of a prompt with its per-token inputs [L] and the image tensors of its group."""
        if self._rule is None or not vision:
            steps = torch.arange(self.first, self.first + len(prompt_ids))
            return steps.expand(self.channels, -1)
        rule = type(self._rule).get_rope_index
        given = {
            "input_ids": prompt_ids[None],
            "attention_mask": torch.ones_like(prompt_ids)[None],
            **{name: value[None] for name, value in token_inputs.items()},
            **vision,
        }
        wanted = [p for p in inspect.signature(rule).parameters if p in given]
        positions, _ = rule(self._rule, **{name: given[name] for name in wanted})
        return positions[:, 0]


def _without_weights(inner: Any) -> Any:
    """An object of the model's class with its config and plain attributes, without parameters and modules."""
    # Not the model itself: workers get a copy of the collator, and would get one of its weights.
    out = object.__new__(type(inner))
    for name, value in vars(inner).items():
        if name in ("config", "training") or isinstance(value, (int, float, str, bool, tuple)):
            object.__setattr__(out, name, value)
    return out


def _channels(config: Any) -> int:
    """Axes of the rotary positions of a model that has a rule for them: time, height, width; HunYuan has one more."""
    text = config.get_text_config()
    sections = (getattr(text, "rope_parameters", None) or {}).get("mrope_section")
    return max(3, len(sections)) if sections else 3
