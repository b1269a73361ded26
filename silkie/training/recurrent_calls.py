"""How often the recurrent mixers of a run are called per forward pass, chosen from the lengths of its own batches
before training. Every rank draws the same batches, so all choose the same. Legend: G groups.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset

from silkie.batch.companies import Company
from silkie.batch.packing import Segment
from silkie.batch.sampler import GroupBatchSampler
from silkie.config import SilkieDPOConfig
from silkie.model.layout import LayoutChoice
from silkie.model.recurrent import count_recurrent
from silkie.model.recurrent.calls import choose_calls
from silkie.model.recurrent.plan import SHORTEST, row_lengths

_BATCHES = 128  # that are looked at; the share of padding is then known to about a hundredth


def settle(
    choice: LayoutChoice, config: Any, args: SilkieDPOConfig, dataset: Dataset, companies: Sequence[Company]
) -> LayoutChoice:
    """The choice with the calls of a run; itself where no layer is recurrent or every response has a row of its own.

    Args:
        config: of the model.
        args: options of the run.
        dataset: prepared training groups.
        companies: of the training groups.
    """
    if choice.layout == "rows" or not count_recurrent(config):
        return choice
    batches = list(
        GroupBatchSampler(
            choice.shapes(dataset),
            batch_size=args.per_device_train_batch_size,
            max_tokens=args.max_tokens_per_batch,
            world_size=args.world_size,
            seed=args.seed,
            padded=choice.groups_per_row == 1,
            shuffle=args.train_sampling_strategy == "random",
            companies=companies,
        )
    )
    batches = random.Random(args.seed).sample(batches, min(len(batches), _BATCHES))
    lengths = list(zip(dataset["prompt_length"], dataset["response_lengths"], strict=True))
    found = {g: company for company in companies for g in company.groups}
    start = choice.calls_without_padding
    rows = [row_lengths(_segments([g % len(lengths) for g in batch], lengths, found), start) for batch in batches]
    calls, told = choose_calls(start, rows, SHORTEST)
    return replace(choice, calls=calls, calls_reason=f"{told}, over {len(batches)} batches of the data")


def _segments(
    batch: Sequence[int], lengths: Sequence[tuple[int, Sequence[int]]], companies: Mapping[int, Company]
) -> list[Segment]:
    """The segments of a batch, one after another.

    Args:
        batch: numbers of groups.
        lengths: [G of the dataset] tokens of the prompt, and of each response.
        companies: the company of each group that has one.
    """
    found: list[Segment] = []

    def add(length: int, parent: int | None) -> int:
        at = found[-1].end if found else 0
        found.append(Segment(0, at, at + length, parent))
        return len(found) - 1

    trees: dict[Any, list[int]] = {}
    for g in batch:
        trees.setdefault(companies.get(g, g), []).append(g)
    for company, groups in trees.items():
        stem = company.stem if len(groups) > 1 else 0
        root = add(stem, None) if stem else None
        for g in groups:
            prompt = add(lengths[g][0] - stem, root)
            for response in lengths[g][1]:
                add(response, prompt)
    return found
