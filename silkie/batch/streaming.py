"""Training on a stream (`datasets.IterableDataset`): its rows are read in windows, and each window is regrouped,
measured and divided into micro-batches by itself. Memory and disk hold one window, whatever the length of the stream.

A window depends on its number alone, so a run is resumed by position: the stream is moved to the window of the last
batch, and nothing before it is regrouped or processed again.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

from silkie.batch.preparation_report import PreparationReport
from silkie.batch.sampler import WithEmptyGroups
from silkie.batch.workers import BatchError
from silkie.data.schema import DataError, NoGroupLeft

logger = logging.getLogger(__name__)


class Window(NamedTuple):
    """Where a window is: how often the stream had ended before it, its number since then, and the number of batches (of
    all ranks) before it."""

    passes: int
    number: int
    first: int


_START = Window(0, 0, 0)


def check_whole(stream: IterableDataset) -> None:
    """Refuses a stream that was divided over processes: silkie deals its batches to the ranks, so every process must
    read all rows. Of a divided one, each would read its part and train on a part of that.

    Raises:
        ValueError: `datasets.distributed.split_dataset_by_node` has divided it.
    """
    if getattr(stream, "_distributed", None) is not None:
        raise ValueError(
            "The streaming train_dataset was divided with split_dataset_by_node; silkie divides its batches over the"
            " processes itself: pass the whole stream on every process."
        )


@dataclass(slots=True)
class StreamedBatches(TorchDataset):
    """Micro-batch i of a stream, as a list of rows; batches are asked for in rising order. Every process and data
    worker that reads batches reads the whole stream.

    Attributes:
        stream: rows, in the order in which they are trained on.
        rows: rows of a window.
        prepare: raw rows, a folder for its cache -> prepared groups, and what was dropped. Raises `NoGroupLeft` where
            none of them can be trained on.
        divide: prepared groups -> the batches of all ranks in turn.
        start: the window with which the next reading begins; `begin` takes it.
    """

    stream: IterableDataset
    rows: int
    prepare: Callable[[Dataset, str], tuple[Dataset, PreparationReport]]
    divide: Callable[[Dataset], list[list[int]]] = list
    start: Window = _START
    _at: Window = _START
    _groups: Dataset | None = None
    _batches: list[list[int]] = field(default_factory=list)
    _ahead: Iterator[dict[str, list[Any]]] | None = None
    _found: bool = True  # whether this pass had a batch; a resumed run begins within one that had

    def first_window(self) -> tuple[Dataset, PreparationReport]:
        """Its prepared groups, by which the run's layout and aspects are settled, and what was dropped from them.

        Raises:
            NoGroupLeft: none of its rows can be trained on.
        """
        for raw in self._windows(0, 0):
            return self._prepared(raw, 0)
        raise NoGroupLeft("The streaming train_dataset has no rows.")

    def begin(self) -> None:
        """Forgets what was read and moves to `start`, or to the first window where nothing has set it since."""
        self._at, self.start = self.start, _START
        self._groups, self._batches, self._ahead, self._found = None, [], None, True

    def __getitems__(self, indices: list[int]) -> list[Mapping[str, Any]]:
        (index,) = indices
        while self._groups is None or index >= self._at.first + len(self._batches):
            self._advance()
        if index < self._at.first:
            raise IndexError(f"batch {index} of a stream lies before window {self._at}")
        table = WithEmptyGroups(self._groups)
        rows = table.__getitems__(self._batches[index - self._at.first])
        return [{**row, "window": self._at} for row in rows]

    def _advance(self) -> None:
        """Moves to the next window that has batches, or to `_at` where none was read yet."""
        passes, number, first = self._at
        if self._groups is not None:
            number, first = number + 1, first + len(self._batches)
        while True:
            if self._ahead is None:
                self._ahead = self._windows(passes, number)
            raw = next(self._ahead, None)
            if raw is None:
                if not self._found:
                    raise NoGroupLeft(f"Pass {passes + 1} over the streaming train_dataset has no row to train on.")
                passes, number, self._ahead, self._found = passes + 1, 0, None, False
                logger.info("the stream has ended and is read again, pass %d", passes + 1)
                continue
            try:
                self._groups, _ = self._prepared(raw, number)
                self._batches = self.divide(self._groups)
            except NoGroupLeft as error:
                logger.warning("skipping window %d of the stream: %s", number, error)
                self._batches = []
            if self._batches:
                self._at, self._found = Window(passes, number, first), True
                return
            number += 1

    def _prepared(self, raw: dict[str, list[Any]], number: int) -> tuple[Dataset, PreparationReport]:
        with tempfile.TemporaryDirectory(prefix="silkie-window-") as folder:
            try:
                groups, report = self.prepare(Dataset.from_dict(raw, features=self.stream.features), folder)
            except NoGroupLeft:
                raise
            except DataError as error:  # of one message, which PyTorch can raise anew outside of a worker
                first = self.rows * number
                raise BatchError(
                    f"{error} Rows are counted within a window of the stream; this one begins at its row {first:,}."
                ) from error
            groups = Dataset.from_list(groups.to_list(), features=groups.features)  # the folder is deleted
        numbers = [self.rows * number + row for row in groups["row"]]
        return groups.remove_columns("row").add_column("row", numbers), report

    def _windows(self, passes: int, number: int) -> Iterator[dict[str, list[Any]]]:
        """Columns of raw rows, window by window, from window `number` on.

        Of the ways through a stream, `iter` alone gives every data worker all rows: a plain loop gives each a part.
        `skip` would make another stream, which begins at epoch 0 and keeps the order of its shards."""
        self.stream.set_epoch(passes)
        return islice(self.stream.iter(batch_size=self.rows), number, None)


class StreamSampler(Sampler[list[int]]):
    """The numbers of the batches of a run, one batch each.

    Args:
        batches: of all ranks together.
    """

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.batch_size = 1
        self.finished = False  # True: the next pass yields nothing

    def set_epoch(self, epoch: int) -> None:
        """A run on a stream is one epoch; passes over the stream are counted apart."""

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter([] if self.finished else [[i] for i in range(self.batches)])
