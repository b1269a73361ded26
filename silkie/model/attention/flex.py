"""FlexAttention over packed rows: the visibility rule as a BlockMask, so that blocks in which nothing is visible cost
nothing.

On CUDA transformers' compiled FlexAttention runs; on the CPU the uncompiled one, forward only, which the tests compare
with the dense mask.
Legend: B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "silkie_flex"

_BLOCK = 128  # tokens of a block's side, FlexAttention's own default
_QUERIES = 1024  # whose visibility is computed at a time


def block_mask(
    segment_index: Tensor,
    subtree_end: Tensor,
    logical_positions: Tensor,
    *,
    window: int | None = None,
    bidirectional: Tensor | None = None,
) -> BlockMask:
    """The rule of `silkie.batch.packing.visible`, token by token, for FlexAttention. Arguments as there, all [B, T]."""
    b, t = segment_index.shape

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own, other = segment_index[row, query], segment_index[row, key]
        distance = logical_positions[row, query] - logical_positions[row, key]
        seen = (other <= own) & (own < subtree_end[row, key]) & (distance >= 0)
        if bidirectional is not None:
            block = bidirectional[row, query]
            seen = seen | ((block == bidirectional[row, key]) & (block >= 0) & (own == other))
        if window is not None:
            seen = seen & (distance < window)
        return seen | (query == key)  # so does padding, which sees nothing else

    return _blocks(rule, b, t, segment_index.device)


def _blocks(
    rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], b: int, t: int, device: torch.device
) -> BlockMask:
    """PyTorch's `create_block_mask` without its dense [B, T, T] tensors, which for a row of many groups would be
    gigabytes: some queries at a time."""
    row, key, n = torch.arange(b, device=device)[:, None, None], torch.arange(t, device=device), -(-t // _BLOCK)
    counts = []
    for start in range(0, t, _QUERIES):
        query = torch.arange(start, min(start + _QUERIES, t), device=device)[:, None]
        seen = rule(row, row, query, key)  # [B, queries, T]
        seen = nn.functional.pad(seen, (0, n * _BLOCK - t, 0, -len(query) % _BLOCK))
        counts.append(seen.unflatten(2, (n, _BLOCK)).unflatten(1, (-1, _BLOCK)).sum((2, 4)))
    count = torch.cat(counts, dim=1)[:, None]  # [B, 1, n, n] visible pairs of a block
    whole = count == _BLOCK * _BLOCK
    return BlockMask.from_kv_blocks(
        *_listed((count > 0) & ~whole), *_listed(whole), BLOCK_SIZE=_BLOCK, mask_mod=rule, seq_lengths=(t, t)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[..., n, n] flags -> per row of blocks, how many are set [..., n], and their numbers in front [..., n, n]."""
    return blocks.sum(-1, dtype=torch.int32), blocks.int().argsort(dim=-1, descending=True, stable=True).int()


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function of transformers' interface: query [B, H, T, D], key and value [B, H_kv, T, D] -> [B, T, H,
    D]."""
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
