"""The listwise objective over the k responses of a group."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import BETA, loss


@loss("listwise", BETA, unit="group")
def plackett_luce(
    logps: Tensor, ref_logps: Tensor, pairs: Tensor, *, beta: float = 0.1, active: Tensor | None = None
) -> Tensor:
    """DPO under the Plackett-Luce model (Rafailov et al., arXiv 2305.18290, appendix A.3), one term per response.

    For a full ranking the term of a response is -log( exp(beta r_i) / (exp(beta r_i) + sum over worse j of exp(beta
    r_j)) ), r the log-ratio, and the sum of a group's terms is the negative log-likelihood of its ranking. "Worse" is
    read from the pairs, so tied responses do not compete with each other and a partial order is allowed. With k = 2 it
    is `sigmoid`.

    Args:
        logps / ref_logps: [R] summed log-probabilities (nats).
        pairs: [P, 2] (better, worse), each at most once; all C(k, 2) of them for a full ranking without ties.
        active: [P] bool, False for pairs to leave out.
    Returns:
        [R] loss terms, 0 for a response that beats none.
    """
    rewards = beta * (logps - ref_logps)
    better, worse = pairs[:, 0], pairs[:, 1]
    # log(1 + sum_j exp(r_j - r_i)), with the largest exponent (or 0, of the response itself) taken out for stability.
    gaps = rewards[worse] - rewards[better]
    if active is not None:
        gaps = torch.where(active, gaps, -torch.inf)
    peak = torch.zeros_like(rewards).scatter_reduce(0, better, gaps.detach(), "amax", include_self=True)
    total = torch.exp(-peak).index_add(0, better, torch.exp(gaps - peak[better]))
    return peak + torch.log(total)


def listed_weights(pair_weights: Tensor, pairs: Tensor, responses: int) -> Tensor:
    """[R] weight of each response's term: the mean weight of the pairs of positive weight that it wins, 0 where it wins
    none."""
    zeros = pair_weights.new_zeros(responses)
    total = zeros.index_add(0, pairs[:, 0], pair_weights)
    count = zeros.index_add(0, pairs[:, 0], (pair_weights > 0).to(pair_weights.dtype))
    return total / count.clamp(min=1)


def ranked_groups(term_weights: Tensor, group: Tensor) -> Tensor:
    """Scalar: the number of groups that rank anything, each weighed by the mean weight of its terms. `term_weights`,
    `group`: [R].

    With all weights 1 it counts the groups that have at least one pair.
    """
    # A group index is below R, because every group owns a response.
    zeros = term_weights.new_zeros(group.shape[0])
    total = zeros.index_add(0, group, term_weights)
    count = zeros.index_add(0, group, (term_weights > 0).to(term_weights.dtype))
    return (total / count.clamp(min=1)).sum()
