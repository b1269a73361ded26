"""What a loss sees of one micro-batch: log-probabilities of responses and the pairs over them. Legend: G groups, K
responses per group, R responses of the batch (flat over groups), P pairs, N scored tokens, A aspects of a rating, U
labelled responses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(kw_only=True)
class GroupLogps:
    """Log-probabilities and preferences of one micro-batch, flat over its groups.

    Scored tokens are ordered by response: `owner` never decreases, and response r owns `lengths[r]` tokens.

    Attributes:
        logps: [R] log-probability of each response under the policy, summed over its scored tokens (nats). None only
            where the batch is used for `Objective.units`, which are known before the model runs.
        lengths: [R] number of scored tokens of each response.
        pairs: [P, 2] indices (chosen, rejected) into R.
        pair_weights: [P] weight of each pair in the mean over pairs, >= 0. None is 1 for every pair.
        group: [R] group that owns each response. None: the groups are not known (only listwise losses ask).
        ref_logps: [R] as `logps`, under the reference policy.
        ratings: [R] mean rating of each response, NaN where there is none.
        margins: [P] rating gap of a pair, chosen minus rejected, NaN where there is none. None: taken from `ratings`.
        aspect_ratings: [R, A] rating of each response by aspect, NaN where there is none.
        aspects: the A names of the columns of `aspect_ratings`.
        per_token_logps / ref_per_token_logps: [N] log-probability of each scored token.
        owner: [N] response of each scored token.
        token_ids: [N] id of each scored token.
        log_sum_sq_probs: [N] log sum_v p(v)^2 of the policy at each scored token.
        corrupted_logps / ref_corrupted_logps: [R] as `logps`, with the group's images corrupted. Read for chosen
            responses only.
        examples: [U] index into R of each labelled response; desirable: [U] bool; example_weights: [U] weight in the
            mean over labelled responses, >= 0. None: the losses take pairs.
        kl: 0-d estimate of the KL divergence, see `silkie.losses.unpaired.kl_estimate`.
    """

    lengths: Tensor
    pairs: Tensor
    logps: Tensor | None = None
    pair_weights: Tensor | None = None
    group: Tensor | None = None
    ref_logps: Tensor | None = None
    ratings: Tensor | None = None
    margins: Tensor | None = None
    aspect_ratings: Tensor | None = None
    aspects: tuple[str, ...] = ()
    per_token_logps: Tensor | None = None
    ref_per_token_logps: Tensor | None = None
    owner: Tensor | None = None
    token_ids: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    corrupted_logps: Tensor | None = None
    ref_corrupted_logps: Tensor | None = None
    examples: Tensor | None = None
    desirable: Tensor | None = None
    example_weights: Tensor | None = None
    kl: Tensor | None = None

    def require(self, name: str, why: str) -> Tensor:
        """The tensor `name`, or an error that says which loss wants it.

        Raises:
            ValueError: the batch does not hold it.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(
                f"{why} needs `{name}`, and the batch has none. `Objective.needs` lists what a batch must carry."
            )
        return value

    @property
    def weights(self) -> Tensor:
        """[P] float weights of the pairs, 1 where the batch names none."""
        if self.pair_weights is None:
            return torch.ones(self.pairs.shape[0], dtype=torch.float32, device=self.pairs.device)
        return self.pair_weights if self.pair_weights.is_floating_point() else self.pair_weights.float()
