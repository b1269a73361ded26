"""How recurrent layers run a packed batch: the tokens that each call of a mixer holds, and whose states its rows start
from.

Legend: B rows, T tokens of a row, S segments of a call, L tokens of a call's row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from silkie.batch.packing import Segment
from silkie.model.recurrent.calls import CALLS, Calls, buckets

# A mixer that has a state takes a single token for a decoding step, whose kernels have no backward pass.
SHORTEST = 2


@dataclass(slots=True, kw_only=True)
class Call:
    """One call of a mixer.

    Attributes:
        tokens: [S, L] flat indices (b * T + t) of the tokens, 0 at padding.
        mask: [S, L] True at tokens; None where padding needs no mask: there is none, or it lies on the right, after
            everything that is read.
        parent: [S] the row, counted over all calls of earlier levels, whose states a row starts from; None for roots.
        continued: whether rows of later calls start from the states that this call leaves.
    """

    tokens: Tensor
    mask: Tensor | None
    parent: Tensor | None
    continued: bool


@dataclass(slots=True, kw_only=True)
class ForkPlan:
    """How a mixer runs a packed batch.

    Attributes:
        calls: in order.
        places: [B * T] where a token's output lies in the outputs of all calls, flat and one after another; the padding
            of the batch points at a zero behind them.
    """

    calls: list[Call]
    places: Tensor


def fork_plan(segments: Sequence[Segment], row_length: int, device: torch.device, *, calls: Calls = CALLS) -> ForkPlan:
    """The plan of packed rows of `row_length` tokens. Made of plain numbers: nothing is asked of the device.

    Args:
        segments: see `silkie.batch.packing`.
        calls: calls of a mixer, with at least as many levels as the tree has. Fixed for a run, see
            `silkie.model.recurrent.calls`.

    Raises:
        ValueError: the tree has more levels.
    """
    made, offset = [], 0
    n_rows = 1 + max(s.row for s in segments)
    places = torch.full((n_rows * row_length,), torch.iinfo(torch.long).max)
    levels = _rows(segments, row_length, calls)
    for number, level in enumerate(levels):
        last = number == len(levels) - 1
        for rows in level:
            length = max([SHORTEST if number else 1, *(len(row.tokens) for row in rows)])
            padded = _pad([row.tokens for row in rows], length, left=not last)
            here, real = offset + torch.arange(padded.numel()).view_as(padded), padded >= 0
            # of a token that runs several times (see `_rows`) the first output is taken
            places.scatter_reduce_(0, padded[real], here[real], "amin")
            made.append(
                Call(
                    tokens=padded.clamp(min=0).to(device, non_blocking=True),
                    mask=None if last or bool(real.all()) else real.to(device, non_blocking=True),
                    parent=torch.tensor([r.parent for r in rows]).to(device, non_blocking=True) if number else None,
                    continued=not last,
                )
            )
            offset += padded.numel()
    return ForkPlan(calls=made, places=places.clamp(max=offset).to(device, non_blocking=True))


def row_lengths(segments: Sequence[Segment], calls: Calls) -> tuple[list[int], list[int]]:
    """Tokens of the rows of roots and of leaves, in a plan of these segments."""
    levels = _rows(segments, max(s.end for s in segments), calls)
    roots, leaves = (
        [len(row.tokens) for rows in level for row in rows if len(row.tokens)] for level in levels[:: len(levels) - 1]
    )
    return roots, leaves


@dataclass(slots=True)
class _Row:
    """Tokens of a call's row (flat indices), and the earlier row whose states it starts from."""

    tokens: Tensor
    parent: int = 0


def _rows(segments: Sequence[Segment], row_length: int, calls: Calls) -> list[list[list[_Row]]]:
    """The rows of each call of each level: roots in the first level, leaves in the last, and between them a level of
    inner segments each.

    Padding decays a state, on whichever side of a row that starts from one. Roots start from none and are padded on the
    left; what leaves leave behind is read by nobody. Inner segments are cut to the shortest of their call instead, and
    each child runs what was cut off before its own tokens, as a copy.
    """
    state: dict[int, int] = {}  # segment -> the row that has left its states
    rest: dict[int, Tensor] = {}  # segment -> its tokens that this row has not seen
    levels: list[list[list[_Row]]] = []
    kept = 0
    for number, (level, count) in enumerate(zip(_by_level(segments, calls), calls.levels, strict=True)):
        own = {}
        for n in level:
            s = segments[n]
            tokens = s.row * row_length + torch.arange(s.start, s.end)
            own[n] = tokens if s.parent is None else torch.cat([rest[s.parent], tokens])
        between = 0 < number < len(calls.levels) - 1
        cut = min((len(t) for t in own.values()), default=0)
        if between and cut < SHORTEST:
            cut = 0  # too short for a row: the children run them whole
        parts = buckets([len(tokens) for tokens in own.values()], 1 if between else count)
        levels.append([])
        for part in parts + [[]] * (count - len(parts)):
            rows: list[_Row] = []
            for n in (level[i] for i in part):
                size, parent = cut if between else len(own[n]), segments[n].parent
                rest[n] = own[n][size:]
                before = 0 if parent is None else state[parent]
                state[n] = kept + len(rows) if size else before
                if size:
                    rows.append(_Row(own[n][:size], before))
            # without rows the call is made all the same; nothing reads it
            levels[-1].append(rows or [_Row(torch.zeros(0, dtype=torch.long))])
            kept += len(levels[-1][-1])
    return levels


def _by_level(segments: Sequence[Segment], calls: Calls) -> list[list[int]]:
    """The segments of each level.

    Raises:
        ValueError: the tree has more levels than `calls`.
    """
    inner, last = {s.parent for s in segments}, len(calls.levels) - 1
    levels: list[list[int]] = [[] for _ in calls.levels]
    depth: dict[int, int] = {}
    for n, s in enumerate(segments):
        if s.padding:
            continue
        depth[n] = 0 if s.parent is None else depth[s.parent] + 1
        if depth[n] > last:
            raise ValueError(f"The tree of segments is deeper than the {last + 1} levels of a mixer's calls.")
        levels[0 if s.parent is None else depth[n] if n in inner else last].append(n)
    return levels


def _pad(rows: list[Tensor], length: int, *, left: bool) -> Tensor:
    """[S, length], -1 at padding."""
    padded = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left" if left else "right")
    missing = length - padded.shape[1]
    return nn.functional.pad(padded, (missing, 0) if left else (0, missing), value=-1)
