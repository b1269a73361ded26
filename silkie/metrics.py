"""Metrics that stay on the device until they are logged: one reduction over ranks and one host synchronisation per logging step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class DeviceMeans:
    """Running means of named values, as (sum, count) pairs on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor, count: float | Tensor) -> None:
        """Adds a sum over `count` elements; no synchronisation."""
        pair = torch.stack([total.detach().double(), torch.as_tensor(count, dtype=torch.float64, device=total.device)])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def peek(self, name: str, reduce: Callable[[Tensor], Tensor], device: torch.device) -> float:
        """The sum under `name` over all ranks since the last `pop`. Every rank must call."""
        pair = self._sums.get(name, torch.zeros(2, dtype=torch.float64, device=device))
        return float(reduce(pair.clone())[0])

    def pop(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, tuple[float, float]]:
        """name -> (sum, count) over all ranks since the last call, and forgets them. `reduce` sums a tensor over the ranks."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        table = reduce(torch.stack([self._sums[name] for name in names])).tolist()
        self._sums.clear()
        return {name: (total, count) for name, (total, count) in zip(names, table, strict=True)}
