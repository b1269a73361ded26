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

from silkie.batch.packing import Segment, lineage

NAME = "silkie_segments"

# Rows shorter than this run with a dense mask: below, the calls cost more than the scores they save
# (examples/packing.md has figures).
SHORTEST_ROW = 256


class SegmentMask(Tensor):
    """The segments of a batch, as an empty 4-D tensor: that is what models hand through to their layers as a ready-made
    mask.

    Attributes:
        segments: of all rows.
        window: sliding window in logical positions, None for full attention.
    """

    segments: list[Segment]
    window: int | None


def segment_mask(segments: list[Segment], device: torch.device, *, window: int | None = None) -> SegmentMask:
    """The mask of packed rows."""
    mask = torch.empty(1, 1, 1, 0, device=device).as_subclass(SegmentMask)
    mask.segments, mask.window = segments, window
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
    rows: list[list[Tensor]] = [[] for _ in range(query.shape[0])]
    shapes: dict[tuple[int, int], Tensor] = {}  # responses of one length after one prompt share a mask
    for n, s in enumerate(attention_mask.segments):
        spans = [slice(a.start, a.end) for a in lineage(attention_mask.segments, n)]
        before = sum(span.stop - span.start for span in spans[:-1])
        mask = None
        if before or attention_mask.window is not None:
            shape = (s.length, before)
            if shape not in shapes:
                shapes[shape] = _causal(*shape, attention_mask.window, query.device)
            mask = shapes[shape]
        seen = nn.functional.scaled_dot_product_attention(
            query[s.row, None, :, s.start : s.end],
            _joined(key[s.row, None], spans),
            _joined(value[s.row, None], spans),
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=True,
        )
        rows[s.row].append(seen)
    out = torch.cat([torch.cat(row, dim=2) for row in rows])
    return out.transpose(1, 2).contiguous(), None


def _joined(x: Tensor, spans: list[slice]) -> Tensor:
    """[1, H, T, D] -> [1, H, tokens of the spans, D]; a view where there is one span."""
    return x[:, :, spans[0]] if len(spans) == 1 else torch.cat([x[:, :, span] for span in spans], dim=2)


def _causal(own: int, before: int, window: int | None, device: torch.device) -> Tensor:
    """[own, before + own] what the tokens of a segment see, of its ancestors and of themselves."""
    distance = torch.arange(before, before + own, device=device)[:, None] - torch.arange(before + own, device=device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
