"""The model's own attention masks, carried over to packed rows.

A model decides for itself who sees whom: causal, sliding window, chunks, image tokens in both directions. It says so
to transformers' mask functions, in terms of places in one plain sequence. A packed row holds several such sequences,
prompt and one response each. Within `packed_masks` the model's rule is asked at the place that a token has in its own
plain sequence, and a response sees its prompt and itself only. So nothing needs to be known about a model's masks.
Legend: B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from silkie.batch.batch import Batch
from silkie.batch.packing import descends, stems

# Given the batch, the sliding window (None: full attention) and the blocks that see each other in both directions
# ([B, T], -1 elsewhere; None: there are none): a mask in the form that a backend takes.
Build = Callable[[Batch, int | None, Tensor | None], Any]


@contextmanager
def packed_masks(
    implementation: str, text_configs: set[int], batch: Batch, *, build: Build | None, float_mask: bool
) -> Iterator[None]:
    """Within the context, the language model's masks are those of the packed rows of `batch`.

    Args:
        implementation: name of the language model's attention implementation.
        text_configs: ids of the config objects of the language model; masks of other parts (vision) stay as they are.
        batch: from `GroupCollator`, packed, one group per row unless `build` skips what is masked.
        build: makes a backend's mask of a plain causal or sliding rule, or None where it has no form for one. None: a
            dense mask for every rule.
        float_mask: dense masks are added to the scores (eager attention) instead of boolean.
    """
    mapping = ALL_MASK_ATTENTION_FUNCTIONS
    stock = mapping[implementation]
    rows, length = batch["segment_ids"].shape

    def masks(**rule: Any) -> Any:
        ours = id(rule["config"]) in text_configs and rule["q_length"] == rule["kv_length"] == length
        if not ours or rule["batch_size"] != rows:
            return stock(**rule)
        _check_stems(rule, batch)
        plain = _plain_rule(rule) if build is not None else None
        built = build(batch, *plain) if build is not None and plain is not None else None
        if built is not None:
            return built
        mask = _dense(rule, batch)
        return added(mask, rule["dtype"]) if float_mask else mask

    had, previous = implementation in mapping._local_mapping, mapping._local_mapping.get(implementation)
    mapping[implementation] = masks
    try:
        yield
    finally:
        if had:
            mapping[implementation] = previous
        else:
            del mapping[implementation]


def _check_stems(rule: dict[str, Any], batch: Batch) -> None:
    """Whether groups can share a stem under the model's rule.

    Raises:
        ValueError: a stem sees what follows it, which is another text in each group.
    """
    if rule["allow_is_causal_skip"]:
        return  # causal
    head = torch.zeros((), dtype=torch.long, device=rule["device"])
    for stem in stems(batch["segments"]):
        row, last, after = (head + n for n in (stem.row, stem.end - 1, stem.end))
        if bool(rule["mask_function"](row, head, last, after)):
            raise ValueError(
                f"the language model ({rule['config'].model_type}) attends in both directions within its prompt: what"
                " it makes of an image depends on the question behind it, so questions cannot share it. Set"
                " share_prefix='off'."
            )


def _dense(rule: dict[str, Any], batch: Batch) -> Tensor:
    """bool [B, 1, T, T]: the model's rule at each token's place in its own plain sequence, within what a packed row
    lets it see. Images are in what starts a row (a prompt, or the stem of several): the place of an image token is the
    same in the row and in its plain sequences."""
    plain: Any = sdpa_mask(**{**rule, "attention_mask": None, "allow_is_causal_skip": False})
    segment, place = batch["segment_ids"], batch["logical_positions"]
    row = torch.arange(len(segment), device=segment.device)[:, None, None]
    mask: Tensor = plain[row, 0, place[:, :, None], place[:, None, :]]
    mask = mask & descends(batch["segment_index"], batch["subtree_end"])
    # padding sees itself, so that no row of the mask is empty
    return (mask | torch.eye(segment.shape[1], dtype=torch.bool, device=segment.device))[:, None]


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as one that eager attention adds to the scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def _plain_rule(rule: dict[str, Any]) -> tuple[int | None, Tensor | None] | None:
    """Window and bidirectional blocks of a causal or sliding rule, found by asking it; None for any other (chunks)."""
    rows, length, device = rule["batch_size"], rule["q_length"], rule["device"]
    place = torch.arange(length, device=device)[None]
    row = torch.arange(rows, device=device)[:, None]

    def see(query: Tensor, key: Tensor) -> Tensor:
        return rule["mask_function"](row, torch.zeros_like(row), query, key).expand(rows, -1)

    size = rule.get("local_size")
    if rule["allow_is_causal_skip"] and (size is None or size != getattr(rule["config"], "attention_chunk_size", None)):
        return size, None  # told without a look at the numbers, for which a GPU would have to be waited for
    seen = see(place[:, -1:], place)  # by the last token, which is no image's
    first = length - int(seen[0].sum())
    window = length - first if first else None
    if first and (first == length - 1 or not bool(see(place[:, -2:-1], place[:, first - 1 : first]).all())):
        return None  # a window moves with the query, a chunk does not
    # tokens that see the next one belong with it to a block
    ahead = see(place[:, :-1], place[:, 1:])
    if not bool(ahead.any()):
        return window, None
    after = torch.nn.functional.pad(ahead, (1, 0))
    inside = torch.nn.functional.pad(ahead, (0, 1)) | after
    return window, torch.where(inside, (inside & ~after).int().cumsum(1), -1)
