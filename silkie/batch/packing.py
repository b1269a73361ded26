"""Preference groups -> the rows of one forward pass, and who may attend to whom. Pure tensor code, no model.

Two layouts of a group with prompt p and responses r1 ... rk:

    packed:  [ p | r1 | r2 | ... | rk ]     one row; a response sees the prompt and itself
    rows:    [ p | r1 ], [ p | r2 ], ...    one row per response (each response once, not once per pair)

Groups whose prompts begin with the same tokens can share these, packed: a stem s, then what is left of each prompt with
its responses.

    tree:    [ s | q1 | r11 ... r1k | q2 | r21 ... r2k | ... ]

Positions restart after the prompt for every response, and after the stem for every prompt. The first token of every
response is predicted by the last prompt token.

Stems, prompts and responses are the segments of a row. A segment names its parent, the one that it continues: they form
trees of depth two or three, and a token sees the earlier tokens of its own segment and of its ancestors. Segments are
listed in preorder, parents before children and subtrees unbroken, so that "descends from" is a comparison of numbers.
Legend: G groups, K responses of a group, R responses (flat over groups), B rows, T tokens of a row, N scored tokens, L
prompt tokens, S segments."""

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
class Tree:
    """Groups that share the first tokens of their prompts.

    Attributes:
        groups: numbers of the groups.
        stem: how many tokens they share, fewer than any of their prompts has; 0 for a group without company.
    """

    groups: tuple[int, ...]
    stem: int = 0


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens start..end of a row.

    Attributes:
        parent: index, in the batch's list of segments, of the segment that this one continues; None for a stem, for a
            prompt without one and for padding.
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


def stems(segments: Sequence[Segment]) -> list[Segment]:
    """The segments that several prompts start with: those that continue none and are continued by prompts."""
    prompts = {s.parent for s in segments if s.parent is not None}
    continued = {segments[p].parent for p in prompts}
    return [s for n, s in enumerate(segments) if n in continued]


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
        segment_ids: [B, T] -1 padding, 0 stem or prompt, 1 ... K response within its group.
        segment_index: [B, T] number of a token's segment in `segments`.
        subtree_end: [B, T] one past the last segment that descends from the token's own; 0 padding.
        logical_positions: [B, T] distance from the start of the group's prompt along (ancestors, own segment); sliding
            windows count these.
        token_inputs: [B, T] further inputs of the model per token, by name.
        gather: [N] flat index (b * T + t) of the hidden state that predicts a scored token.
        target: [N] the scored token's id.
        owner: [N] its response, in [0, R), never decreasing.
        offset: [N] its place within the response.
        row_trees: trees that a row holds, per row.
        segments: the stems, prompts, responses and paddings of all rows in order; they cover every token once. Plain
            numbers, so that attention by segment and forks need not ask the device for them.
        response_segments: [R] which of them each response is.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    segment_index: Tensor
    subtree_end: Tensor
    logical_positions: Tensor
    token_inputs: dict[str, Tensor]
    gather: Tensor
    target: Tensor
    owner: Tensor
    offset: Tensor
    row_trees: list[list[int]]
    segments: list[Segment]
    response_segments: list[int]


def pack(
    groups: Sequence[PromptAndResponses],
    layout: Layout,
    *,
    pad_id: int,
    trees: Sequence[Tree] | None = None,
    groups_per_row: int | None = 1,
    response_types: Mapping[str, int] | None = None,
    multiple: int = 1,
) -> PackedBatch:
    """Lays groups out in rows, padded on the right to the longest.

    Args:
        groups: the G groups of a micro-batch.
        layout: see the module's docstring.
        pad_id: token id of padding.
        trees: which groups share a stem; every group is in one of them. None: each group is alone.
        groups_per_row: packed layout: how many groups, or trees of them, share a row; None puts all in one (for
            attention that skips what is masked). A dense mask wants 1: over several it would be mostly empty.
        response_types: value of a token input within responses; by default that of the last prompt token, which is
            text as they are.
        multiple: rows are padded on to a multiple of so many tokens.

    Returns:
        The rows; scored tokens are in the order of the groups, whichever row or tree they are in.
    """
    trees = trees if trees is not None else [Tree((g,)) for g in range(len(groups))]
    rows = _rows(groups, layout, trees, groups_per_row)
    t = max(sum(length(groups, trees[n], ks) for n, ks in row) for row in rows)
    t = -(-t // multiple) * multiple
    writer = _Writer(groups, len(rows), t, pad_id, response_types or {})
    for i, row in enumerate(rows):
        writer.start(i)
        for n, ks in row:
            writer.tree(trees[n], ks)
        writer.pad()
    segment_index, subtree_end = _numbered(writer.segments, len(rows), t)
    scored = [(g, k) for g, group in enumerate(groups) for k in range(len(group.responses))]
    lengths = [len(groups[g].responses[k]) for g, k in scored]

    return PackedBatch(
        input_ids=writer.input_ids,
        position_ids=writer.position_ids,
        segment_ids=writer.segment_ids,
        segment_index=segment_index,
        subtree_end=subtree_end,
        logical_positions=writer.logical,
        token_inputs=writer.token_inputs,
        gather=torch.cat([writer.predictors[g, k] for g, k in scored]),
        target=torch.cat([groups[g].responses[k] for g, k in scored]),
        owner=torch.arange(len(scored)).repeat_interleave(torch.tensor(lengths)),
        offset=torch.cat([torch.arange(n) for n in lengths]),
        row_trees=[[n for n, _ in row] for row in rows],
        segments=writer.segments,
        response_segments=[writer.response_segments[g, k] for g, k in scored],
    )


# What a row holds: numbers of trees, with those of the responses that it has of their groups (None: all).
_Row = list[tuple[int, list[int] | None]]


def _rows(
    groups: Sequence[PromptAndResponses], layout: Layout, trees: Sequence[Tree], groups_per_row: int | None
) -> list[_Row]:
    if layout == "packed":
        step = groups_per_row or len(trees)
        return [[(n, None) for n in range(i, min(i + step, len(trees)))] for i in range(0, len(trees), step)]
    if layout != "rows":
        raise ValueError(f"layout must be 'packed' or 'rows', not {layout!r}")
    if any(len(tree.groups) > 1 for tree in trees):
        raise ValueError("layout='rows' shares no stems: every response has a row of its own")
    return [[(n, [k])] for n, tree in enumerate(trees) for k in range(len(groups[tree.groups[0]].responses))]


def length(groups: Sequence[PromptAndResponses], tree: Tree, ks: list[int] | None = None) -> int:
    """Tokens of a tree, with the responses `ks` of its groups, or all."""
    total = tree.stem
    for group in (groups[g] for g in tree.groups):
        responses = group.responses if ks is None else [group.responses[k] for k in ks]
        total += len(group.prompt_ids) - tree.stem + sum(map(len, responses))
    return total


class _Writer:
    """Writes segments one after another into the tensors of a batch of `b` rows of `t` tokens.

    Attributes:
        predictors: (group, response) -> [n] flat indices (b * T + t) of the hidden states that predict its tokens.
        response_segments: (group, response) -> the number of its segment.
        others: see `PackedBatch`.
    """

    def __init__(
        self, groups: Sequence[PromptAndResponses], b: int, t: int, pad_id: int, response_types: Mapping[str, int]
    ) -> None:
        self.groups, self.length, self.response_types = groups, t, response_types
        self.input_ids = torch.full((b, t), pad_id, dtype=torch.long)
        self.position_ids = torch.zeros((groups[0].prompt_positions.shape[0], b, t), dtype=torch.long)
        self.segment_ids = torch.full((b, t), PAD_SEGMENT, dtype=torch.long)
        self.logical = torch.zeros((b, t), dtype=torch.long)
        self.token_inputs = {
            name: torch.zeros((b, t), dtype=value.dtype)
            for group in groups
            for name, value in group.token_inputs.items()
        }
        self.segments: list[Segment] = []
        self.predictors: dict[tuple[int, int], Tensor] = {}
        self.response_segments: dict[tuple[int, int], int] = {}
        self.row = self.at = 0

    def start(self, row: int) -> None:
        self.row, self.at = row, 0

    def tree(self, tree: Tree, ks: list[int] | None) -> None:
        """A stem, and the rest of each group behind it."""
        stem = self._prompt(self.groups[tree.groups[0]], slice(0, tree.stem), None) if tree.stem else None
        for g in tree.groups:
            group = self.groups[g]
            size = len(group.prompt_ids)
            prompt = self._prompt(group, slice(tree.stem, size), stem)
            # The largest position, not the number of tokens: an image of w x h merged patches takes max(w, h) positions
            # (Qwen).
            last, restart = self.at - 1, int(group.prompt_positions.max()) + 1
            for k in range(len(group.responses)) if ks is None else ks:
                self._response(group, g, k, prompt, last, restart)

    def pad(self) -> None:
        if self.at < self.length:
            self.segments.append(Segment(self.row, self.at, self.length, padding=True))

    def _prompt(self, group: PromptAndResponses, part: slice, parent: int | None) -> int:
        """The tokens `part` of a prompt."""
        own = self._segment(group.prompt_ids[part], PROMPT_SEGMENT, part.start, parent)
        self.position_ids[:, self.row, own] = group.prompt_positions[:, part]
        for name, value in group.token_inputs.items():
            self.token_inputs[name][self.row, own] = value[part]
        return len(self.segments) - 1

    def _response(self, group: PromptAndResponses, g: int, k: int, prompt: int, last: int, restart: int) -> None:
        """Response `k` of group `g`, behind the segment `prompt`, whose last token is at `last` of the row."""
        ids = group.responses[k]
        own = self._segment(ids, k + 1, len(group.prompt_ids), prompt)
        self.position_ids[:, self.row, own] = restart + torch.arange(len(ids))
        for name, value in group.token_inputs.items():
            self.token_inputs[name][self.row, own] = self.response_types.get(name, value[-1])
        places = torch.cat([torch.tensor([last]), torch.arange(own.start, own.stop - 1)])
        self.predictors[g, k] = self.row * self.length + places
        self.response_segments[g, k] = len(self.segments) - 1

    def _segment(self, ids: Tensor, segment_id: int, before: int, parent: int | None) -> slice:
        """Tokens with `before` others of their sequence before them; returns where they lie in the row."""
        own = slice(self.at, self.at + len(ids))
        self.input_ids[self.row, own] = ids
        self.segment_ids[self.row, own] = segment_id
        self.logical[self.row, own] = before + torch.arange(len(ids))
        self.segments.append(Segment(self.row, own.start, own.stop, parent))
        self.at = own.stop
        return own


def token_uses(packed: PackedBatch, response_uses: Tensor) -> Tensor:
    """[B, T] how often each token would be computed if every use of a response were a row by itself, with its whole
    prompt: padding never. Where no response is used, every token once.

    Args:
        response_uses: fp32 [R].
    """
    uses = [0.0] * len(packed.segments)
    for segment, n in zip(packed.response_segments, response_uses.tolist(), strict=True):
        uses[segment] = n
    if not any(uses):
        return (packed.segment_ids >= 0).float()
    for n in range(len(uses) - 1, -1, -1):  # parents come before what continues them
        parent = packed.segments[n].parent
        if parent is not None:
            uses[parent] += uses[n]
    return torch.tensor(uses)[packed.segment_index]


def _numbered(segments: Sequence[Segment], b: int, t: int) -> tuple[Tensor, Tensor]:
    """[B, T] each: `segment_index` and `subtree_end`."""
    index = torch.empty((b, t), dtype=torch.long)
    end = torch.empty((b, t), dtype=torch.long)
    for n, (s, subtree) in enumerate(zip(segments, subtree_ends(segments), strict=True)):
        index[s.row, s.start : s.end] = n
        end[s.row, s.start : s.end] = subtree
    return index, end


def descends(segment_index: Tensor, subtree_end: Tensor) -> Tensor:
    """bool [B, T, T]: whether a query's segment (dim 1) is a key's (dim 2) or descends from it; never for padding."""
    query, key = segment_index[:, :, None], segment_index[:, None, :]
    return (key <= query) & (query < subtree_end[:, None, :])


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
    mask = descends(segment_index, subtree_end) & (distance >= 0)
    if bidirectional is not None:
        same_block = (bidirectional[:, :, None] == bidirectional[:, None, :]) & (bidirectional >= 0)[:, :, None]
        mask |= same_block & (query == key)
    if window is not None:
        mask &= distance < window
    # softmax over a row without a visible key is NaN, and the NaN would reach every weight in the backward pass.
    return (mask | torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device))[:, None]
