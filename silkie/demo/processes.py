"""Tasks of a run side by side, each in a process of its own with its share of the cores: small models do not fill
several cores with one training. Progress comes back to this process, which draws a bar per task."""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm
from transformers import logging as transformers_logging

from silkie.batch.workers import cores
from silkie.io.console import log_to_stderr, say

__all__ = ["Tell", "run_tasks"]

T = TypeVar("T")
R = TypeVar("R")
Tell = Callable[[str, int, int], None]
"""(what is done, steps done, steps in all)"""

_messages: Any = None  # in a process of the pool: where its progress goes


def run_tasks(function: Callable[[T, Tell], R], tasks: Sequence[T], *, processes: int, log: Path) -> Iterator[R]:
    """The results of `function(task, tell)`, in the order in which they are ready.

    Args:
        function: of a module, so that a process can find it.
        processes: how many tasks run at once; they start in order. 1 runs them in this process.
        log: file for what the processes print and log.

    Raises:
        What a task raises, SystemExit of a training that was stopped included; tasks that wait are then not started.
    """
    bars = _Bars()
    if processes == 1:
        for task in tasks:
            try:
                yield function(task, bars.show)
            finally:
                bars.close()
        return
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    messages = context.Queue()
    start = (messages, max(1, cores() // processes), str(log))
    say(f"{len(tasks)} trainings and evaluations, {processes} at a time; their log: {log}")
    with ProcessPoolExecutor(processes, context, _start, start) as pool:
        waiting = {pool.submit(_run, function, task) for task in tasks}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                _draw(messages, bars)
                for future in done:
                    bars.close()
                    yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            bars.close()


def _start(messages: Any, threads: int, log: str) -> None:
    """First thing in a process of the pool."""
    global _messages
    _messages = messages
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    log_to_stderr(logging.INFO)


def _run(function: Callable[[T, Tell], R], task: T) -> R:
    return function(task, lambda what, done, total: _messages.put((what, done, total)))


def _draw(messages: Any, bars: _Bars) -> None:
    while True:
        try:
            bars.show(*messages.get_nowait())
        except queue.Empty:
            return


class _Bars:
    """A bar for every task under way."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm] = {}

    def show(self, what: str, done: int, total: int) -> None:
        bar = self._bars.get(what)
        if bar is None:
            interval = 0.1 if sys.stderr.isatty() else 10.0  # in a log every refresh is a line
            bar = self._bars[what] = tqdm(total=total, desc=what, leave=False, mininterval=interval)
        bar.update(done - bar.n)
        if done >= total:
            self._bars.pop(what).close()

    def close(self) -> None:
        """Take all bars away, so that a line can be printed; those of tasks under way come back."""
        while self._bars:
            self._bars.popitem()[1].close()
