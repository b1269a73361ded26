"""The terms that mDPO adds to DPO (Wang et al., arXiv 2406.11839). mDPO is their sum: sigmoid + mdpo_image +
mdpo_anchor."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .pairwise import sigmoid
from .spec import BETA, loss


@loss("image", BETA)
def mdpo_image(
    chosen_logps: Tensor,
    corrupted_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_corrupted_logps: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Image-conditional preference: the chosen response should be likelier with its image than with the corrupted one.

    -log s(beta (r - r')), where r is the log-ratio of the chosen response with the image and r' with the corrupted
    image, both [P] in nats."""
    return sigmoid(chosen_logps, corrupted_logps, ref_chosen_logps, ref_corrupted_logps, beta=beta)


@loss("anchor", {"beta": "beta", "anchor": "mdpo_anchor"})
def mdpo_anchor(chosen_logps: Tensor, ref_chosen_logps: Tensor, *, beta: float = 0.1, anchor: float = 0.0) -> Tensor:
    """Anchored reward of the chosen response: -log s(beta r_w - anchor), which keeps its reward above `anchor`. [P]"""
    return -F.logsigmoid(beta * (chosen_logps - ref_chosen_logps) - anchor)
