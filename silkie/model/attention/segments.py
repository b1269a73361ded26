"""PyTorch's sdpa, segment by segment: a segment meets its ancestors and itself (a prompt itself, a response its prompt
and itself), causally, and nothing else is computed.

A dense mask makes sdpa compute all T x T scores of a row and drop most of them. For a prompt of P tokens and k
responses of L this is P^2 / 2 + k L (P + L) scores, and no mask of T x T. It pays where rows are long; short rows are
run at once with the dense mask. Legend: B rows, T tokens of a row, H heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from silkie.batch.packing import Segment

NAME = "silkie_segments"

# Rows shorter than this run with a dense mask: below, the calls cost more than the scores they save
# (examples/packing.md has figures).
SHORTEST_ROW = 256

# Queries of one call on a CPU. Its flash kernel skips keys that nothing sees in steps of 512: of a prompt of 636 tokens
# it computes 85 % of the square, in blocks of 128 queries 60 %.
BLOCK = 128


class SegmentMask(Tensor):
    """The segments of a batch, as an empty 4-D tensor: that is what models hand through to their layers as a ready-made
    mask.

    Attributes:
        segments: of all rows.
        lineages: per segment, the numbers of its ancestors from the root on, and its own.
        window: sliding window in logical positions, None for full attention.
        kept: masks that the layers of a pass share, by shape.
    """

    segments: list[Segment]
    lineages: list[list[int]]
    window: int | None
    kept: dict[tuple[int, int, torch.dtype], Tensor]


def segment_mask(segments: list[Segment], device: torch.device, *, window: int | None = None) -> SegmentMask:
    """The mask of packed rows."""
    mask = torch.empty(1, 1, 1, 0, device=device).as_subclass(SegmentMask)
    mask.segments, mask.window, mask.kept = segments, window, {}
    mask.lineages = []
    for n, s in enumerate(segments):
        mask.lineages.append([*(mask.lineages[s.parent] if s.parent is not None else []), n])
    return mask


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function of transformers' interface: query [B, H, T, D], key and value [B, H_kv, T, D] -> [B, T, H,
    D]."""
    if not isinstance(attention_mask, SegmentMask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    queries, keys, values = (_by_segment(x, attention_mask.segments) for x in (query, key, value))
    rows: list[list[Tensor]] = [[] for _ in range(query.shape[0])]
    for s, own, line in zip(attention_mask.segments, queries, attention_mask.lineages, strict=True):
        k, v = (_joined([x[n] for n in line]) for x in (keys, values))
        block = BLOCK if query.device.type == "cpu" else s.length
        before = k.shape[2] - s.length
        for part in own.split(block, dim=2):
            end = before + part.shape[2]
            mask = _causal(attention_mask, part.shape[2], before, part) if before or attention_mask.window else None
            seen = nn.functional.scaled_dot_product_attention(
                part,
                k[:, :, :end] if end < k.shape[2] else k,
                v[:, :, :end] if end < v.shape[2] else v,
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=True,
            )
            rows[s.row].append(seen.transpose(1, 2))
            before = end
    return torch.cat([torch.cat(row, dim=1) for row in rows]), None


def _by_segment(x: Tensor, segments: list[Segment]) -> list[Tensor]:
    """[B, H, T, D] -> [1, H, n, D] per segment. They cover the rows in order; one `split` has a far cheaper gradient
    than a slice per segment, which would be a whole row of zeros each."""
    lengths: list[list[int]] = [[] for _ in range(x.shape[0])]
    for s in segments:
        lengths[s.row].append(s.length)
    return [part for row, n in zip(x.split(1), lengths, strict=True) for part in row.split(n, dim=2)]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _causal(mask: SegmentMask, own: int, before: int, like: Tensor) -> Tensor:
    """[own, before + own] what queries see of the keys before them and of their own: 0, or minus infinity where they do
    not. Added to the scores; sdpa would make such a mask of a boolean one in every call."""
    shape = (own, before, like.dtype)
    if shape not in mask.kept:
        end = before + own
        distance = torch.arange(before, end, device=like.device)[:, None] - torch.arange(end, device=like.device)
        seen = distance >= 0 if mask.window is None else (distance >= 0) & (distance < mask.window)
        mask.kept[shape] = like.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
    return mask.kept[shape]


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
