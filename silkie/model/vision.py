"""Image features once per step: computed for each image once, repeated for the rows that need them, shared by the
policy and the reference pass."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from silkie.model.families import backbone


@dataclass(slots=True)
class FeatureCache:
    """Features of one micro-batch. `computed` counts encoder runs, for tests and the log."""

    features: Any = None
    computed: int = field(default=0)


@contextmanager
def image_features_once(
    model: Any,
    *,
    frozen: bool,
    cache: FeatureCache | None,
    tokens_per_group: Sequence[int],
    row_groups: Sequence[Sequence[int]],
) -> Iterator[None]:
    """Within the context, the model's forward encodes each image of the batch once.

    The model's own `get_image_features` is called inside its forward, where FSDP2 and ZeRO-3 have gathered the weights;
    only its result is kept and laid out for the rows.

    Args:
        model: policy or reference, wrapped or not.
        frozen: run the encoder under `no_grad`: no activations are kept and checkpointing has nothing to recompute.
        cache: features are taken from here, or put here. None: compute them and keep nothing (a trainable vision
            tower).
        tokens_per_group: image tokens of each group, in the order of the pixel inputs.
        row_groups: the groups that each row of the forward holds.
    """
    inner = backbone(model)
    compute = inner.get_image_features
    order = [g for row in row_groups for g in row]
    once_in_order = order == list(range(len(tokens_per_group)))

    def once(*args: Any, **kwargs: Any) -> Any:
        if cache is not None and cache.features is not None:
            features = cache.features
        else:
            with torch.no_grad() if frozen else nullcontext():
                features = compute(*args, **kwargs)
            if cache is not None:
                cache.features, cache.computed = features, cache.computed + 1
        if not sum(tokens_per_group):
            return _nothing(features)
        return features if once_in_order else _repeat(features, tokens_per_group, order)

    inner.get_image_features = once  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del inner.get_image_features  # the class's method shows again


def _nothing(features: Any) -> Any:
    """The encoder's output without a token, still attached to its graph: a micro-batch without images ran the tower on
    a dummy one."""
    out = copy.copy(features)
    listed = isinstance(out.pooler_output, (list, tuple))
    tokens = torch.cat([t.reshape(-1, t.shape[-1]) for t in out.pooler_output]) if listed else out.pooler_output
    out.pooler_output = [tokens[:0]] if listed else tokens[:0]
    if (levels := getattr(features, "deepstack_features", None)) is not None:
        out.deepstack_features = [level[:0] for level in levels]
    return out


def _repeat(features: Any, tokens_per_group: Sequence[int], order: Sequence[int]) -> Any:
    """A copy of the encoder's output whose image tokens are those of the groups in `order`."""
    out = copy.copy(features)
    out.pooler_output = _repeat_tokens(features.pooler_output, tokens_per_group, order)
    if (levels := getattr(features, "deepstack_features", None)) is not None:
        out.deepstack_features = [_repeat_tokens(level, tokens_per_group, order) for level in levels]
    return out


def _repeat_tokens(tokens: Tensor | Sequence[Tensor], tokens_per_group: Sequence[int], order: Sequence[int]) -> Any:
    """tokens: features of all groups one after another, as one tensor [..., D] or a list of tensors; the result has the
    same form."""
    listed = isinstance(tokens, (list, tuple))
    flat = torch.cat([t.reshape(-1, t.shape[-1]) for t in tokens]) if listed else tokens.reshape(-1, tokens.shape[-1])  # type: ignore[union-attr]
    groups = flat.split(list(tokens_per_group))
    rows = [groups[g] for g in order]
    if listed:
        return rows
    return torch.cat(rows).reshape(-1, *tokens.shape[1:])  # type: ignore[union-attr]
