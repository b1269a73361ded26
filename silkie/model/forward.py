"""Log-probs of responses through the wrapped model's own call: the output head scores the gathered tokens instead of
returning logits.

Going through `model(...)` keeps the hooks of peft, DDP, FSDP2 and ZeRO-3 alive; only the head's `forward` is replaced
for the call.
Legend: B rows, T tokens, N scored tokens, R responses, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from silkie.batch.batch import Batch
from silkie.logprob import Impl, LogprobStats, linear_logprob
from silkie.logprob.head import HeadOptions, head_operands
from silkie.model.attention import Attention
from silkie.model.families import causal_lm
from silkie.model.logits import applied_options, without_softcap
from silkie.model.vision import FeatureCache, image_features_once


@dataclass(slots=True, kw_only=True)
class SequenceLogps:
    """Log-probs of one pass.

    Attributes:
        per_token_logps: fp32 [N].
        logps: fp32 [R], summed over the tokens of each response.
        stats: per-token statistics [N], only when asked for.
        aux_loss: load balancing loss of the routers, a scalar, only when asked for and where the model gives one. As in
            TRL, whose rows hold a prompt once per side of a pair; padding does not count. In the rows layout every
            token counts once, which is the same for one pair a group.
    """

    per_token_logps: Tensor
    logps: Tensor
    stats: LogprobStats | None = None
    aux_loss: Tensor | None = None


@dataclass(slots=True, frozen=True, kw_only=True)
class LogpsForward:
    """One forward of a model over a collated batch (see `silkie.batch.collator`), which gives log-probs.

    Attributes:
        attention: makes the attention mask of a batch.
        fused: use `linear_logprob`; False takes the plain path (logits, then log-softmax in fp32), for comparison.
        impl: implementation of `linear_logprob`.
    """

    attention: Attention
    fused: bool = True
    impl: Impl = "auto"

    def __call__(
        self,
        model: Any,
        batch: Batch,
        *,
        frozen_vision: bool,
        cache: FeatureCache | None = None,
        return_stats: bool = False,
        router_aux: bool = False,
    ) -> SequenceLogps:
        """One forward of `model` over the batch.

        Args:
            model: policy or reference, wrapped or not.
            batch: from `GroupCollator`, on the model's device.
            frozen_vision: see `image_features_once`.
            cache: image features shared with other passes over the same batch.
            return_stats: also return token statistics.
            router_aux: also return the routers' load balancing loss.
        """
        base = causal_lm(model)
        box: dict[str, Any] = {}
        with (
            scored_head(
                base,
                batch["gather"],
                batch["target"],
                fused=self.fused,
                impl=self.impl,
                return_stats=return_stats,
                box=box,
            ),
            image_features_once(
                base,
                frozen=frozen_vision,
                cache=cache,
                tokens_per_tree=batch["image_tokens"],
                row_trees=batch["row_trees"],
            ),
            self.attention.masks(base, batch),
        ):
            more = {"output_router_logits": True} if router_aux else {}
            out = model(**self._inputs(base, batch, router_aux=router_aux), **more, use_cache=False)
        if router_aux and out.aux_loss is None:
            raise ValueError(f"{type(base).__name__} returned no aux_loss: set router_aux_loss_coef=0.")
        per_token = out.logits.reshape(-1)
        return SequenceLogps(
            per_token_logps=per_token,
            logps=sum_by_response(per_token, batch),
            stats=box.get("stats"),
            aux_loss=out.aux_loss if router_aux else None,
        )

    def logits(self, model: Any, batch: Batch) -> Tensor:
        """[B, T, V] logits of every token of a batch in the layout of this forward, without gradient."""
        base = causal_lm(model)
        features = image_features_once(
            base, frozen=True, cache=None, tokens_per_tree=batch["image_tokens"], row_trees=batch["row_trees"]
        )
        with torch.no_grad(), features, self.attention.masks(base, batch):
            return model(**self._inputs(base, batch), use_cache=False).logits

    def _inputs(self, base: Any, batch: Batch, *, router_aux: bool = False) -> dict[str, Any]:
        positions = batch["position_ids"]
        return {
            "input_ids": batch["input_ids"],
            "position_ids": positions if positions.shape[0] > 1 else positions[0],
            **self.attention.inputs(batch, weighed=router_aux),
            **batch["token_inputs"],
            **{k: v.to(base.dtype) if _is_floating(v) else v for k, v in batch["vision"].items()},
        }


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def sum_by_response(per_token: Tensor, batch: Batch) -> Tensor:
    """[R] sums of [N] token values by owner. Through a padded [R, longest] table: the same order of additions in every
    run, also on CUDA."""
    table = per_token.new_zeros(len(batch["lengths"]), batch["longest"])
    table = table.index_put((batch["owner"], batch["offset"]), per_token)
    return table.sum(1)


@contextmanager
def scored_head(
    base: Any, gather: Tensor, target: Tensor, *, fused: bool, impl: Impl, return_stats: bool, box: dict[str, Any]
) -> Iterator[None]:
    """Within the context, the output head of `base` returns the log-probs [1, N, 1] of `target` at the flat positions
    `gather` in place of logits.

    Statistics go to `box["stats"]`.
    """
    head = base.get_output_embeddings()
    plain_forward = head.forward
    options = applied_options(base)

    def forward(hidden: Tensor) -> Tensor:
        scored = hidden.reshape(-1, hidden.shape[-1]).index_select(0, gather.to(hidden.device))
        if fused:
            states, weight, bias = head_operands(head, scored)
            score = partial(
                linear_logprob,
                states,
                weight,
                target,
                bias,
                impl=impl,
                softcap=options.softcap,
                logit_scale=options.logit_scale,
            )
            logps, stats = score(return_stats=True) if return_stats else (score(), None)
        else:
            logps, stats = _logps_of_logits(plain_forward(scored), target, options, return_stats)
        box["stats"] = stats
        # The model's forward scales what the head returns. FSDP2 hooks the output of a module, which must not be a
        # view.
        return (logps / options.logit_scale)[None, :, None].clone()

    had_own = "forward" in head.__dict__
    previous = head.__dict__.get("forward")
    head.forward = forward
    try:
        with without_softcap(base, options):
            yield
    finally:
        if had_own:
            head.forward = previous
        else:
            del head.forward


def _logps_of_logits(
    logits: Tensor, target: Tensor, options: HeadOptions, return_stats: bool
) -> tuple[Tensor, LogprobStats | None]:
    logits = logits.float() if logits.dtype != torch.float64 else logits
    logits = logits * options.logit_scale
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    logp = logits.log_softmax(-1)
    chosen = logp.gather(1, target[:, None])[:, 0]
    if not return_stats:
        return chosen, None
    with torch.no_grad():
        p = logp.exp()
        stats = LogprobStats(
            mean_logit=logits.mean(1),
            entropy=-(p * logp).sum(1),
            is_top1=logits.argmax(1) == target,
            log_sum_sq_probs=torch.logsumexp(2 * logp, 1),
        )
    return chosen, stats
