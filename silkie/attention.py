"""How a batch's visibility rule reaches the model's attention layers.

"sdpa" and "eager" take a dense [B, 1, T, T] mask (boolean and float). "flex" and "varlen" skip what is masked and allow many groups per row;
they are registered under names of their own through transformers' `AttentionInterface`. In the `rows` layout the model's ordinary causal path runs.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from silkie.models import family_of, layer_types, sliding_window
from silkie.packing import PROMPT_SEGMENT, visible

logger = logging.getLogger(__name__)

Backend = Literal["sdpa", "eager"]
BACKENDS: tuple[Backend, ...] = ("sdpa", "eager")


@dataclass(slots=True, frozen=True, kw_only=True)
class Attention:
    """Makes the mask arguments of a batch.

    Attributes:
        backend: attention implementation of the language model.
        layout: "packed" builds the group mask; "rows" leaves masking to the model (2-D padding mask).
    """

    backend: Backend
    layout: Literal["packed", "rows"]

    def inputs(self, config: PretrainedConfig, batch: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of the model's forward: `attention_mask`."""
        if self.layout == "rows":
            return {"attention_mask": (batch["segment_ids"] >= 0).long()}
        two_way = _two_way_blocks(config, batch)
        masks = {
            kind: self._dense(
                visible(
                    batch["group_ids"],
                    batch["segment_ids"],
                    batch["logical_positions"],
                    window=sliding_window(config) if kind == "sliding_attention" else None,
                    bidirectional=two_way,
                )
            )
            for kind in sorted(layer_types(config))
        }
        if family_of(config).dict_mask and "sliding_attention" in masks:
            return {"attention_mask": masks}
        return {"attention_mask": masks["full_attention"]}

    def _dense(self, mask: Tensor) -> Tensor:
        if self.backend == "sdpa":
            return mask
        # eager attention adds the mask to the scores: a boolean one would add 0 and 1
        return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)


def _two_way_blocks(config: PretrainedConfig, batch: dict[str, Any]) -> Tensor | None:
    """[B, T] block numbers of tokens that see each other in both directions, -1 elsewhere."""
    kind = family_of(config).two_way
    if kind == "none":
        return None
    if kind == "prefix":
        return torch.where(batch["segment_ids"] == PROMPT_SEGMENT, 0, -1)
    image = batch["token_types"] == 1
    starts = image & ~torch.nn.functional.pad(image, (1, -1))
    return torch.where(image, starts.int().cumsum(1), -1)
