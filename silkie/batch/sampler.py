"""Batches of preference groups: a fixed number per batch, or as many as fit a token budget.

Every group comes exactly once an epoch, in an order that depends on the seed and the epoch alone. The batches of one
optimizer step cost about the same, so that ranks do not wait for each other; the number of batches is the same in every
epoch, so that a run can be resumed by counting. Groups that share the beginning of their prompts (companies) come
together.
"""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from silkie.batch.companies import Company

logger = logging.getLogger(__name__)

# Tokens. Groups with equal row counts whose lengths fall into one step are exchangeable when batches are drawn.
_COST_STEP = 64


class GroupBatchSampler(Sampler[list[int]]):
    """Yields the batches of all ranks in turn: batch i belongs to rank i % world_size, as accelerate's
    `BatchSamplerShard` deals them out.

    Args:
        shapes: (rows, tokens of the longest row) of each group, in the run's layout.
        batch_size: groups per batch; ignored with a token budget.
        max_tokens: token budget of a batch, padding included. A group above it is a batch by itself.
        world_size: number of ranks; the number of batches is a multiple of it.
        seed: decides the order, with the epoch.
        padded: rows are padded to the longest, so a batch costs (rows) * (longest row); False: the sum of its groups.
        shuffle: False keeps the order of the data in every epoch, whatever the companies.
        as_trl: shuffle as transformers and accelerate do, so that rows of pairs come in TRL's order.
        drop_last: leave out the groups that do not fill a batch of every rank; not with a token budget, whose batches
            are filled.
        companies: groups that come into one batch, as one row, where it has the places. None is above the token budget.

    Where the last round has fewer groups than ranks, indices beyond the dataset fill it up: `WithEmptyGroups` turns
    them into copies of weight 0, which keep a rank busy and do not change the loss.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        *,
        batch_size: int,
        max_tokens: int | None = None,
        world_size: int = 1,
        seed: int = 0,
        padded: bool = True,
        shuffle: bool = True,
        as_trl: bool = False,
        drop_last: bool = False,
        companies: Sequence[Company] = (),
    ) -> None:
        if max_tokens is not None and max_tokens <= 0:
            raise ValueError(f"max_tokens_per_batch must be positive, not {max_tokens}.")
        self.shapes = list(shapes)
        self.batch_size, self.max_tokens, self.padded = batch_size, max_tokens, padded
        self.world_size, self.seed = world_size, seed
        self.shuffle, self.as_trl = shuffle, as_trl
        if drop_last and max_tokens is None and len(self.shapes) < batch_size * world_size:
            raise ValueError(
                f"dataloader_drop_last leaves no batch: {len(self.shapes)} groups for batches of {batch_size} on"
                f" {world_size} rank(s)."
            )
        self.drop_last = drop_last
        self.epoch = 0
        self.finished = False  # True: the next pass yields nothing
        companies = companies if shuffle else ()
        together = {g for company in companies for g in company.groups}
        self._units = [company.groups for company in companies] + [
            (g,) for g in range(len(self.shapes)) if g not in together
        ]
        lengths = [length for _, length in self.shapes]
        self._unit_shapes = [(1, company.tokens(lengths)) for company in companies]
        self._unit_shapes += [self.shapes[g] for (g,) in self._units[len(companies) :]]
        self._sizes = self._budget_sizes() if max_tokens is not None else None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        if self.drop_last and self._sizes is None:
            return len(self.shapes) // (self.batch_size * self.world_size) * self.world_size
        n = len(self._sizes) if self._sizes is not None else -(-len(self.shapes) // self.batch_size)
        return -(-n // self.world_size) * self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        if self.finished:
            return
        # accelerate's rule is seed + epoch; elsewhere a large factor: with seed + epoch, seed 1 would repeat the second
        # epoch of seed 0 in its first.
        factor = 1 if self.as_trl else 1_000_003
        generator = torch.Generator().manual_seed(self.seed * factor + self.epoch)
        order = list(range(len(self._units)))
        if self.shuffle:
            order = torch.randperm(len(order), generator=generator).tolist()
        if self._sizes is None:
            batches = _filled([self._units[u] for u in order], self.batch_size)
            if self.drop_last:
                batches = batches[: len(self)]
        else:
            # A stable sort keeps the shuffled order of exchangeable groups: batches differ between epochs, their sizes
            # do not.
            if self.shuffle:
                order.sort(key=self._step)
            batches, at = [], 0
            for size in self._sizes:
                batches.append([g for u in order[at : at + size] for g in self._units[u]])
                at += size
        batches = self._fill(batches)
        if self._sizes is None or not self.shuffle:
            yield from batches
            return
        # Rounds are shuffled, not batches: those of one round were cut from the same range of lengths and cost about
        # the same.
        rounds = [batches[i : i + self.world_size] for i in range(0, len(batches), self.world_size)]
        for i in torch.randperm(len(rounds), generator=generator).tolist():
            yield from rounds[i]

    def _step(self, index: int) -> tuple[int, int]:
        """Units of equal step are exchangeable: (length in steps, rows)."""
        rows, length = self._unit_shapes[index]
        return -(-length // _COST_STEP), rows

    def _budget_sizes(self) -> list[int]:
        """Units in each batch, for units sorted by step, or in the order of the data."""
        assert self.max_tokens is not None
        sizes, count, in_batch, total, longest = [], 0, 0, 0, 0
        units = [self._step(i) for i in range(len(self._units))]
        for steps, rows in sorted(units) if self.shuffle else units:
            # Rounded up, so that any unit of a step fits where another was: the sizes hold for every epoch's order.
            length = steps * _COST_STEP
            longer = max(longest, length) * (in_batch + rows) if self.padded else total + length * rows
            if count and longer > self.max_tokens:
                sizes.append(count)
                count, in_batch, total, longest = 0, 0, 0, 0
            count, in_batch, total = count + 1, in_batch + rows, total + length * rows
            longest = max(longest, length)
        if count:
            sizes.append(count)
        # Split the largest, so that every rank has a batch in every round
        while len(sizes) % self.world_size and max(sizes) > 1:
            largest = max(range(len(sizes)), key=lambda i: (sizes[i], i))
            half = sizes[largest] // 2
            sizes[largest : largest + 1] = [sizes[largest] - half, half]
        return sizes

    def _fill(self, batches: list[list[int]]) -> list[list[int]]:
        """Adds batches until every rank has one in every round."""
        missing = len(self) - len(batches)
        if not missing:
            return batches
        if self._sizes is None:  # spread the last round's groups over the ranks before any rank gets an empty copy
            tail = [i for batch in batches[len(self) - self.world_size :] for i in batch]
            batches = batches[: len(self) - self.world_size]
            share, extra = divmod(len(tail), self.world_size)
            at = 0
            for rank in range(self.world_size):
                size = share + (rank < extra)
                batches.append(tail[at : at + size])
                at += size
        while len(batches) < len(self):
            batches.append([])
        # A copy of weight 0 still runs forward and backward, since sharded models gather their weights in step.
        cheapest = min(range(len(self.shapes)), key=lambda i: self.shapes[i][0] * self.shapes[i][1])
        return [batch or [len(self.shapes) + cheapest] for batch in batches]


def _filled(units: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Batches of `size` groups (the last one: of what is left). Each starts with the next unit and is filled with the
    largest that fit, so that small ones are left for small places; where none fits, a unit is divided."""
    waiting: dict[int, deque[tuple[int, Sequence[int]]]] = defaultdict(deque)  # by size, each in order
    for place, unit in enumerate(units):
        waiting[len(unit)].append((place, unit))
    batches: list[list[int]] = [[]]
    while any(waiting.values()):
        room = size - len(batches[-1])
        if not room:
            batches.append([])
            continue
        heads = {n: queue[0][0] for n, queue in waiting.items() if queue}
        fitting = [n for n in heads if n <= room]
        n = max(fitting) if batches[-1] and fitting else min(heads, key=lambda n: heads[n])
        place, unit = waiting[n].popleft()
        batches[-1] += unit[:room]
        if n > room:
            waiting[n - room].appendleft((place, unit[room:]))
    return batches if batches[-1] else batches[:-1]


@dataclass(slots=True)
class WithEmptyGroups(Dataset):
    """A dataset of n rows; index n + i is row i with all weights 0, of pairs and labels."""

    rows: Any

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if index < len(self.rows):
            return self.rows[index]
        row = dict(self.rows[index - len(self.rows)])
        return {**row, "pair_weights": [0.0] * len(row["pairs"]), "empty": True}

    def __getitems__(self, indices: list[int]) -> list[Mapping[str, Any]]:
        return [self[i] for i in indices]
