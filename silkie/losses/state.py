"""The running mean reward of bco_pair."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class RunningMean:
    """Weighted mean over all rewards of the past optimizer steps; the estimate d of binary classifier optimisation.

    `value` is constant within an optimizer step: rewards are collected with `collect` and enter the mean with `commit`.
    So the losses of a step depend neither on the order of its micro-batches nor on how it is split over them and over
    ranks, and the first step has d = 0."""

    def __init__(self) -> None:
        # [2]: sum of weighted rewards, sum of weights. float64, since the sums grow over the whole run.
        self._past = torch.zeros(2, dtype=torch.float64)
        self._pending: Tensor | None = None

    @property
    def value(self) -> float:
        """Mean over the committed rewards, 0 before the first commit."""
        total, count = self._past.tolist()
        return total / count if count > 0 else 0.0

    def collect(self, rewards: Tensor, weights: Tensor) -> None:
        """Add rewards [P] with weights [P]. Stays on their device, without waiting for it."""
        part = torch.stack([(rewards.detach() * weights).sum(), weights.sum()])
        self._pending = part if self._pending is None else self._pending + part

    def commit(self, reduce: Callable[[Tensor], Tensor] | None = None, device: torch.device | str = "cpu") -> None:
        """End an optimizer step. `reduce` sums a tensor over all ranks (every rank must call); None is a single
        rank."""
        pending = torch.zeros(2, device=device) if self._pending is None else self._pending
        self._pending = None
        self._past += (pending if reduce is None else reduce(pending)).to("cpu", torch.float64)

    def state_dict(self) -> dict[str, list[float]]:
        """The committed sums; call it between optimizer steps."""
        return {"past": self._past.tolist()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self._past = torch.tensor(state["past"], dtype=torch.float64)
        self._pending = None
