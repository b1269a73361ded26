"""Data loaders of preference groups, and the reading of whatever dataset a user hands over as groups."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from accelerate import Accelerator
from datasets import Dataset, Image, IterableDataset, List
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import ProcessorMixin, TrainingArguments

from silkie.batch.companies import Company
from silkie.batch.encoding import GroupEncoder
from silkie.batch.labels import Labels
from silkie.batch.preparation import prepare_groups
from silkie.batch.preparation_report import PreparationReport
from silkie.batch.sampler import GroupBatchSampler, WithEmptyGroups
from silkie.batch.streaming import StreamedBatches, StreamSampler, check_whole
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


def as_groups(dataset: Any, args: Any, name: str, *, paired: bool = True, cache_dir: str | None = None) -> Dataset:
    """A dataset of preference groups: groups as they are, TRL pair rows and other known formats regrouped.

    Args:
        args: options of the run: `on_bad_row`, `source_format`.
        name: of the dataset in messages.
        paired: drop groups without a pair; False: the losses take no pairs.
        cache_dir: see `load_preferences`.

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
        dataset,
        on_error=args.on_bad_row,
        source_format=args.source_format,
        keep_unpaired=not paired,
        cache_dir=cache_dir,
    )


def prepared_groups(
    dataset: Any,
    encoder: GroupEncoder,
    args: Any,
    name: str,
    *,
    labels: Labels | None,
    cache_dir: str | None = None,
    num_proc: int | None = None,
) -> tuple[Dataset, PreparationReport]:
    """A dataset of any known format as groups that are measured, and what was dropped from it.

    Args:
        args: options of the run.
        name: of the dataset in messages.
        labels: see `prepare_groups`.
        cache_dir: where converted rows are kept; None: the cache of `datasets`.

    Raises:
        What `as_groups` and `prepare_groups` raise.
    """
    groups = as_groups(dataset, args, name, paired=labels is None, cache_dir=cache_dir)
    if len(groups) < len(dataset):
        logger.info(
            "%s: %d rows became %d groups: rows with the same prompt and images are joined, and pairs of identical"
            " responses are dropped. Batch sizes are numbers of groups here and of rows in TRL;"
            " load_preferences(rows, regroup_pairs=False) joins no rows",
            name,
            len(dataset),
            len(groups),
        )
    return prepare_groups(
        without_images(groups, encoder.processor),
        encoder,
        on_bad_row=args.on_bad_row,
        num_proc=num_proc,
        name=name,
        string_rows=args.string_rows,
        labels=labels,
    )


def without_images(dataset: Dataset, processor: Any) -> Dataset:
    """The data of a run with a tokenizer, whose rows are text only, without its column of images.

    Raises:
        ValueError: it has images.
    """
    if isinstance(processor, ProcessorMixin) or "images" not in dataset.column_names:
        return dataset
    if any(row["images"] for row in dataset.select_columns("images")):
        raise ValueError(
            "The data has images, but processing_class is a tokenizer: pass the processor of a vision-language model,"
            " or data without images."
        )
    return dataset.remove_columns("images")


def open_stream(stream: IterableDataset, encoder: GroupEncoder, args: Any, labels: Labels | None) -> StreamedBatches:
    """The micro-batches of a streaming train_dataset; `GroupLoaders.train_stream` says how they are divided.

    Args:
        args: options of the run.

    Raises:
        ValueError: options that a stream cannot serve.
    """
    if args.max_steps <= 0:
        raise ValueError("A streaming train_dataset has no length: set max_steps.")
    if args.precompute_ref_log_probs:
        raise ValueError(
            "`precompute_ref_log_probs` reads the data before training, and a stream is read while it trains: leave it"
            " off, or load the data with streaming=False."
        )
    if args.share_prefix == "image":
        raise ValueError("`share_prefix='image'` looks through all prompts first: load the data with streaming=False.")
    check_whole(stream)
    rows = args.stream_window
    if args.max_tokens_per_batch is None:  # full batches where no prompt repeats
        step = args.per_device_train_batch_size * args.world_size
        rows = max(rows // step, 1) * step
    logger.info(
        "train: a stream, read in windows of %s rows, in its order. Pairs of the same prompt and images are joined"
        " within a window only; the last micro-batches of a window may be smaller than the others; rows are checked"
        " when their window is read, not before training; %d process(es) with %d data worker(s) each read it all",
        f"{rows:,}",
        args.world_size,
        args.dataloader_num_workers,
    )
    if args.dataloader_drop_last:
        logger.info("train: dataloader_drop_last drops the rest of every window of the stream; TRL ignores it there")
    stream = stream if stream.features is None else stream.cast(undecoded(stream.features))
    prepare = partial(_window_groups, encoder=encoder, args=args, labels=labels)
    return StreamedBatches(stream=stream, rows=rows, prepare=prepare)


def _window_groups(
    rows: Dataset, folder: str, *, encoder: GroupEncoder, args: Any, labels: Labels | None
) -> tuple[Dataset, PreparationReport]:
    return prepared_groups(rows, encoder, args, "train", labels=labels, cache_dir=folder)


def read_stream(stream: IterableDataset) -> Dataset:
    """All rows of a stream of evaluation data, in a file of `datasets`' cache."""
    features = None if stream.features is None else undecoded(stream.features)
    stream = stream if features is None else stream.cast(features)
    return Dataset.from_generator(_rows, gen_kwargs={"stream": stream}, features=features)


def _rows(stream: IterableDataset) -> Iterator[Any]:
    yield from stream


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


def _tell_of_lone_groups(sampler: GroupBatchSampler, groups: int, of: str) -> None:
    """Warns of micro-batches in which a group meets no responses of another prompt."""
    lone = sum(len(batch) == 1 and batch[0] < groups for batch in sampler)
    if lone:
        logger.warning(
            "%d of %d micro-batches of %s hold one group: as in TRL, its KL term is estimated on its own responses",
            lone,
            len(sampler),
            of,
        )


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
    train_sampler: GroupBatchSampler | StreamSampler | None = None

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
            as_trl=max(map(len, dataset["response_lengths"])) <= 2,
            drop_last=args.dataloader_drop_last,
            companies=companies,
        )
        if mismatched:
            _tell_of_lone_groups(self.train_sampler, len(dataset), "an epoch")
        return self._loader(_rows_of(dataset), self.train_sampler, args.dataloader_persistent_workers)

    def train_stream(
        self,
        batches: StreamedBatches,
        shapes: Callable[[Dataset], Sequence[tuple[int, int]]],
        *,
        batch_size: int,
        padded: bool,
        mismatched: bool = False,
    ) -> DataLoader:
        """Batches of a stream, as many as the run takes.

        Args:
            shapes: prepared groups -> their shapes. shapes, batch_size, padded: see `GroupBatchSampler`.
            mismatched: prompts also score the responses of other groups in their batch.
        """
        args, world_size = self.args, self.accelerator.num_processes
        batches.begin()
        batches.divide = partial(
            _divided,
            shapes=shapes,
            batch_size=batch_size,
            max_tokens=self.max_tokens,
            world_size=world_size,
            padded=padded,
            shuffle=False,
            drop_last=args.dataloader_drop_last,
            mismatched=mismatched,
        )
        self.train_sampler = StreamSampler(args.max_steps * args.gradient_accumulation_steps * world_size)
        return self._loader(batches, self.train_sampler, args.dataloader_persistent_workers)

    def evaluation(
        self, dataset: Dataset, *, mismatched: bool = False, collate: Callable[[Any], Any] | None = None
    ) -> DataLoader:
        """Every group once over all ranks, in the order of the data: accelerate would repeat some to fill the last
        round, and the loss would count them twice.

        Args:
            mismatched: prompts also score the responses of other groups in their batch.
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
        if mismatched:
            _tell_of_lone_groups(sampler, len(dataset), "an evaluation")
        return self._loader(_rows_of(dataset), sampler, False, collate)

    def _loader(
        self,
        dataset: TorchDataset,
        sampler: GroupBatchSampler | StreamSampler,
        persistent_workers: bool,
        collate: Callable[[Any], Any] | None = None,
    ) -> DataLoader:
        args, accelerator = self.args, self.accelerator
        workers = worker_options(args, -(-len(sampler) // accelerator.num_processes))
        loader = DataLoader(
            dataset,
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


def _rows_of(dataset: Dataset) -> WithEmptyGroups:
    return WithEmptyGroups(dataset.select_columns([c for c in GROUP_COLUMNS if c in dataset.column_names]))


def _divided(
    groups: Dataset, *, shapes: Callable[[Dataset], Sequence[tuple[int, int]]], mismatched: bool, **options: Any
) -> list[list[int]]:
    """The batches of a window."""
    if options["drop_last"] and len(groups) < options["batch_size"] * options["world_size"]:
        return []
    sampler = GroupBatchSampler(shapes(groups), **options)
    if mismatched:
        _tell_of_lone_groups(sampler, len(groups), "a window of the stream")
    return list(sampler)
