"""Which layers of a language model are checkpointed: the first ones.

The backward pass starts at the last layer. What the layers that are not checkpointed keep is released before the first
of the checkpointed ones is computed again, so the two never take memory at the same time."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from silkie.model.families import language_model


def checkpointable_layers(model: Any) -> list[nn.Module]:
    """The layers of the text decoder that transformers can checkpoint, in order; empty where it cannot tell them
    apart."""
    try:
        decoder = language_model(model)
    except ValueError:
        return []
    return [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)]


def checkpoint_first(model: Any, count: int) -> None:
    """Checkpoints the first `count` layers of the text decoder and no other, once transformers has turned checkpointing
    on."""
    for n, layer in enumerate(checkpointable_layers(model)):
        layer.gradient_checkpointing = n < count  # type: ignore[assignment]
