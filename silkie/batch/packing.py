"""Preference groups -> the rows of one forward pass, and who may attend to whom. Pure tensor code, no model.

Two layouts of a group with prompt p and responses r1 ... rk:

    packed:  [ p | r1 | r2 | ... | rk ]     one row; a response sees the prompt and itself
    rows:    [ p | r1 ], [ p | r2 ], ...    one row per response (each response once, not once per pair)

Positions restart after the prompt for every response. The first token of every response is predicted by the last prompt
token.
Legend: G groups, K responses of a group, R responses (flat over groups), B rows, T tokens of a row, N scored tokens, L
prompt tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["packed", "rows"]

PAD_SEGMENT = -1
PROMPT_SEGMENT = 0


@dataclass(slots=True, kw_only=True)
class PromptAndResponses:
    """Tokens of one group.

    Attributes:
        prompt_ids: [L] token ids.
        prompt_positions: [C, L] rotary positions of the prompt, C = 3 (Qwen's temporal, height, width) or 1.
        responses: K tensors of token ids.
        token_inputs: [L] further inputs of the model per prompt token (types), by name.
    """

    prompt_ids: Tensor
    prompt_positions: Tensor
    responses: Sequence[Tensor]
    token_inputs: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens start..end of a row, and the tokens of the prompt that they follow (none for a prompt and for padding)."""

    row: int
    start: int
    end: int
    prompt_start: int = 0
    prompt_end: int = 0


@dataclass(slots=True, kw_only=True)
class PackedBatch:
    """Rows of one forward pass.

    Attributes:
        input_ids: [B, T].
        position_ids: [C, B, T] rotary positions.
        segment_ids: [B, T] -1 padding, 0 prompt, 1 ... K response within its group.
        group_ids: [B, T] group of a token, -1 padding.
        logical_positions: [B, T] distance from the start of the group's prompt along (prompt, own response); sliding
            windows count these.
        token_inputs: [B, T] further inputs of the model per token, by name.
        gather: [N] flat index (b * T + t) of the hidden state that predicts a scored token.
        target: [N] the scored token's id.
        owner: [N] its response, in [0, R), never decreasing.
        offset: [N] its place within the response.
        row_groups: groups that a row holds, per row.
        segments: the prompts, responses and paddings of all rows in order; they cover every token once. Plain numbers,
            so that attention by segment need not ask the device for them.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    group_ids: Tensor
    logical_positions: Tensor
    token_inputs: dict[str, Tensor]
    gather: Tensor
    target: Tensor
    owner: Tensor
    offset: Tensor
    row_groups: list[list[int]]
    segments: list[Segment]


def pack(
    groups: Sequence[PromptAndResponses],
    layout: Layout,
    *,
    pad_id: int,
    groups_per_row: int | None = 1,
    response_types: Mapping[str, int] | None = None,
) -> PackedBatch:
    """Lays groups out in rows, padded on the right.

    Args:
        groups: the G groups of a micro-batch.
        layout: see the module's docstring.
        pad_id: token id of padding.
        groups_per_row: packed layout: how many groups share a row; None puts all in one (for attention that skips what
            is masked). A dense mask wants 1: over several groups it would be mostly empty.
        response_types: value of a token input within responses; by default that of the last prompt token, which is
            text as they are.
    """
    rows: list[list[tuple[int, list[int]]]]  # per row: (group, responses of it)
    if layout == "packed":
        step = groups_per_row or len(groups)
        rows = [
            [(g, list(range(len(groups[g].responses)))) for g in range(i, min(i + step, len(groups)))]
            for i in range(0, len(groups), step)
        ]
    elif layout == "rows":
        rows = [[(g, [k])] for g, group in enumerate(groups) for k in range(len(group.responses))]
    else:
        raise ValueError(f"layout must be 'packed' or 'rows', not {layout!r}")

    first = [0]  # index of a group's first response in [0, R)
    for group in groups:
        first.append(first[-1] + len(group.responses))
    lengths = [
        sum(len(groups[g].prompt_ids) + sum(len(groups[g].responses[k]) for k in ks) for g, ks in row) for row in rows
    ]
    b, t = len(rows), max(lengths)
    channels = groups[0].prompt_positions.shape[0]
    input_ids = torch.full((b, t), pad_id, dtype=torch.long)
    position_ids = torch.zeros((channels, b, t), dtype=torch.long)
    segment_ids = torch.full((b, t), PAD_SEGMENT, dtype=torch.long)
    group_ids = torch.full((b, t), -1, dtype=torch.long)
    logical = torch.zeros((b, t), dtype=torch.long)
    token_inputs = {
        name: torch.zeros((b, t), dtype=value.dtype) for group in groups for name, value in group.token_inputs.items()
    }
    gather, target, owner, offset = [], [], [], []
    segments: list[Segment] = []

    for i, row in enumerate(rows):
        at = 0
        for g, ks in row:
            group = groups[g]
            size = len(group.prompt_ids)
            prompt = slice(at, at + size)
            input_ids[i, prompt] = group.prompt_ids
            position_ids[:, i, prompt] = group.prompt_positions
            segment_ids[i, prompt] = PROMPT_SEGMENT
            logical[i, prompt] = torch.arange(size)
            for name, value in group.token_inputs.items():
                token_inputs[name][i, prompt] = value
            segments.append(Segment(i, prompt.start, prompt.stop))
            restart = int(group.prompt_positions.max()) + 1
            last_prompt_token = at + size - 1
            at += size
            for k in ks:
                ids = group.responses[k]
                n = len(ids)
                own = slice(at, at + n)
                steps = torch.arange(n)
                input_ids[i, own] = ids
                for name, value in group.token_inputs.items():
                    token_inputs[name][i, own] = (response_types or {}).get(name, value[-1])
                position_ids[:, i, own] = restart + steps
                segment_ids[i, own] = k + 1
                logical[i, own] = size + steps
                segments.append(Segment(i, own.start, own.stop, prompt.start, prompt.stop))
                predictor = torch.cat([torch.tensor([last_prompt_token]), torch.arange(at, at + n - 1)])
                gather.append(i * t + predictor)
                target.append(ids)
                owner.append(torch.full((n,), first[g] + k, dtype=torch.long))
                offset.append(steps)
                at += n
            group_ids[i, prompt.start : at] = g
        if at < t:
            segments.append(Segment(i, at, t))

    return PackedBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        segment_ids=segment_ids,
        group_ids=group_ids,
        logical_positions=logical,
        token_inputs=token_inputs,
        gather=torch.cat(gather),
        target=torch.cat(target),
        owner=torch.cat(owner),
        offset=torch.cat(offset),
        row_groups=[[g for g, _ in row] for row in rows],
        segments=segments,
    )


def visible(
    group_ids: Tensor,
    segment_ids: Tensor,
    logical_positions: Tensor,
    *,
    window: int | None = None,
    bidirectional: Tensor | None = None,
) -> Tensor:
    """Dense attention mask of packed rows.

    A query sees a key of the same group that is in the prompt or in the query's own response and not later; padding
    sees itself, so that no row of the mask is empty.

    Args:
        group_ids, segment_ids, logical_positions: [B, T], see `PackedBatch`.
        window: sliding-window layers: a query sees keys less than `window` logical positions back, also within a block.
        bidirectional: [B, T] tokens with the same value >= 0 see each other in both directions within a group (image
            blocks, PaliGemma's prefix); -1 elsewhere.

    Returns:
        bool [B, 1, T, T], True where query (dim 2) may attend to key (dim 3).
    """
    same_group = (group_ids[:, :, None] == group_ids[:, None, :]) & (group_ids >= 0)[:, :, None]
    key_segment, query_segment = segment_ids[:, None, :], segment_ids[:, :, None]
    distance = logical_positions[:, :, None] - logical_positions[:, None, :]
    mask = ((key_segment == PROMPT_SEGMENT) | (key_segment == query_segment)) & (distance >= 0)
    if bidirectional is not None:
        mask |= (bidirectional[:, :, None] == bidirectional[:, None, :]) & (bidirectional >= 0)[:, :, None]
    mask &= same_group
    if window is not None:
        mask &= distance < window
    t = segment_ids.shape[1]
    padding = (segment_ids == PAD_SEGMENT)[:, :, None]
    mask |= padding & torch.eye(t, dtype=torch.bool, device=mask.device)
    return mask[:, None]
