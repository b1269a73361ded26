"""Flash attention over segments: every segment's queries meet the keys of its ancestors and its own, gathered in
that order.

The keys of a segment then are one causal sequence that ends where the queries end, which is what flash attention's
causal mask means when a sequence has more keys than queries. On the CPU `segment_attention` computes the same segment
by segment; it is the truth of the tests. Legend: B rows, T tokens of a row, S segments, H heads, D head size, M
gathered keys.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from silkie.batch.packing import Segment, lineage

NAME = "silkie_varlen"


class SegmentPlan(Tensor):
    """Which keys each segment meets. A 4-D tensor, because that is what models hand through to their layers as a
    ready-made mask.

    The tensor itself is int64 [1, 1, 1, M]: flat indices (b * T + t) of the gathered keys.

    Attributes:
        cu_queries, cu_keys: int32 [S + 1] bounds of the segments in the flat queries [B * T] and in the gathered keys
            [M].
        longest_query, longest_key: of any segment.
        window: sliding window in logical positions, None for full attention.
    """

    cu_queries: Tensor
    cu_keys: Tensor
    longest_query: int
    longest_key: int
    window: int | None


def segment_plan(
    segments: Sequence[Segment], row_length: int, device: torch.device, *, window: int | None = None
) -> SegmentPlan:
    """The plan of packed rows of `row_length` tokens. The padding of a row is a segment that meets itself."""
    keys = []
    for n, s in enumerate(segments):
        met = torch.cat([torch.arange(a.start, a.end) for a in lineage(segments, n)])
        keys.append(s.row * row_length + met)
    lengths, counts = [s.length for s in segments], [len(k) for k in keys]

    def bounds(sizes: list[int]) -> Tensor:
        # a blocking copy would wait for all that the device still has to do
        return torch.tensor([0, *sizes]).cumsum(0).int().to(device, non_blocking=True)

    plan = torch.cat(keys)[None, None, None].to(device, non_blocking=True).as_subclass(SegmentPlan)
    plan.cu_queries, plan.cu_keys = bounds(lengths), bounds(counts)
    plan.longest_query, plan.longest_key, plan.window = max(lengths), max(counts), window
    return plan


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
    if not isinstance(attention_mask, SegmentPlan):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    for option in ("softcap", "s_aux"):
        if kwargs.get(option) is not None:
            raise ValueError(
                f"'varlen' attention does not support `{option}` of {type(module).__name__}: use 'flex' or 'sdpa'."
            )
    if kwargs.get("dropout"):
        raise ValueError(
            "'varlen' attention does not support dropout: set the model's attention_dropout to 0, or use 'sdpa'."
        )
    b, _, t, _ = query.shape
    index = attention_mask.as_subclass(Tensor).flatten()
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    kernel = flash_attention if query.is_cuda else segment_attention
    out = kernel(q, k.index_select(0, index), v.index_select(0, index), attention_mask, scaling)
    return out.unflatten(0, (b, t)), None


def segment_attention(q: Tensor, k: Tensor, v: Tensor, plan: SegmentPlan, scaling: float | None) -> Tensor:
    """Plain PyTorch, one segment after another: q [B * T, H, D], k and v [M, H_kv, D] -> [B * T, H, D]."""
    out = []
    queries, keys = plan.cu_queries.diff().tolist(), plan.cu_keys.diff().tolist()
    for own, own_k, own_v in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        distance = torch.arange(len(own_k) - len(own), len(own_k), device=q.device)[:, None] - torch.arange(
            len(own_k), device=q.device
        )
        mask = (distance >= 0) & (distance < (plan.window or len(own_k)))
        query, key, value = own.transpose(0, 1), own_k.transpose(0, 1), own_v.transpose(0, 1)
        seen = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
        )
        out.append(seen.transpose(0, 1))
    return torch.cat(out)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, plan: SegmentPlan, scaling: float | None) -> Tensor:
    """The same with flash-attn where it is installed, else with the flash kernels that PyTorch carries."""
    # Flash attention counts the tokens before the query, silkie's window the query itself as well.
    window = (-1 if plan.window is None else plan.window - 1, 0)
    bounds = (plan.cu_queries, plan.cu_keys, plan.longest_query, plan.longest_key)
    if _flash_attn_installed():
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, *bounds, softmax_scale=scaling, causal=True, window_size=window)
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q, k, v, *bounds, scale=scaling, window_size=window, enable_gqa=q.shape[1] != k.shape[1])
    assert isinstance(out, Tensor)
    return out


def why_no_kernel() -> str | None:
    """The reason why there is no flash kernel for segments here, or None."""
    if _flash_attn_installed() or _torch_has_varlen():
        return None
    return (
        "'varlen' attention needs the flash-attn package (`pip install flash-attn`), or a PyTorch whose"
        f" torch.nn.attention.varlen takes a window (this is {torch.__version__}): use 'flex' or 'sdpa'"
    )


def kernel_name() -> str:
    """The kernels' name, as the log gives it."""
    return "flash-attn" if _flash_attn_installed() else "PyTorch's flash kernels"


def _flash_attn_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _torch_has_varlen() -> bool:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
