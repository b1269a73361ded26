"""Data loaders of preference groups, and the reading of whatever dataset a user hands over as groups."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from datasets import Dataset, Image, IterableDataset, List
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from silkie.batch.companies import Company
from silkie.batch.sampler import GroupBatchSampler, WithEmptyGroups
from silkie.batch.workers import Named, worker_options
from silkie.data import load_preferences
from silkie.data.schema import OPTIONAL, is_group_features

logger = logging.getLogger(__name__)

GROUP_COLUMNS = [
    "id",
    "row",
    "images",
    "prompt",
    "responses",
    "pairs",
    "pair_weights",
    "ratings",
    *OPTIONAL,
]

_MEASURED = {"row", "prompt_length", "response_lengths"}  # what `silkie.batch.preparation` adds


def as_groups(dataset: Any, args: Any, name: str, *, paired: bool = True) -> Dataset:
    """A dataset of preference groups: groups as they are, TRL pair rows and other known formats regrouped.

    Args:
        args: options of the run: `on_bad_row`, `source_format`.
        name: of the dataset in messages.
        paired: drop groups without a pair; False: the losses take no pairs.

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
        counted = ("prompt_length", "response_lengths", "image_digests")
        dataset = dataset.remove_columns([name for name in counted if name in dataset.column_names])
        if len(set(dataset["row"][:])) < len(dataset):  # joined from several: a number must name one row
            dataset = dataset.remove_columns("row")
        return dataset
    # A transform (`with_transform`) hands out other rows than the features declare.
    if is_group_features(dataset.features) and dataset.format["type"] != "custom":
        return dataset
    return load_preferences(
        dataset, on_error=args.on_bad_row, source_format=args.source_format, keep_unpaired=not paired
    )


def read_stream(stream: IterableDataset, args: Any, name: str) -> Dataset:
    """The rows of a stream that a run needs, in a file of `datasets`' cache: of training data as many as its steps
    take, of other data all.

    silkie regroups, measures and checks the rows before training, and resumes by position: it cannot do so with rows
    that it has not read.

    Args:
        args: options of the run.

    Raises:
        ValueError: the number of training rows is not known.
    """
    if name == "train":
        rows = args.stream_rows or _rows_of_run(args)
        stream = stream.take(rows)
        logger.info(
            "train: reading the %s rows of the stream that the run takes before training starts, in their order, and"
            " keeping them on disk; pairs of the same prompt and images among them are joined",
            f"{rows:,}",
        )
    features = None if stream.features is None else undecoded(stream.features)
    stream = stream if features is None else stream.cast(features)
    return Dataset.from_generator(_rows, gen_kwargs={"stream": stream}, features=features)


def _rows(stream: IterableDataset) -> Iterator[Any]:
    yield from stream


def _rows_of_run(args: Any) -> int:
    if args.max_steps <= 0 or args.max_tokens_per_batch is not None:
        missing = "max_steps" if args.max_steps <= 0 else "stream_rows"  # a token budget makes batches of any size
        raise ValueError(f"A streaming train_dataset has no length: set {missing}.")
    return args.max_steps * args.gradient_accumulation_steps * args.per_device_train_batch_size * args.world_size


def undecoded(features: Any) -> Any:
    """Features whose images stay encoded, so that copying them loses nothing."""
    if isinstance(features, Image):
        return Image(decode=False)
    if isinstance(features, dict):
        return type(features)({name: undecoded(feature) for name, feature in features.items()})
    return List(undecoded(features.feature)) if isinstance(features, List) else features


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
        self,
        dataset: Dataset,
        shapes: Sequence[tuple[int, int]],
        *,
        batch_size: int,
        padded: bool,
        shuffle: bool,
        companies: Sequence[Company] = (),
        mismatched: bool = False,
    ) -> DataLoader:
        """Batches of prepared groups, in an order that the seed and the epoch decide.

        Args:
            shapes, batch_size, padded, shuffle, companies: see `GroupBatchSampler`.
            mismatched: prompts also score the responses of other groups in their batch.
        """
        args = self.args
        self.train_sampler = GroupBatchSampler(
            shapes,
            batch_size=batch_size,
            max_tokens=self.max_tokens,
            world_size=self.accelerator.num_processes,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            padded=padded,
            shuffle=shuffle,
            drop_last=args.dataloader_drop_last,
            companies=companies,
        )
        lone = sum(len(batch) == 1 and batch[0] < len(dataset) for batch in self.train_sampler) if mismatched else 0
        if lone:
            logger.warning(
                "%d of %d micro-batches of an epoch hold one group: as in TRL, its KL term is estimated on its own"
                " responses",
                lone,
                len(self.train_sampler),
            )
        return self._loader(dataset, self.train_sampler, persistent_workers=args.dataloader_persistent_workers)

    def evaluation(self, dataset: Dataset, *, collate: Callable[[Any], Any] | None = None) -> DataLoader:
        """Every group once over all ranks, in the order of the data: accelerate would repeat some to fill the last
        round, and the loss would count them twice.

        Args:
            collate: in place of the run's own.
        """
        sampler = GroupBatchSampler(
            # Without a token budget the shapes decide nothing.
            [(1, 1)] * len(dataset),
            batch_size=self.args.eval_batch_size,
            world_size=self.accelerator.num_processes,
            shuffle=False,
            drop_last=self.args.dataloader_drop_last,
        )
        return self._loader(dataset, sampler, persistent_workers=False, collate=collate)

    def _loader(
        self,
        dataset: Dataset,
        sampler: GroupBatchSampler,
        *,
        persistent_workers: bool,
        collate: Callable[[Any], Any] | None = None,
    ) -> DataLoader:
        args, accelerator = self.args, self.accelerator
        workers = worker_options(args, -(-len(sampler) // accelerator.num_processes))
        loader = DataLoader(
            # Workers decode every column of a row that they read, so they get those that the collator reads.
            WithEmptyGroups(dataset.select_columns([c for c in GROUP_COLUMNS if c in dataset.column_names])),
            batch_sampler=sampler,
            collate_fn=Named(collate if collate is not None else self.collate),
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=persistent_workers and bool(workers),
            **workers,
        )
        even = accelerator.even_batches
        accelerator.even_batches = False  # the sampler has made the batches even without repeating groups
        try:
            return accelerator.prepare(loader)
        finally:
            accelerator.even_batches = even
