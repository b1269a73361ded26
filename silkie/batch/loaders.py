"""Data loaders of preference groups, and the reading of whatever dataset a user hands over as groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from silkie.batch.preparation import OnBadRow
from silkie.batch.sampler import GroupBatchSampler, WithEmptyGroups
from silkie.data import load_preferences
from silkie.data.schema import ROW_FORM, is_group_features

GROUP_COLUMNS = [
    "id",
    "row",
    "images",
    "prompt",
    "responses",
    "pairs",
    "pair_weights",
    "ratings",
    *ROW_FORM,
]

_MEASURED = {"row", "prompt_length", "response_lengths"}  # what `silkie.batch.preparation` adds


def as_groups(dataset: Any, *, on_bad_row: OnBadRow, name: str, source_format: str | None = None) -> Dataset:
    """A dataset of preference groups: groups as they are, TRL pair rows and other known formats regrouped.

    Args:
        name: of the dataset in messages.
        source_format: see `load_preferences`.

    Raises:
        TypeError: it is not a `datasets.Dataset`.
        silkie.data.DataError: rows of no known format, or a broken row.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"The {name} data must be a datasets.Dataset of preference groups or pair rows, not"
            f" {type(dataset).__name__}: pass what silkie.data.load_preferences returns, one split of a"
            " DatasetDict, or Dataset.from_list(rows)."
        )
    if set(dataset.column_names) >= _MEASURED:
        # Prepared by another trainer, whose encoder may have counted other tokens: it must be measured again.
        dataset = dataset.remove_columns(["prompt_length", "response_lengths"])
        if len(set(dataset["row"])) < len(dataset):  # joined from several: a number must name one row
            dataset = dataset.remove_columns("row")
        return dataset
    if is_group_features(dataset.features) and dataset.format["type"] != "custom":
        return dataset
    return load_preferences(dataset, on_error=on_bad_row, source_format=source_format)


def is_prepared(dataset: Any) -> bool:
    """Whether a dataset has been through `prepare_groups`; one given to `evaluate` has not."""
    return isinstance(dataset, Dataset) and "row" in dataset.column_names


@dataclass(slots=True, kw_only=True)
class GroupLoaders:
    """The data loaders of a run; accelerate deals their batches to the ranks.

    Attributes:
        collate: rows -> micro-batch.
        accelerator: of the run.
        args: seeds, batch sizes and loader options.
        max_tokens: token budget of a training batch; None: a fixed number of groups.
        train_sampler: sampler of the training loader, once there is one.
    """

    collate: Callable[[Any], Any]
    accelerator: Accelerator
    args: TrainingArguments
    max_tokens: int | None
    train_sampler: GroupBatchSampler | None = None

    def train(
        self, dataset: Dataset, shapes: Sequence[tuple[int, int]], *, batch_size: int, padded: bool
    ) -> DataLoader:
        """Batches of prepared groups, in an order that the seed and the epoch decide.

        Args:
            shapes, batch_size, padded: see `GroupBatchSampler`.
        """
        args = self.args
        self.train_sampler = GroupBatchSampler(
            shapes,
            batch_size=batch_size,
            max_tokens=self.max_tokens,
            world_size=self.accelerator.num_processes,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            padded=padded,
        )
        return self._loader(dataset, self.train_sampler, persistent_workers=args.dataloader_persistent_workers)

    def evaluation(self, dataset: Dataset) -> DataLoader:
        """Every group once over all ranks: accelerate would repeat some to fill the last round, and the loss would
        count them twice."""
        sampler = GroupBatchSampler(
            [(1, 1)] * len(dataset), batch_size=self.args.eval_batch_size, world_size=self.accelerator.num_processes
        )
        return self._loader(dataset, sampler, persistent_workers=False)

    def _loader(self, dataset: Dataset, sampler: GroupBatchSampler, *, persistent_workers: bool) -> DataLoader:
        args, accelerator = self.args, self.accelerator
        loader = DataLoader(
            WithEmptyGroups(dataset.select_columns([c for c in GROUP_COLUMNS if c in dataset.column_names])),
            batch_sampler=sampler,
            collate_fn=self.collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        even = accelerator.even_batches
        accelerator.even_batches = False  # the sampler has made the batches even without repeating groups
        try:
            return accelerator.prepare(loader)
        finally:
            accelerator.even_batches = even
