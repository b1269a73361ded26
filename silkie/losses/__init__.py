"""Preference losses as pure functions on log-probabilities, and their weighted sum over the pairs of an optimizer step.

`LOSSES[name]` is a function; `build_objective(["sigmoid"], None, LossOptions())` is what the trainer calls.
"""

from .catalogue import LOSSES, SPECS
from .divergence import f_scores
from .group_logps import GroupLogps
from .listwise import plackett_luce
from .multimodal import mdpo_anchor, mdpo_image
from .objective import Objective, build_objective
from .options import LossOptions, option_users, validate
from .spec import LossSpec
from .tokens import changed_tokens, ddpo_token_weights, ld_token_weights, wpo_response_weights
from .unpaired import balanced_weights, kl_estimate

dpo_loss = LOSSES["sigmoid"]

__all__ = [
    "LOSSES",
    "SPECS",
    "GroupLogps",
    "LossOptions",
    "LossSpec",
    "Objective",
    "balanced_weights",
    "build_objective",
    "changed_tokens",
    "ddpo_token_weights",
    "dpo_loss",
    "f_scores",
    "kl_estimate",
    "ld_token_weights",
    "mdpo_anchor",
    "mdpo_image",
    "option_users",
    "plackett_luce",
    "validate",
    "wpo_response_weights",
]
