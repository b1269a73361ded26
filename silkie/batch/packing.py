"""Preference groups -> the rows of one forward pass, and who may attend to whom. Pure tensor code, no model.

Two layouts of a group with prompt p and responses r1 ... rk:

    packed:  [ p | r1 | r2 | ... | rk ]     one row; a response sees the prompt and itself
    rows:    [ p | r1 ], [ p | r2 ], ...    one row per response (each response once, not once per pair)

Positions restart after the prompt for every response. The first token of every response is predicted by the last prompt
token.

Prompts and responses are the segments of a row. A segment names its parent, the one that it continues: the segments of
a group form a tree (here of depth two), and a token sees the earlier tokens of its own segment and of its ancestors.
Segments are listed in preorder, parents before children and subtrees unbroken, so that "descends from" is a comparison
of numbers.
Legend: G groups, K responses of a group, R responses (flat over groups), B rows, T tokens of a row, N scored tokens, L
prompt tokens, S segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
        token_types: [L] 0 text, 1 image.
        responses: K tensors of token ids.
    """

    prompt_ids: Tensor
    prompt_positions: Tensor
    token_types: Tensor
    responses: Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens start..end of a row.

    Attributes:
        parent: index, in the batch's list of segments, of the segment that this one continues; None for a prompt and
            for padding.
        padding: whether the tokens are the padding of a row. A flag, so that nobody has to ask the device.
    """

    row: int
    start: int
    end: int
    parent: int | None = None
    padding: bool = False

    @property
    def length(self) -> int:
        return self.end - self.start


def lineage(segments: Sequence[Segment], index: int) -> list[Segment]:
    """The ancestors of a segment from the root on, and the segment itself."""
    found, at = [], index
    while True:
        found.append(segments[at])
        parent = segments[at].parent
        if parent is None:
            return found[::-1]
        at = parent


def subtree_ends(segments: Sequence[Segment]) -> list[int]:
    """[S] per segment, one past the last of its descendants (itself without any); 0 for padding, which no other token
    sees."""
    ends = [0 if s.padding else n + 1 for n, s in enumerate(segments)]
    for n in range(len(segments) - 1, -1, -1):
        parent = segments[n].parent
        if parent is not None:
            ends[parent] = max(ends[parent], ends[n])
    return ends


@dataclass(slots=True, kw_only=True)
class PackedBatch:
    """Rows of one forward pass.

    Attributes:
        input_ids: [B, T].
        position_ids: [C, B, T] rotary positions.
        segment_ids: [B, T] -1 padding, 0 prompt, 1 ... K response within its group.
        segment_index: [B, T] number of a token's segment in `segments`.
        subtree_end: [B, T] one past the last segment that descends from the token's own; 0 padding.
        logical_positions: [B, T] distance from the start of the group's prompt along (ancestors, own segment); sliding
            windows count these.
        token_types: [B, T] 0 text, 1 image.
        gather: [N] flat index (b * T + t) of the hidden state that predicts a scored token.
        target: [N] the scored token's id.
        owner: [N] its response, in [0, R), never decreasing.
        offset: [N] its place within the response.
        row_groups: groups that a row holds, per row.
        segments: the prompts, responses and paddings of all rows in order; they cover every token once. Plain numbers,
            so that attention by segment and forks need not ask the device for them.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    segment_index: Tensor
    subtree_end: Tensor
    logical_positions: Tensor
    token_types: Tensor
    gather: Tensor
    target: Tensor
    owner: Tensor
    offset: Tensor
    row_groups: list[list[int]]
    segments: list[Segment]


def pack(
    groups: Sequence[PromptAndResponses], layout: Layout, *, pad_id: int, groups_per_row: int | None = 1
) -> PackedBatch:
    """Lays groups out in rows, padded on the right.

    Args:
        groups: the G groups of a micro-batch.
        layout: see the module's docstring.
        pad_id: token id of padding.
        groups_per_row: packed layout: how many groups share a row; None puts all in one (for attention that skips what
            is masked). A dense mask wants 1: over several groups it would be mostly empty.
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
    logical = torch.zeros((b, t), dtype=torch.long)
    token_types = torch.zeros((b, t), dtype=torch.long)
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
            token_types[i, prompt] = group.token_types
            parent = len(segments)
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
                position_ids[:, i, own] = restart + steps
                segment_ids[i, own] = k + 1
                logical[i, own] = size + steps
                segments.append(Segment(i, own.start, own.stop, parent))
                predictor = torch.cat([torch.tensor([last_prompt_token]), torch.arange(at, at + n - 1)])
                gather.append(i * t + predictor)
                target.append(ids)
                owner.append(torch.full((n,), first[g] + k, dtype=torch.long))
                offset.append(steps)
                at += n
        if at < t:
            segments.append(Segment(i, at, t, padding=True))
    segment_index, subtree_end = _numbered(segments, b, t)

    return PackedBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        segment_ids=segment_ids,
        segment_index=segment_index,
        subtree_end=subtree_end,
        logical_positions=logical,
        token_types=token_types,
        gather=torch.cat(gather),
        target=torch.cat(target),
        owner=torch.cat(owner),
        offset=torch.cat(offset),
        row_groups=[[g for g, _ in row] for row in rows],
        segments=segments,
    )


def _numbered(segments: Sequence[Segment], b: int, t: int) -> tuple[Tensor, Tensor]:
    """[B, T] each: `segment_index` and `subtree_end`."""
    index = torch.empty((b, t), dtype=torch.long)
    end = torch.empty((b, t), dtype=torch.long)
    for n, (s, subtree) in enumerate(zip(segments, subtree_ends(segments), strict=True)):
        index[s.row, s.start : s.end] = n
        end[s.row, s.start : s.end] = subtree
    return index, end


def visible(
    segment_index: Tensor,
    subtree_end: Tensor,
    logical_positions: Tensor,
    *,
    window: int | None = None,
    bidirectional: Tensor | None = None,
) -> Tensor:
    """Dense attention mask of packed rows.

    A query sees a key that is not later and lies in the query's own segment or in one of its ancestors; padding sees
    itself, so that no row of the mask is empty.

    Args:
        segment_index, subtree_end, logical_positions: [B, T], see `PackedBatch`.
        window: sliding-window layers: a query sees keys less than `window` logical positions back, also within a block.
        bidirectional: [B, T] tokens with the same value >= 0 see each other in both directions within a segment (image
            blocks, PaliGemma's prefix); -1 elsewhere.

    Returns:
        bool [B, 1, T, T], True where query (dim 2) may attend to key (dim 3).
    """
    query, key = segment_index[:, :, None], segment_index[:, None, :]
    distance = logical_positions[:, :, None] - logical_positions[:, None, :]
    mask = (key <= query) & (query < subtree_end[:, None, :]) & (distance >= 0)
    if bidirectional is not None:
        same_block = (bidirectional[:, :, None] == bidirectional[:, None, :]) & (bidirectional >= 0)[:, :, None]
        mask |= same_block & (query == key)
    if window is not None:
        mask &= distance < window
    return (mask | torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device))[:, None]
