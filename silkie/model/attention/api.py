"""`Attention`: batch -> the mask arguments of the model's forward. The one place where a backend is chosen by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from silkie.batch.packing import PROMPT_SEGMENT, visible
from silkie.model.attention import flex, segments, varlen
from silkie.model.families import family_of, sliding_window
from silkie.model.recurrent import ForkPlan, fork_plan, mask_kinds

Backend = Literal["sdpa", "eager", "segments", "flex", "varlen"]

# Backend -> attention implementation of transformers.
IMPLEMENTATIONS: dict[str, str] = {
    "sdpa": "sdpa",
    "eager": "eager",
    "segments": segments.NAME,
    "flex": flex.NAME,
    "varlen": varlen.NAME,
}
BACKENDS = tuple(IMPLEMENTATIONS)
ONE_GROUP_PER_ROW: tuple[Backend, ...] = (
    "sdpa",
    "eager",
    "segments",
)  # a dense mask over several groups would be mostly empty

_KEPT = "_attention_inputs"
_KEPT_FORKS = "_forks"


@dataclass(slots=True, frozen=True, kw_only=True)
class Attention:
    """Makes the mask arguments of a batch.

    Attributes:
        backend: attention of the language model in the packed layout.
        layout: "packed" builds the group mask; "rows" leaves masking to the model (2-D padding mask).
    """

    backend: Backend
    layout: Literal["packed", "rows"]

    def inputs(self, config: PretrainedConfig, batch: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of the model's forward: `attention_mask`."""
        if self.layout == "rows":
            return {"attention_mask": (batch["segment_ids"] >= 0).long()}
        if (
            self.backend in ONE_GROUP_PER_ROW
        ):  # not kept: the masks of all micro-batches of a step would fill the memory
            return self._packed(config, batch)
        if _KEPT not in batch:  # small, and the reference pass needs the same
            batch[_KEPT] = self._packed(config, batch)
        return batch[_KEPT]

    def _packed(self, config: PretrainedConfig, batch: dict[str, Any]) -> dict[str, Any]:
        two_way = _two_way_blocks(config, batch)
        build = _BUILDERS[self.backend]
        attention, recurrent = mask_kinds(config)
        masks = {
            kind: build(batch, sliding_window(config) if kind == "sliding_attention" else None, two_way)
            for kind in sorted(attention)
        }
        if recurrent:
            return {"attention_mask": masks | dict.fromkeys(sorted(recurrent), _forks(batch))}
        if family_of(config).dict_mask and "sliding_attention" in masks:
            return {"attention_mask": masks}
        return {"attention_mask": masks["full_attention"]}


def _forks(batch: dict[str, Any]) -> ForkPlan:
    """Made once per batch: the reference pass needs the same."""
    if _KEPT_FORKS not in batch:
        ids = batch["segment_ids"]
        batch[_KEPT_FORKS] = fork_plan(batch["segments"], ids.shape[1], ids.device)
    return batch[_KEPT_FORKS]


def why_not_available(backend: Backend, config: PretrainedConfig, device: torch.device) -> str | None:
    """The reason why a backend cannot train a model on a device, or None."""
    two_way = family_of(config).two_way
    if backend in ("segments", "varlen") and two_way != "none":
        return (
            f"{config.model_type} attends in both directions within its {two_way} tokens, {backend!r} is causal: use"
            " 'flex' or 'sdpa'"
        )
    if backend in ONE_GROUP_PER_ROW:
        return None
    if device.type != "cuda":
        return f"{backend!r} attention needs a CUDA device, this run is on {device.type}: use 'sdpa'"
    return varlen.why_no_kernel() if backend == "varlen" else None


def _dense_bool(batch: dict[str, Any], window: int | None, two_way: Tensor | None) -> Tensor:
    return visible(
        batch["segment_index"], batch["subtree_end"], batch["logical_positions"], window=window, bidirectional=two_way
    )


def _dense_float(batch: dict[str, Any], window: int | None, two_way: Tensor | None) -> Tensor:
    """Eager attention adds the mask to the scores: a boolean one would add 0 and 1."""
    mask = _dense_bool(batch, window, two_way)
    return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(
        ~mask, torch.finfo(torch.float32).min
    )


def _segments(batch: dict[str, Any], window: int | None, two_way: Tensor | None) -> Tensor:
    """Long rows segment by segment, short ones with the dense mask."""
    if batch["segment_ids"].shape[1] < segments.SHORTEST_ROW:
        return _dense_bool(batch, window, two_way)
    _refuse_two_way("segments", two_way)
    return segments.segment_mask(batch["segments"], batch["segment_ids"].device, window=window)


def _flex(batch: dict[str, Any], window: int | None, two_way: Tensor | None) -> Any:
    return flex.block_mask(
        batch["segment_index"], batch["subtree_end"], batch["logical_positions"], window=window, bidirectional=two_way
    )


def _varlen(batch: dict[str, Any], window: int | None, two_way: Tensor | None) -> Tensor:
    _refuse_two_way("varlen", two_way)
    return varlen.segment_plan(
        batch["segments"], batch["segment_ids"].shape[1], batch["segment_ids"].device, window=window
    )


def _refuse_two_way(backend: Backend, two_way: Tensor | None) -> None:
    if two_way is not None:
        raise ValueError(
            f"{backend!r} attention is causal; this model attends in both directions within its image or prefix tokens."
        )


_BUILDERS: dict[str, Callable[[dict[str, Any], int | None, Tensor | None], Any]] = {
    "sdpa": _dense_bool,
    "eager": _dense_float,
    "segments": _segments,
    "flex": _flex,
    "varlen": _varlen,
}


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
