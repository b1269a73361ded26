"""How parts outside transformers' training loop call the model: with the loop's own device placement and autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True, frozen=True, kw_only=True)
class ForwardContext:
    """What transformers' trainer wraps around a forward pass.

    Attributes:
        prepare: moves a collated batch to the device.
        autocast: context manager of a forward pass (mixed precision).
    """

    prepare: Callable[[Any], Any]
    autocast: Callable[[], AbstractContextManager[Any]]
