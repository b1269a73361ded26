"""The implementations `bench_logprob.py` compares, all behind one signature.

Every entry maps (hidden [N, D], weight [V, D], target [N]) to per-token log-probs [N], except Liger's DPO loss, which
only gives a scalar. Peers are called as their own trainers call them; one that cannot run here is absent, with the
reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from silkie.logprob import linear_logprob

Score = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """name as printed; score; `per_token` is false where only a scalar loss comes out (no error can be measured)."""

    name: str
    score: Score
    per_token: bool = True


def naive(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Full logits in the operands' dtype, upcast, cross-entropy: what a model's own head and loss do."""
    logits = torch.nn.functional.linear(hidden, weight).float()
    return -torch.nn.functional.cross_entropy(logits, target, reduction="none")


def silkie(impl: str) -> Score:
    return lambda hidden, weight, target: linear_logprob(hidden, weight, target, impl=impl)  # type: ignore[arg-type]


def trl_chunked() -> Score:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import utils

    width = utils._CHUNKED_LOGPROB_CHUNK_SIZE

    def score(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, width, None, 1.0, ())[0]

    return score


def torch_linear_cross_entropy(rows: int | None) -> Score:
    from torch.nn import LinearCrossEntropyOptions

    options = (
        LinearCrossEntropyOptions()
        if rows is None
        else LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
    )

    def score(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -torch.nn.functional.linear_cross_entropy(hidden, weight, target, reduction="none", options=options)

    return score


def liger_cross_entropy() -> Score:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return lambda hidden, weight, target: -loss(weight, hidden, target)


def liger_dpo(sequences: int = 8) -> Score:
    """The scalar DPO loss over `sequences` equally long responses, without a reference model."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(use_ref_model=False, compiled=False)

    def score(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return loss(weight, hidden.view(sequences, -1, hidden.shape[1]), target.view(sequences, -1))[0]

    return score


def cut_cross_entropy() -> Score:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, target: -linear_cross_entropy(hidden, weight, target, reduction="none")


def contenders(device: str, only: str | None = None) -> tuple[list[Contender], dict[str, str]]:
    """All that can run on this device (or the one of that name), and the reason for each one that cannot."""
    found = [Contender("silkie tiled", silkie("tiled")), Contender("naive", naive)]
    if device == "cuda":
        found.insert(0, Contender("silkie triton", silkie("triton")))
    absent: dict[str, str] = {}

    def add(name: str, make: Callable[[], Score], per_token: bool = True) -> None:
        if only not in (None, name):
            return
        try:
            found.append(Contender(name, make(), per_token))
        except (ImportError, AttributeError) as error:
            absent[name] = f"{type(error).__name__}: {error}"

    add("TRL chunked", trl_chunked)
    add("torch linear_cross_entropy, 256 rows", lambda: torch_linear_cross_entropy(256))
    if device == "cuda":
        add("torch linear_cross_entropy, auto", lambda: torch_linear_cross_entropy(None))
        add("Liger fused CE", liger_cross_entropy)
        add("Cut Cross-Entropy", cut_cross_entropy)
    else:
        absent["Liger fused CE"] = absent["Cut Cross-Entropy"] = absent["silkie triton"] = "needs CUDA"
        absent["torch linear_cross_entropy, auto"] = "picks chunks of 2 rows at D=256 on a CPU: minutes per call"
    add("Liger fused DPO (scalar)", liger_dpo, per_token=False)
    return found, absent


def matrix_products(backward: bool) -> Score:
    """The floor: the library's matrix products and nothing else, 2NVD (forward) or 4NVD operations, on the tile shapes
    that suit it best.

    On CUDA the logits are written in fp32, as the task needs; the second product takes operands of the weight's dtype.
    """

    def score(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        cuda = hidden.is_cuda
        rows, columns = (1152, weight.shape[0]) if cuda else (2048, 2048)
        mixed = cuda and hidden.dtype in (torch.bfloat16, torch.float16)
        for first in range(0, hidden.shape[0], rows):
            chunk = hidden[first : first + rows]
            for start in range(0, weight.shape[0], columns):
                tile = weight[start : start + columns]
                logits = torch.mm(chunk, tile.t(), out_dtype=torch.float32) if mixed else chunk @ tile.t()
                if backward:
                    operand = torch.empty_like(logits, dtype=tile.dtype) if mixed else logits
                    torch.mm(operand, tile, out_dtype=torch.float32) if mixed else operand @ tile
        return hidden.new_zeros(len(hidden))

    return score
