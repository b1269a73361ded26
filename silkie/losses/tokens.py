"""Token-level views of a pair: LD-DPO and DDPO weigh the tokens of a response, WPO weighs the pair by how on-policy its
responses are.

A response may sit in several pairs and be weighed differently in each, so token weights have the shape [P, N]: pairs by
scored tokens."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

import torch
from torch import Tensor


def token_positions(owner: Tensor, lengths: Tensor) -> Tensor:
    """[N] position of each scored token in its response, from 0. `owner` [N] must not decrease; `lengths` [R] counts
    scored tokens."""
    starts = lengths.cumsum(0) - lengths
    return torch.arange(owner.shape[0], device=owner.device) - starts[owner]


def ld_token_weights(
    responses: Tensor,
    partners: Tensor,
    owner: Tensor,
    lengths: Tensor,
    alpha: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """LD-DPO (Liu et al., arXiv 2409.06411): tokens beyond the length of the pair's other response count `alpha`, the
    others 1.

    Args:
        responses / partners: [P] the response that is weighed and the other one of its pair.
        owner: [N]; lengths: [R]; alpha: in [0, 1], 1 is DPO.
    Returns:
        [P, N], 0 at tokens of other responses.
    """
    shared = torch.minimum(lengths[responses], lengths[partners])
    own = owner[None, :] == responses[:, None]
    head = token_positions(owner, lengths)[None, :] < shared[:, None]
    return (
        torch.zeros(own.shape, dtype=dtype, device=owner.device)
        .masked_fill_(own & head, 1.0)
        .masked_fill_(own & ~head, alpha)
    )


def changed_tokens(chosen_ids: Sequence[int], rejected_ids: Sequence[int]) -> tuple[list[bool], list[bool]]:
    """Which tokens of two responses are not part of their alignment: for each side True at tokens that were inserted,
    deleted or replaced.

    The alignment is difflib's (longest matching blocks, recursively), with its popularity heuristic off: that one would
    call frequent tokens of a long response changed.
    """
    chosen_changed, rejected_changed = [True] * len(chosen_ids), [True] * len(rejected_ids)
    for start_c, start_r, size in SequenceMatcher(None, chosen_ids, rejected_ids, autojunk=False).get_matching_blocks():
        chosen_changed[start_c : start_c + size] = [False] * size
        rejected_changed[start_r : start_r + size] = [False] * size
    return chosen_changed, rejected_changed


def ddpo_token_weights(
    pairs: Tensor,
    owner: Tensor,
    lengths: Tensor,
    token_ids: Tensor,
    gamma: float,
    normalize: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Dense DPO (RLHF-V: Yu et al., arXiv 2312.00849): changed tokens of a pair weigh `gamma`, unchanged ones 1.

    The sequence score is then (sum_unchanged log p + gamma sum_changed log p) / n with n = |unchanged| + gamma
    |changed| when `normalize`, else n = 1. The alignment runs on the CPU: token ids on another device are copied, which
    waits for that device.

    Args:
        pairs: [P, 2]; owner: [N]; lengths: [R]; token_ids: [N].
    Returns:
        ([P, N], [P, N]) weights of the chosen and of the rejected responses' tokens, 0 at tokens of other responses.
    """
    ends = lengths.cumsum(0).tolist()
    ids = token_ids.tolist()
    spans = [slice(end - size, end) for end, size in zip(ends, lengths.tolist(), strict=True)]
    weights = torch.zeros(2, pairs.shape[0], owner.shape[0], dtype=dtype)
    for row, (chosen, rejected) in enumerate(pairs.tolist()):
        changed = changed_tokens(ids[spans[chosen]], ids[spans[rejected]])
        for side, response in enumerate((chosen, rejected)):
            token_weights = torch.tensor([gamma if is_changed else 1.0 for is_changed in changed[side]], dtype=dtype)
            weights[side, row, spans[response]] = token_weights / token_weights.sum() if normalize else token_weights
    weights = weights.to(owner.device)
    return weights[0], weights[1]


def weighted_logps(weights: Tensor, per_token_logps: Tensor) -> Tensor:
    """[P] = sum over N of weights [P, N] * per_token_logps [N]. Tokens of weight 0 do not count even where their
    log-prob is -inf."""
    return torch.where(weights != 0, weights.to(per_token_logps.dtype) * per_token_logps[None, :], 0).sum(dim=1)


def wpo_response_weights(per_token_logps: Tensor, log_sum_sq_probs: Tensor, owner: Tensor, lengths: Tensor) -> Tensor:
    """[R] WPO weight of a response: exp(mean over its tokens of log p(y_t) - log sum_v p(v)^2), without gradient.

    Zhou et al., arXiv 2406.11827, eq. 2 with the sampled alignment; the weight of a pair is the product of its
    responses' weights."""
    with torch.no_grad():
        aligned = per_token_logps - log_sum_sq_probs
        total = aligned.new_zeros(lengths.shape[0]).index_add_(0, owner, aligned)
        return torch.exp(total / lengths.clamp(min=1))
