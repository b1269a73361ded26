"""Stops a run on a NaN or infinite loss or gradient, naming the groups it came from, and on such a weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class NonFiniteError(RuntimeError):
    """A loss, a gradient or a trained weight is NaN or infinite."""


class FiniteWatch:
    """Remembers the losses of the micro-batches and the gradient norms of the steps since the last check, on the
    device."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, Sequence[str]]] = []
        # Gradient norm of a step, and which of the losses above belong to it
        self._steps: list[tuple[Tensor, slice]] = []
        self._step_start = 0

    def begin_step(self) -> None:
        """Marks that the following losses belong to a new step."""
        self._step_start = len(self._seen)

    def add(self, loss: Tensor, names: Sequence[str]) -> None:
        """Records a loss and the names of its groups, without synchronisation."""
        self._seen.append((loss.detach(), names))

    def end_step(self, gradient_norm: Tensor | float) -> None:
        """Records the gradient norm of a step over all ranks, without synchronisation."""
        self._steps.append((torch.as_tensor(gradient_norm).detach(), slice(self._step_start, len(self._seen))))

    def check(
        self,
        *,
        any_rank: Callable[[bool], bool] = bool,
        gather: Callable[[list[Any]], list[Any]] = list,
    ) -> None:
        """Checks and forgets everything recorded since the last check (one synchronisation). Every rank calls it, and
        all raise together.

        Args:
            any_rank: whether a flag is set on any rank.
            gather: joins the lists of all ranks.

        Raises:
            NonFiniteError: a loss of any rank or a gradient norm is not finite; it names the groups of the first one.
        """
        seen, steps = self._seen, self._steps
        self._seen, self._steps, self._step_start = [], [], 0
        if not seen:
            return
        loss = _first_non_finite([loss for loss, _ in seen])
        # FSDP2 returns partial DTensors
        norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm, _ in steps]
        step = _first_non_finite(norms)
        if not any_rank(loss is not None or step is not None):
            return
        found, names = [], []
        if step is not None:  # the same step on all ranks; losses after a ruined update say nothing
            names = [name for _, group_names in seen[steps[step][1]] for name in group_names]
            loss = None if loss is not None and loss >= steps[step][1].stop else loss
        if loss is not None:
            before = f" Groups of the micro-batch before it: {'; '.join(seen[loss - 1][1])}." if loss else ""
            found = [f"The loss is {float(seen[loss][0])} on: {'; '.join(seen[loss][1])}.{before}"]
        found, names = gather(found), gather(names)
        message = (
            " ".join(found)
            or f"The gradient norm is {float(norms[step or 0])}; groups of that step: {'; '.join(names)}."
        )
        raise NonFiniteError(
            f"{message} Training stopped before this state could be saved. Look at these rows; a lower learning rate,"
            " gradient clipping (max_grad_norm) or fp32 are the usual remedies."
        )


def check_weights(model: Any, *, step: int, any_rank: Callable[[bool], bool] = bool) -> None:
    """Checks the trained weights that this process holds (one synchronisation). Every rank calls it, and all raise
    together.

    Raises:
        NonFiniteError: one of them is not finite, on any rank; it names the first ones.
    """
    largest = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            own = getattr(weight, "ds_tensor", weight).detach()
            own = own.to_local() if isinstance(own, DTensor) else own
            if own.numel():
                largest[name] = torch.linalg.vector_norm(own, ord=float("inf"))  # needs no copy of the weight
    finite = torch.isfinite(torch.stack([value.float() for value in largest.values()])).tolist() if largest else []
    wrong = [name for name, good in zip(largest, finite, strict=True) if not good]
    if any_rank(bool(wrong)):
        raise NonFiniteError(
            f"After step {step}, {len(wrong)} of {len(largest)} trained weights hold NaN or infinity"
            f" ({', '.join(wrong[:3]) or 'on another process'}). Nothing is saved of this step; earlier checkpoints"
            " stay. A lower learning rate, gradient clipping (max_grad_norm) or fp32 are the usual remedies."
        )


def _first_non_finite(values: Sequence[Tensor]) -> int | None:
    finite = torch.isfinite(torch.stack(list(values))).tolist() if values else []
    return finite.index(False) if False in finite else None
