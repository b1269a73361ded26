"""Dropout that a model applies as a function, by a rate that a module holds: who looks for `nn.Dropout` misses it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

logger = logging.getLogger(__name__)


def dropout_rates(model: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """Module, attribute and value of every rate above zero: of dropout, in any form, and of paths skipped at random."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and value and _is_rate(module, name):
                yield module, name, value


def disable_dropout(model: Any) -> None:
    """Sets every rate to zero. TRL's `disable_dropout` reaches `nn.Dropout` only, and leaves the attention of a
    Q-Former, for one, random."""
    found = list(dropout_rates(model))
    for module, name, _ in found:
        setattr(module, name, 0.0)
    if found:
        names = ", ".join(sorted({f"{type(module).__name__}.{name}" for module, name, _ in found}))
        logger.info("disable_dropout: %d rates that TRL does not reach are off, too (%s)", len(found), names)


def _is_rate(module: nn.Module, name: str) -> bool:
    return "drop" in name or (name == "p" and isinstance(module, _DropoutNd))
