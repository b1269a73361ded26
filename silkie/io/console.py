"""What a command says: errors that a user can mend in one line, and the log of rank 0.

A command's function runs in `guarded`. `silkie --debug ...` (or SILKIE_DEBUG=1) shows tracebacks.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NoReturn

__all__ = ["Parser", "alike", "complain", "computing", "debugging", "guarded", "log_to_stderr", "rank", "say"]

DEBUG_VARIABLE = "SILKIE_DEBUG"
WRONG_USE = 2
INTERRUPTED = 130
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_MENDABLE = (ValueError, RuntimeError, OSError, ImportError)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_USE, f"error: {message.rstrip('.')}. {self.prog} --help lists the options.\n")


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def rank() -> int:
    """The number of this process among those of a launcher; 0 where there is none."""
    return int(os.environ.get("RANK", "0"))


def say(text: str) -> None:
    """A line on stderr, from rank 0; above the progress bar where there is one."""
    if rank() == 0:
        bars = sys.modules.get("tqdm")  # not loaded for a line: `--help` is fast
        if bars is None:
            print(text, file=sys.stderr, flush=True)
        else:
            bars.tqdm.write(text, file=sys.stderr)


def log_to_stderr(level: int = logging.INFO) -> None:
    """silkie's log records of `level` on stderr from rank 0; other ranks and libraries log warnings."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    logging.getLogger("silkie").setLevel(level if rank() == 0 else logging.WARNING)


def complain(error: BaseException, status: int = WRONG_USE) -> int:
    """Print an error in one line, its traceback first where that is wanted; returns `status`."""
    if debugging():
        traceback.print_exception(error)
    elif rank() and getattr(error, "on_every_rank", False):
        return status  # rank 0 says it
    who = f"rank {rank()}: " if rank() else ""
    print(f"error: {who}{_one_line(error)}", file=sys.stderr, flush=True)
    return status


def guarded(function: Callable[[], int]) -> int:
    """Run a command; the return value is its exit status.

    An error that its user can mend is one line, and the status is 2. Every other error keeps its traceback: it is a
    fault of silkie or of a library, and the traceback is what a report of it needs.
    """
    try:
        return function()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `silkie ... | head`: nobody reads the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left when it ends
        return 1
    except Exception as error:
        if not _mendable(error):
            raise
        return complain(error)


def computing() -> AbstractContextManager[None]:
    """Marks errors of a computation that took time: those of libraries keep their traceback."""
    return _marking("during_compute")


def alike() -> AbstractContextManager[None]:
    """Marks errors that every process of a launcher meets, such as wrong options: rank 0 alone reports them."""
    return _marking("on_every_rank")


@contextmanager
def _marking(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        setattr(error, name, True)
        raise


def _mendable(error: Exception) -> bool:
    """Whether the message alone says what to do: silkie raised it, or arguments and files cannot work."""
    if not isinstance(error, _MENDABLE) or isinstance(error, RecursionError | NotImplementedError):
        return False
    if _out_of_memory(error) or _raised_by_silkie(error):
        return True
    return not isinstance(error, RuntimeError) and not getattr(error, "during_compute", False)


def _raised_by_silkie(error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(_PACKAGE)


def _out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError"  # torch's; torch is not imported here


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if _out_of_memory(error):
        return (
            "the GPU's memory is full. Lower --max_tokens_per_batch (or --per_device_train_batch_size) or --max_pixels,"
            f" turn --gradient_checkpointing on, or ask `silkie plan` for a layout that fits. ({text.split('. ')[0]}.)"
        )
    return text
