"""FlexAttention over packed rows: the visibility rule as a BlockMask, so that blocks in which nothing is visible cost nothing.

On CUDA transformers' compiled FlexAttention runs; on the CPU the uncompiled one, forward only, which the tests compare with the dense mask.
Legend: B rows, T tokens of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from silkie.packing import PROMPT_SEGMENT

NAME = "silkie_flex"


def block_mask(
    group_ids: Tensor, segment_ids: Tensor, logical_positions: Tensor, *, window: int | None = None, bidirectional: Tensor | None = None
) -> BlockMask:
    """The rule of `silkie.packing.visible`, token by token, for FlexAttention. Arguments as there, all [B, T]."""
    b, t = segment_ids.shape

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        group = group_ids[row, query]
        same_group = (group == group_ids[row, key]) & (group >= 0)
        key_segment = segment_ids[row, key]
        distance = logical_positions[row, query] - logical_positions[row, key]
        order = distance >= 0
        if window is not None:
            order = order & (distance < window)
        seen = ((key_segment == PROMPT_SEGMENT) | (key_segment == segment_ids[row, query])) & order
        if bidirectional is not None:
            block = bidirectional[row, query]
            together = (block == bidirectional[row, key]) & (block >= 0)
            if window is not None:
                together = together & (distance.abs() < window)
            seen = seen | together
        return (same_group & seen) | ((group < 0) & (query == key))  # padding sees itself

    return create_block_mask(rule, b, None, t, t, device=str(segment_ids.device))


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention function of transformers' interface: query [B, H, T, D], key and value [B, H_kv, T, D] -> [B, T, H, D]."""
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if query.device.type != "cpu":
        return flex_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if torch.is_grad_enabled() and query.requires_grad:
        raise RuntimeError("FlexAttention has no backward pass on the CPU: use attention_backend='sdpa'.")
    out = flex_attention(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
