"""Run a coroutine to its end from code that is not asynchronous, in a notebook too."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def run_to_end(coroutine: Coroutine[Any, Any, T]) -> T:
    """The coroutine's result. A notebook's thread has a running event loop, which cannot be entered again: there the
    coroutine gets a thread and a loop of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1, thread_name_prefix="silkie-loop") as pool:
        return pool.submit(asyncio.run, coroutine).result()
