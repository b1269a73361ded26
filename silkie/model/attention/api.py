"""`Attention`: batch -> the mask arguments of the model's forward. The one place where a backend is chosen by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from silkie.batch.batch import Batch
from silkie.batch.packing import visible
from silkie.model.attention import flex, segments, varlen
from silkie.model.attention.own_masks import added, packed_masks
from silkie.model.families import attention_implementation
from silkie.model.recurrent import CALLS, Calls, ForkPlan, fork_plan, mask_kinds

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
# A dense mask over several groups would be mostly empty
ONE_GROUP_PER_ROW: tuple[Backend, ...] = ("sdpa", "eager", "segments")

_KEPT: Final = "_attention_inputs"
_KEPT_FORKS: Final = "_forks"


@dataclass(slots=True, frozen=True, kw_only=True)
class Attention:
    """Makes the mask arguments of a batch.

    Attributes:
        backend: attention of the language model in the packed layout.
        layout: "packed" keeps the responses of a group apart; "rows" leaves all masking to the model.
        calls: of a recurrent mixer per forward pass, the same on every rank and for every batch of a run.
    """

    backend: Backend
    layout: Literal["packed", "rows"]
    calls: Calls = CALLS

    def inputs(self, batch: Batch, *, weighed: bool = False) -> dict[str, Any]:
        """Keyword arguments of the model's forward: `attention_mask`, which says where padding is. What sees what is
        told within `masks`.

        Args:
            weighed: it is also the weight of every token in the load balancing loss of the routers, which transformers
                takes from this mask. Packed rows only: nothing else reads the mask there.
        """
        if weighed and self.layout == "packed" and "token_uses" in batch:
            return {"attention_mask": batch["token_uses"]}
        return {"attention_mask": (batch["segment_ids"] >= 0).long()}

    def recurrent_masks(self, config: PretrainedConfig, batch: Batch) -> dict[str, Any] | None:
        """The masks of a text decoder with recurrent layers, for packed rows: ready-made per kind of attention layer,
        and the plan of the forks in place of the recurrent one, which no mask function could make. None: there are no
        such layers, or the rows are not packed."""
        attention, recurrent = mask_kinds(config)
        if self.layout == "rows" or not recurrent:
            return None
        window = getattr(config.get_text_config(), "sliding_window", None)
        masks = {
            kind: self._ready_made(config, batch, window if kind == "sliding_attention" else None)
            for kind in sorted(attention)
        }
        return masks | dict.fromkeys(sorted(recurrent), _forks(batch, self.calls))

    def _ready_made(self, config: PretrainedConfig, batch: Batch, window: int | None) -> Any:
        """The causal mask of packed rows in the backend's form."""
        if self.backend not in ("sdpa", "eager"):
            return self.build(config.get_text_config().model_type, batch, window, None)
        mask = _dense_bool(batch, window, None)
        return added(mask, torch.float32) if self.backend == "eager" else mask

    @contextmanager
    def masks(self, base: Any, batch: Batch) -> Iterator[None]:
        """Within the context, the language model of `base` masks the rows of `batch` by the run's layout."""
        if self.layout == "rows":
            yield
            return
        text, module = base.config.get_text_config(), base.get_decoder()
        decoder = [id(m.config) for m in module.modules() if hasattr(m, "config")]
        build = None if self.backend in ("sdpa", "eager") else partial(self.build, text.model_type)
        with (
            packed_masks(
                attention_implementation(text),
                {id(text), id(base.config), *decoder},
                batch,
                build=build,
                float_mask=self.backend == "eager",
            ),
            _given(module, self.recurrent_masks(base.config, batch)),
        ):
            yield

    def build(self, name: str, batch: Batch, window: int | None, bidirectional: Tensor | None) -> Any:
        """The mask of packed rows in the backend's form; None where a dense one must do.

        Args:
            name: the model's, for the error.
            window: sliding window in tokens, None for full attention.
            bidirectional: [B, T] tokens with the same number >= 0 see each other in both directions; None: causal.

        Raises:
            ValueError: the backend has no form for tokens that see each other in both directions.
        """
        if bidirectional is not None and self.backend == "varlen":
            raise ValueError(
                f"{name} attends in both directions within image or prefix tokens, {self.backend!r} attention is"
                " causal: use attention_backend='flex' or 'sdpa'."
            )
        if bidirectional is not None and self.backend == "segments":
            return None
        if self.backend == "segments":
            return _segments(batch, window)
        kept = batch.setdefault(_KEPT, {})  # small, and the reference pass needs the same
        kind = f"{self.backend} {window} {bidirectional is not None}"
        if kind not in kept:
            kept[kind] = _flex(batch, window, bidirectional) if self.backend == "flex" else _varlen(batch, window)
        return kept[kind]


@contextmanager
def _given(decoder: nn.Module, masks: dict[str, Any] | None) -> Iterator[None]:
    """Within the context, the text decoder gets `masks` as its attention mask. Its model keeps the mask of padding,
    which it needs for more than attention: the load balancing loss of its routers leaves padding out by it."""
    if masks is None:
        yield
        return

    def put(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "attention_mask": masks}

    handle = decoder.register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _forks(batch: Batch, calls: Calls) -> ForkPlan:
    """Made once per batch: the reference pass needs the same."""
    if _KEPT_FORKS not in batch:
        ids = batch["segment_ids"]
        batch[_KEPT_FORKS] = fork_plan(batch["segments"], ids.shape[1], ids.device, calls=calls)
    return batch[_KEPT_FORKS]


def why_not_available(backend: Backend, config: PretrainedConfig, device: torch.device) -> str | None:
    """The reason why a backend cannot train a model on a device, or None."""
    if backend in ONE_GROUP_PER_ROW:
        return None
    if device.type != "cuda":
        return f"{backend!r} attention needs a CUDA device, this run is on {device.type}: use 'sdpa'"
    return varlen.why_no_kernel() if backend == "varlen" else None


def _dense_bool(batch: Batch, window: int | None, bidirectional: Tensor | None) -> Tensor:
    return visible(
        batch["segment_index"],
        batch["subtree_end"],
        batch["logical_positions"],
        window=window,
        bidirectional=bidirectional,
    )


def _segments(batch: Batch, window: int | None) -> Tensor:
    """Long rows segment by segment, short ones with the dense mask."""
    if batch["segment_ids"].shape[1] < segments.SHORTEST_ROW:
        return _dense_bool(batch, window, None)
    return segments.segment_mask(batch["segments"], batch["segment_ids"].device, window=window)


def _flex(batch: Batch, window: int | None, bidirectional: Tensor | None) -> Any:
    return flex.block_mask(
        batch["segment_index"],
        batch["subtree_end"],
        batch["logical_positions"],
        window=window,
        bidirectional=bidirectional,
    )


def _varlen(batch: Batch, window: int | None) -> Tensor:
    return varlen.segment_plan(
        batch["segments"], batch["segment_ids"].shape[1], batch["segment_ids"].device, window=window
    )
