"""Ratings at training time: gaps of pairs, their use as offset or weight, and the mix of aspects."""

from __future__ import annotations

import torch
from torch import Tensor


def rating_margins(ratings: Tensor, pairs: Tensor) -> Tensor:
    """[P] rating of the chosen minus rating of the rejected response; NaN where either has none. `ratings` [R], `pairs`
    [P, 2]."""
    return ratings[pairs[:, 0]] - ratings[pairs[:, 1]]


def margin_offset(margins: Tensor, scale: float) -> Tensor:
    """[P] offset that a pair's logit must exceed: scale * rating gap, 0 for a pair without ratings.

    DPO with an offset, -log s(beta h - offset): Amini et al., arXiv 2402.10571.
    """
    return scale * margins.nan_to_num(nan=0.0)


def margin_weight(margins: Tensor, scale: float) -> Tensor:
    """[P] weight of a pair: max(0, 1 + scale * rating gap), 1 for a pair without ratings."""
    return (1 + scale * margins.nan_to_num(nan=0.0)).clamp(min=0)


def mix_aspects(aspect_ratings: Tensor, weights: Tensor) -> Tensor:
    """[R] weighted mean of the aspects of each response, over the aspects that are rated; NaN where none of positive
    weight is.

    `aspect_ratings` [R, A] with NaN for "not rated"; `weights` [A], >= 0.
    """
    rated = ~torch.isnan(aspect_ratings)
    mass = (rated * weights).sum(dim=1)
    # Chosen, not multiplied by `rated`: NaN * 0 is NaN.
    total = torch.where(rated, aspect_ratings * weights, 0).sum(dim=1)
    return torch.where(mass > 0, total / mass, torch.nan)


def agreement(margins: Tensor) -> Tensor:
    """[P] 1 where a pair's rating gap is positive or unknown, 0 where the ratings tie or contradict the pair."""
    # Not `margins > 0`, which is False for the NaN of a pair without ratings.
    return (~(margins <= 0)).to(margins.dtype)
