"""Which attention a GPU runs packed rows with: tried on the run's own sizes before the model is loaded.

A backend takes the place of sdpa's dense mask where its outputs and gradients are as near to those in fp32 as sdpa's,
and a forward and backward pass takes clearly less time. What it cannot do shows as an error and counts against it. The
self-test then holds the model as a whole to its plain forward. Legend: H heads, D head size."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig

from silkie.batch.batch import Batch
from silkie.batch.packing import PackedBatch, PromptAndResponses, pack, visible
from silkie.model.attention.api import IMPLEMENTATIONS, Attention, Backend, why_not_available

_CANDIDATES: tuple[Backend, ...] = ("varlen", "flex")  # the first that will do: flex has to be compiled to be tried
_WORTHWHILE = 0.9  # of sdpa's time; also keeps a resumed run from choosing otherwise by chance
_REPEATS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSizes:
    """Of the attention of a run.

    Attributes:
        heads, kv_heads, head_size: of the language model.
        groups: prompt length and response lengths of the groups of a micro-batch.
        dtype: in which it computes.
    """

    heads: int
    kv_heads: int
    head_size: int
    groups: Sequence[tuple[int, Sequence[int]]]
    dtype: torch.dtype


def sizes_of(
    config: PretrainedConfig, groups: Sequence[tuple[int, Sequence[int]]], dtype: torch.dtype
) -> BatchSizes | None:
    """None where the config does not name its heads."""
    text = config.get_text_config()
    heads, hidden = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return None
    return BatchSizes(
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_size=getattr(text, "head_dim", None) or hidden // heads,
        groups=groups,
        dtype=dtype,
    )


def fastest(config: PretrainedConfig, sizes: BatchSizes, device: torch.device) -> tuple[Backend, str]:
    """The backend for a run on a device, and why."""
    found = []
    alone = _rows(sizes, 1, device)
    own, dense = _inputs(sizes, alone, sizes.dtype), _dense(alone)
    truth = _pass(_inputs(sizes, alone, torch.float32), dense)
    allowed = 2 * _error(_pass(own, dense), truth, alone)
    took = _seconds(lambda: _pass(own, dense), device)
    together = _rows(sizes, None, device)
    for backend in _CANDIDATES:
        if why_not_available(backend, config, device):
            continue
        try:
            error = _error(_pass(own, _attend(backend, alone)), truth, alone)
            if not error <= max(allowed, 1e-5):
                found.append(f"{backend} is off by {error:.1g}, sdpa by {allowed / 2:.1g}")
                continue
            packed, attend = _inputs(sizes, together, sizes.dtype), _attend(backend, together)
            faster = took / _seconds(lambda p=packed, a=attend: _pass(p, a), device)  # type: ignore[misc]
        except torch.OutOfMemoryError:
            found.append(f"{backend} runs out of memory")
        except Exception as error:
            found.append(f"{backend} cannot: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
        else:
            found.append(f"{backend} takes {1 / faster:.2f} of sdpa's {took * 1e3:.2f} ms a layer, as exact")
            if faster * _WORTHWHILE >= 1:
                return backend, f"tried on {len(sizes.groups)} groups of the run: {found[-1]}; several groups per row"
    return "sdpa", f"exact on every device; one group per row; {'; '.join(found) or 'there is no other'}"


def _rows(sizes: BatchSizes, per_row: int | None, device: torch.device) -> dict[str, Any]:
    """The groups packed, as a batch for `Attention`."""

    def tokens(n: int) -> Tensor:
        return torch.zeros(n, dtype=torch.long)

    groups = [
        PromptAndResponses(
            prompt_ids=tokens(p), prompt_positions=torch.arange(p)[None], responses=[tokens(r) for r in responses]
        )
        for p, responses in sizes.groups
    ]
    packed: PackedBatch = pack(groups, "packed", pad_id=0, groups_per_row=per_row)
    names = ("segment_ids", "segment_index", "subtree_end", "logical_positions")
    return {name: getattr(packed, name).to(device) for name in names} | {"segments": packed.segments}


def _inputs(sizes: BatchSizes, batch: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value [B, H, T, D]; the same numbers in every dtype."""
    b, t = batch["segment_ids"].shape
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.randn(b, h, t, sizes.head_size, generator=generator).to(sizes.dtype)
        for h in (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    ]
    return [x.to(batch["segment_ids"].device, dtype).requires_grad_() for x in made]


def _dense(batch: dict[str, Any]) -> Callable[..., Tensor]:
    mask = visible(batch["segment_index"], batch["subtree_end"], batch["logical_positions"])

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups = query.shape[1] != key.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=groups)
        return out.transpose(1, 2)

    return attend


def _attend(backend: Backend, batch: dict[str, Any]) -> Callable[..., Tensor]:
    mask = Attention(backend=backend, layout="packed").build("the probe", cast(Batch, {**batch}), None, None)
    function: Any = AttentionInterface()[IMPLEMENTATIONS[backend]]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return function(torch.nn.Module(), query, key, value, mask, scaling=query.shape[-1] ** -0.5)[0]

    return attend


def _pass(inputs: list[Tensor], attend: Callable[..., Tensor]) -> list[Tensor]:
    """The output and the gradients of query, key and value."""
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)]


def _error(found: list[Tensor], truth: list[Tensor], batch: dict[str, Any]) -> float:
    """The largest difference relative to the largest number of each tensor, without padding."""
    real = batch["segment_ids"] >= 0
    worst = 0.0
    for own, other, axis in zip(found, truth, (1, 2, 2, 2), strict=True):
        kept, expected = (x.transpose(1, axis)[real].float() for x in (own, other))
        worst = max(worst, float((kept - expected).abs().max() / expected.abs().max()))
    return worst


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The best of a few, after two to warm up."""
    best = float("inf")
    for n in range(_REPEATS + 2):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        if n >= 2:
            best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
