"""Metrics kept on the device until they are logged: one reduction over ranks and one synchronisation with the host per
logging step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from silkie.batch.batch import Batch
from silkie.losses import GroupLogps, Objective
from silkie.model.forward import SequenceLogps

_TOKENS, _LOSS = "_tokens", "_loss"  # sums that are not metrics by themselves


class DeviceMeans:
    """Running means of named values, as (sum, count) pairs on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor, count: float | Tensor) -> None:
        """Adds a sum over `count` elements; no synchronisation."""
        pair = torch.stack([total.detach().double(), torch.as_tensor(count, dtype=torch.float64, device=total.device)])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def peek(self, name: str, reduce: Callable[[Tensor], Tensor], device: torch.device) -> tuple[float, float]:
        """The sum and count under `name` over all ranks since the last `pop`. Every rank must call it."""
        pair = self._sums.get(name, torch.zeros(2, dtype=torch.float64, device=device))
        total, count = reduce(pair.clone()).tolist()
        return total, count

    def pop(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, tuple[float, float]]:
        """Returns and resets name -> (sum, count) over all ranks. `reduce` sums a tensor over the ranks."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        table = reduce(torch.stack([self._sums[name] for name in names])).tolist()
        self._sums.clear()
        return {name: (total, count) for name, (total, count) in zip(names, table, strict=True)}


@dataclass(slots=True, frozen=True, kw_only=True)
class LogLine:
    """Result of `RunMetrics.pop`: metric -> mean, tokens seen (as TRL counts them, and those of the packed rows), and
    the loss over an evaluation set (None in training)."""

    means: dict[str, float]
    tokens: int
    packed_tokens: int
    loss: float | None


class RunMetrics:
    """The metrics of training, or of evaluation, between two lines of the log.

    Args:
        objective: gives the weight of a pair, and the units that the terms of the loss are means over.
        token_stats: also entropy, mean_token_accuracy and logits/*.
    """

    def __init__(self, objective: Objective, *, token_stats: bool) -> None:
        self.objective, self.token_stats = objective, token_stats
        self._means = DeviceMeans()

    def add(
        self, batch: Batch, metrics: dict[str, Tensor], group_logps: GroupLogps, sequence_logps: SequenceLogps
    ) -> None:
        """Keeps the metrics [P] of a micro-batch; no synchronisation."""
        # Pairs of weight 0 are no part of a mean: copies that keep an idle rank busy, and pairs that contradict their
        # ratings under `aspect_weights`.
        weights = self.objective.row_weights(group_logps)
        counted = weights > 0
        for name, value in metrics.items():
            if self.objective.unpaired:  # NaN: on the other side
                seen = weights * ~value.isnan()
                self._means.add(name, (value.nan_to_num(nan=0.0) * seen).sum(), seen.sum())
            else:
                # a pair of several rows counts as often as TRL counts these
                seen = group_logps.weights * counted
                self._means.add(name, (value.masked_fill(~counted, 0.0) * seen).sum(), seen.sum())
        # TRL's count: prompt and response of both sides of every row, or of every labelled response
        tokens = batch["prompt_lengths"][batch["group"]] + batch["lengths"]
        total = torch.stack([(tokens[index] * rows).sum() for index, rows in self._sides(group_logps, counted)])
        packed = (batch["segment_ids"] >= 0).sum() * counted.any()
        self._means.add(_TOKENS, total.sum(), packed)
        if sequence_logps.aux_loss is not None:
            self._means.add("aux_loss", sequence_logps.aux_loss, 1)
        if sequence_logps.stats is not None and self.token_stats:
            self._add_token_stats(batch, sequence_logps, self._sides(group_logps, counted))

    def _sides(self, logps: GroupLogps, counted: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(index into R, weight) of the chosen and of the rejected responses: a pair of several equal rows counts as
        often as TRL counts these, any other once."""
        if not self.objective.unpaired:
            rows = counted * logps.weights.double().round().clamp(min=1.0)
            return [(index, rows) for index in logps.pairs.unbind(1)]
        desirable, examples = logps.require("desirable", "a metric"), logps.require("examples", "a metric")
        weights = self.objective.row_weights(logps).double()
        return [(examples, weights * side) for side in (desirable, ~desirable)]

    def _add_token_stats(self, batch: Batch, sequence_logps: SequenceLogps, sides: list[tuple[Tensor, Tensor]]) -> None:
        """TRL's token statistics: means over the tokens of chosen and rejected responses, a response counting once per
        pair. As in TRL, the log has the mean of the means of micro-batches."""
        stats = sequence_logps.stats
        assert stats is not None
        weights = []
        for index, rows in sides:
            # bincount would wait for the device
            times = sequence_logps.per_token_logps.new_zeros(len(batch["lengths"]))
            weights.append(times.index_add(0, index, rows.to(times.dtype))[batch["owner"]])
        chosen, rejected = weights
        self._add_mean("logits/chosen", stats.mean_logit, chosen)
        self._add_mean("logits/rejected", stats.mean_logit, rejected)
        self._add_mean("entropy", stats.entropy, chosen + rejected)
        if not self.objective.unpaired:
            self._add_mean("mean_token_accuracy", stats.is_top1, chosen)

    def _add_mean(self, name: str, values: Tensor, weights: Tensor) -> None:
        """Adds a micro-batch's mean [N] of values; nothing where no token has a weight."""
        total = weights.sum()
        self._means.add(name, (values * weights).sum() / total.clamp(min=1e-9), total > 0)

    def add_loss(self, group_logps: GroupLogps) -> None:
        """Numerators and denominators of the loss over a whole evaluation set: its terms are means over pairs, tokens
        or groups."""
        units = self.objective.units(group_logps)
        for unit, total in units.items():
            alone = {name: torch.full_like(total, 1.0 if name == unit else float("inf")) for name in units}
            share, _ = self.objective(group_logps, alone, training=False)
            self._means.add(_LOSS + unit, share, total)

    def tokens(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> tuple[int, int]:
        """Tokens as TRL counts them, and tokens of the packed rows, over all ranks since the last `pop`. Every rank
        must call it."""
        tokens, packed = self._means.peek(_TOKENS, reduce, device)
        return int(tokens), int(packed)

    def pop(self, reduce: Callable[[Tensor], Tensor]) -> LogLine:
        """Returns and resets the means over all ranks. `reduce` sums a tensor over the ranks."""
        sums = self._means.pop(reduce)
        tokens, packed = sums.pop(_TOKENS, (0.0, 0.0))
        parts = [sums.pop(name) for name in list(sums) if name.startswith(_LOSS)]
        loss = sum(total / count for total, count in parts if count) if any(count for _, count in parts) else None
        means = {name: total / count for name, (total, count) in sums.items() if count}
        if self.objective.unpaired and {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]  # no response has one
        return LogLine(
            means=means,
            tokens=int(tokens),
            packed_tokens=int(packed),
            loss=loss,
        )
