"""The processes that prepare data beside the training process: how many, and how they fail.

Images are decoded and processed in workers of the data loader, so that a step never waits for them. The numbers are
chosen from the cores that this process may use and from the ranks that share them.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from silkie.batch.encoding import row_name
from silkie.data.schema import DataError
from silkie.io.control_groups import own_groups

MOST_WORKERS = 8  # of a rank: a group takes about 50 ms of a core, a step of a GPU several times that
ROWS_PER_PROCESS = 512  # fewer are measured sooner than another process starts
_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")


class BatchError(DataError):
    """The groups of a micro-batch cannot be encoded. Names them.

    PyTorch raises an error of a worker anew, with the worker's traceback in the message; here that becomes a note.
    """

    def __init__(self, message: str) -> None:
        traceback, mark, own = message.rpartition(f"{__name__}.BatchError: ")
        super().__init__(own.strip() if mark else message)
        if mark:
            self.add_note(f"The traceback of the worker process:\n{traceback}")


class WorkerDied(RuntimeError):
    """A worker process of the data loader was ended from outside."""


def cores() -> int:
    """Processor cores that this process may use: those that it is bound to, as far as a container's quota goes."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    return max(1, min(bound, int(quota)) if quota is not None else bound)


def _quota(mount: Path, membership: Path) -> float | None:
    """Cores that the control groups of this process allow; None where they set no limit."""
    limits = []
    for version, folder in own_groups("cpu", mount, membership):
        try:
            if version == 2:
                allowed, period = (folder / "cpu.max").read_text().split()
            else:
                allowed, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
            limits += [] if allowed in ("max", "-1") else [int(allowed) / int(period)]
        except (OSError, ValueError):
            continue
    return min(limits, default=None)


def ranks_here() -> int:
    """Training processes on this machine, which share its cores, as the launcher says."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def data_workers() -> int:
    """Workers of a rank's data loader: a core for each, and one for the training process."""
    return max(0, min(MOST_WORKERS, cores() // ranks_here() - 1))


def preparation_processes(rows: int, wanted: int | None) -> int:
    """Processes that measure `rows` groups while the other ranks of this machine wait: `wanted`, or by the cores."""
    return wanted or max(1, min(cores(), rows // ROWS_PER_PROCESS))


@dataclass(slots=True, frozen=True)
class Named:
    """A collator whose errors name the groups, also out of a worker process.

    Attributes:
        collate: rows -> micro-batch.
    """

    collate: Callable[[Any], Any]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """What `collate` returns.

        Raises:
            BatchError: whatever it raised.
        """
        try:
            return self.collate(rows)
        except DataError as error:  # names its row
            raise BatchError(str(error)) from error
        except Exception as error:
            names = "; ".join(row_name(row) for row in rows)
            raise BatchError(f"{names}: cannot be encoded: {type(error).__name__}: {error}") from error


def start_worker(worker: int) -> None:
    """Makes a worker of the data loader leave the run's signals to the main process.

    A preempted job sends SIGTERM, and Ctrl-C sends SIGINT, to all processes: the main process then finishes its step,
    for which it needs the workers. A worker therefore ends on SIGTERM only when its main process sends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS cannot tell who sent a signal
        return
    parent = multiprocessing.parent_process()
    assert parent is not None
    main = parent.pid  # of a fork server's worker, getppid is another
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while True:
            if signal.sigwaitinfo({signal.SIGTERM}).si_pid == main:
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def worker_options(args: TrainingArguments, batches: int) -> dict[str, Any]:
    """What a data loader that yields `batches` on this rank is given about workers: no more of them than batches."""
    workers = min(args.dataloader_num_workers, batches)
    if not workers:
        return {}
    return {
        "num_workers": workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "multiprocessing_context": getattr(args, "dataloader_multiprocessing_context", None),
        "worker_init_fn": start_worker,
    }


@contextmanager
def explained_deaths() -> Iterator[None]:
    """Within the context, the death of a worker is an error that says what to do.

    Raises:
        WorkerDied: a worker was killed.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, WorkerDied) or not (died := _DIED.search(str(error))):
            raise
        raise WorkerDied(
            f"A worker of the data loader (process {died[1]}) was ended from outside, most often because the machine"
            " ran out of memory. Start the same command again to resume from the last checkpoint; fewer workers"
            " (dataloader_num_workers) and a smaller dataloader_prefetch_factor take less memory."
        ) from error
