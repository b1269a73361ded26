"""How often a recurrent mixer is called in a forward pass, and which rows a call holds.

The rows of a call are padded to its longest. Where lengths differ much, several calls of like rows pad less; but every
call is as many launches again on a GPU, and under ZeRO-3 and FSDP2 one more gathering of the mixer's weights, for which
all ranks must call equally often. So the number of calls is chosen once, from the data of the run, and kept for every
batch and rank. Legend: S rows, L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

MOST_CALLS = 4  # of one level
ENOUGH_PADDING = 0.15  # of the tokens of a level's calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """Calls of a mixer per forward pass, by level of the tree of segments.

    Attributes:
        roots: calls of what continues nothing: prompts, and the stems that prompts share.
        between: levels between roots and leaves, each of one call: 1 where prompts may share a stem.
        leaves: calls of the responses.
    """

    roots: int = 1
    between: int = 0
    leaves: int = 1

    @property
    def levels(self) -> list[int]:
        """The calls of each level, from the roots on."""
        return [self.roots, *[1] * self.between, self.leaves]

    @property
    def total(self) -> int:
        return sum(self.levels)


CALLS = Calls()  # prompts, responses
SHARED_CALLS = Calls(between=1)  # where prompts may share a stem: stems, the rest of prompts, responses


def buckets(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Rows as at most `count` calls (none is empty) with the fewest padded tokens, each a list of indices.

    An optimal call is a run of rows sorted by length. Rows of equal length need no border between them, so the search
    is over the distinct lengths, O(distinct lengths squared * count).

    Args:
        lengths: [S].
    """
    order = sorted(range(len(lengths)), key=lambda n: lengths[n])
    ends = [n for n in range(1, len(order) + 1) if n == len(order) or lengths[order[n - 1]] < lengths[order[n]]]
    # per number of calls: end of the sorted rows -> (tokens with padding, where its last call starts)
    best: list[dict[int, tuple[int, int]]] = [{0: (0, 0)}]
    for _ in range(min(count, len(ends))):
        best.append(
            {
                end: min((tokens + (end - start) * lengths[order[end - 1]], start) for start, (tokens, _) in before)
                for end in ends
                if (before := [(start, cost) for start, cost in best[-1].items() if start < end])
            }
        )
    found, end = [], len(order)
    for level in reversed(best[1:]):
        start = level[end][1]
        found.append(sorted(order[start:end]))
        end = start
    return found[::-1]


def padding(batches: Sequence[Sequence[int]], count: int, shortest: int = 1) -> float:
    """The share of padding among the tokens of a level's calls, over batches of row lengths.

    Args:
        shortest: tokens of a call's row at least.
    """
    real = run = 0
    for lengths in batches:
        real += sum(lengths)
        parts = buckets(lengths, count)
        run += sum(len(part) * max(shortest, *(lengths[n] for n in part)) for part in parts)
        run += shortest * (count - len(parts))  # calls are made whether there are rows for them or not
    return 1 - real / run if run else 0.0


def enough(share: Callable[[int], float]) -> int:
    """The fewest calls whose share of padding is small; where none is, those with the least."""
    shares = {count: share(count) for count in range(1, MOST_CALLS + 1)}
    return next((n for n in shares if shares[n] < ENOUGH_PADDING), min(shares, key=lambda n: shares[n]))


def choose_calls(
    start: Calls, batches: Sequence[tuple[Sequence[int], Sequence[int]]], shortest: int
) -> tuple[Calls, str]:
    """The calls of a run, and a sentence on what they pad.

    Args:
        start: the calls of a run whose rows are of equal length.
        batches: lengths of the rows of roots and of leaves, in batches like those of the run.
        shortest: see `padding`.
    """
    roots, leaves = [r for r, _ in batches], [n for _, n in batches]
    chosen = replace(
        start,
        roots=enough(lambda count: padding(roots, count)),
        leaves=enough(lambda count: padding(leaves, count, shortest)),
    )
    told = [
        f"{what} in {count} call{'s' if count > 1 else ''}, {padding(rows, count, least):.0%} padding"
        + (f" (in one: {padding(rows, 1, least):.0%})" if count > 1 else "")
        for what, rows, count, least in (
            ("prompts", roots, chosen.roots, 1),
            ("responses", leaves, chosen.leaves, shortest),
        )
    ]
    return chosen, "; ".join(told)
