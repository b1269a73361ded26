"""The log-probs of a micro-batch as a loss wants them: by pair, weighted by token and pair as the options say.

Legend: P pairs, U labelled responses, R responses of the batch, N scored tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .group_logps import GroupLogps
from .margins import agreement, margin_weight, mix_aspects, rating_margins
from .options import LossOptions
from .tokens import ddpo_token_weights, ld_token_weights, weighted_logps, wpo_response_weights


def full(logps: Tensor) -> Tensor:
    """At least float32: a sum over pairs in half precision loses the small ones."""
    return logps.float() if logps.dtype in (torch.bfloat16, torch.float16) else logps


@dataclass(frozen=True)
class PairView:
    """The log-probs of a batch by pair, gathered when first asked for, so that a loss touches only what it reads."""

    batch: GroupLogps
    options: LossOptions
    labelled: bool  # its rows are labelled responses, not pairs

    @property
    def chosen_index(self) -> Tensor:
        return self.batch.pairs[:, 0]

    @property
    def rejected_index(self) -> Tensor:
        return self.batch.pairs[:, 1]

    @property
    def examples(self) -> Tensor:
        """[U] index into R of each labelled response."""
        return self.batch.require("examples", "a loss of labelled responses")

    @cached_property
    def chosen_lengths(self) -> Tensor:
        return self.batch.lengths[self.chosen_index]

    @cached_property
    def rejected_lengths(self) -> Tensor:
        return self.batch.lengths[self.rejected_index]

    def plain(self, name: str, index: Tensor) -> Tensor:
        """[P] the sequence log-probs `name`, not weighted by token."""
        return full(self.batch.require(name, "the objective"))[index]

    @cached_property
    def _token_weights(self) -> tuple[Tensor, Tensor]:
        batch, options = self.batch, self.options
        owner = batch.require("owner", "a token-weighted loss")
        dtype = full(batch.require("per_token_logps", "a token-weighted loss")).dtype
        if options.ddpo_gamma is not None:
            ids = batch.require("token_ids", "ddpo_gamma")
            return ddpo_token_weights(
                batch.pairs, owner, batch.lengths, ids, options.ddpo_gamma, options.ddpo_normalize, dtype
            )
        assert options.ld_alpha is not None  # `token_weighted` says one of the two is set
        chosen, rejected = self.chosen_index, self.rejected_index
        return (
            ld_token_weights(chosen, rejected, owner, batch.lengths, options.ld_alpha, dtype),
            ld_token_weights(rejected, chosen, owner, batch.lengths, options.ld_alpha, dtype),
        )

    @cached_property
    def policy(self) -> tuple[Tensor, Tensor]:
        """Chosen and rejected log-probs [P] of the policy, weighted by token where the options say so."""
        return self._sequence("logps", "per_token_logps")

    @cached_property
    def reference(self) -> tuple[Tensor, Tensor]:
        """As `policy`, of the reference."""
        return self._sequence("ref_logps", "ref_per_token_logps")

    def _sequence(self, name: str, token_name: str) -> tuple[Tensor, Tensor]:
        if not self.options.token_weighted:
            return self.plain(name, self.chosen_index), self.plain(name, self.rejected_index)
        per_token = full(self.batch.require(token_name, "a token-weighted loss"))
        chosen, rejected = self._token_weights
        return weighted_logps(chosen, per_token), weighted_logps(rejected, per_token)

    @cached_property
    def margins(self) -> Tensor:
        """[P] rating gap, NaN where a response is not rated."""
        batch, weights = self.batch, self.options.aspect_weights
        if weights is not None:
            ratings = batch.require("aspect_ratings", "aspect_weights")
            return rating_margins(
                mix_aspects(ratings, ratings.new_tensor([weights.get(a, 0.0) for a in batch.aspects])), batch.pairs
            )
        if batch.margins is not None:
            return batch.margins
        return rating_margins(batch.require("ratings", f"margin={self.options.margin!r}"), batch.pairs)

    @cached_property
    def weights(self) -> Tensor:
        """[P] weight of each pair: the data's, times those that the options take from the ratings; [U] of each
        labelled response where the losses take these."""
        if self.labelled:
            return self.batch.require("example_weights", "a loss of labelled responses")
        weights = self.batch.weights
        if self.options.aspect_weights is not None:
            weights = weights * agreement(self.margins)
        if self.options.margin == "weight":
            weights = weights * margin_weight(self.margins, self.options.margin_scale)
        return weights

    @cached_property
    def wpo_weights(self) -> Tensor:
        """[P] WPO weight of each pair, without gradient."""
        batch = self.batch
        per_token, owner = batch.require("per_token_logps", "use_weighting"), batch.require("owner", "use_weighting")
        stats = batch.require("log_sum_sq_probs", "use_weighting")
        response = wpo_response_weights(full(per_token), full(stats), owner, batch.lengths)
        return response[self.chosen_index] * response[self.rejected_index]
