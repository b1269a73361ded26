"""One forward for every pair on recurrent layers: the state after a prompt is handed to each of its responses.

A mask cannot keep siblings apart in a recurrent state, but a state can be copied. A recurrent mixer's own forward is
called level by level of the tree of segments, twice for prompts and responses of like lengths:

    1  all prompts as one batch, padded on the left; the mixer leaves its convolution and recurrent states
    2  all responses as one batch, padded on the right; each starts from the states of its prompt

through the cache protocol that transformers' mixers speak for generation. `index_select` copies the states, so its
backward pass sums the gradients of all responses into their prompt. Whatever surrounds the mixer (norms, MLP, experts,
residuals) runs on the packed row, each token once.

Where lengths differ much, a level takes several calls (`silkie.model.recurrent.calls`). Their number is fixed for a
run, never a function of the batch: under ZeRO-3 and FSDP2 every call gathers weights, and a rank that called more or
less often than the others would hang them.

The plan reaches the mixers in place of their attention mask. Mask arguments are what gradient checkpointing keeps for
the recomputation; a context manager around the model's forward would be gone by then.
Legend: B rows, T tokens of a row, S segments of a call, L tokens of a call's row, D hidden, C channels, W width of a
convolution.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from silkie.model.recurrent.layers import cache_argument, mixers
from silkie.model.recurrent.plan import Call, ForkPlan


def install(model: nn.Module) -> int:
    """Has every recurrent mixer of a model fork where it is given a `ForkPlan` as its mask. With any other mask it is
    itself: rows, generation and saving know nothing of it. Once is enough, twice does no harm.

    Returns:
        The number of mixers.

    Raises:
        ValueError: something else has replaced a mixer's forward (offloading hooks of a device map, a kernel of the
            hub), which is not known to go along with it.
    """
    found = mixers(model)
    for name, mixer in found:
        other = mixer.__dict__.get("forward")
        if other is not None and getattr(other, "__func__", None) is not _forward:
            raise ValueError(
                f"{name} ({type(mixer).__name__}) has a forward of its own (a device map with offloading, or"
                " use_kernels=True), which cannot start from the state of a prompt: load the model without it, or set"
                " layout='rows'."
            )
        mixer.forward = MethodType(_forward, mixer)  # a bound method, which deepcopy binds to the copy
    return len(found)


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands in for the forward of a mixer's class."""
    signature = _signature(type(self).forward)
    given = signature.bind(self, *args, **kwargs).arguments
    plan = given.get("attention_mask")
    if not isinstance(plan, ForkPlan):
        return type(self).forward(self, *args, **kwargs)

    def run(hidden_states: Tensor, mask: Tensor | None, states: States) -> Any:
        own = {"hidden_states": hidden_states, "attention_mask": mask, cache_argument(type(self)): states}
        bound = inspect.BoundArguments(signature, type(given)({**given, **own}))
        return type(self).forward(*bound.args, **bound.kwargs)

    return forked(run, given["hidden_states"], plan)


def forked(run: Callable[..., Any], hidden_states: Tensor, plan: ForkPlan) -> Tensor:
    """[B, T, D] -> [B, T, D] through the calls of a plan.

    Args:
        run: (hidden states [S, L, D], mask [S, L] or None, `States`) -> [S, L, D].
    """
    b, t, d = hidden_states.shape
    flat, states, out = hidden_states.reshape(b * t, d), States(), []
    for call in plan.calls:
        states.begin(call)
        rows = flat.index_select(0, call.tokens.flatten()).unflatten(0, call.tokens.shape)
        out.append(run(rows, call.mask, states).flatten(0, 1))
    # The zero that `places` points at for padding.
    out.append(out[0].new_zeros(1, d))
    return torch.cat(out).index_select(0, plan.places).reshape(b, t, d)


@cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


class States:
    """What one mixer keeps between the calls of a plan.

    Speaks the part of transformers' `Cache` that mixers use. The stock cache copies in place, which autograd refuses,
    and does not know whose states to hand to whom.
    """

    def __init__(self) -> None:
        self._call: Call | None = None
        self._conv: dict[int, list[Tensor]] = {}  # state index -> per continued call [S, C, W]
        self._recurrent: dict[int, list[Tensor]] = {}

    def begin(self, call: Call) -> None:
        """Before each call."""
        self._call = call

    def get_conv_state(self, layer_idx: int = 0, state_idx: int = 0) -> Tensor | None:
        return self._inherited(self._conv, state_idx)

    def get_recurrent_state(self, layer_idx: int = 0, state_idx: int = 0) -> Tensor | None:
        return self._inherited(self._recurrent, state_idx)

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int = 0,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The inputs of a convolution with those before them in front, [S, C, at least W]."""
        assert self._call is not None
        if self._call.mask is not None:
            # a projection with a bias makes something of padding, which the convolution must not see
            conv_states = conv_states * self._call.mask[:, None, :]
        before = self._inherited(self._conv, state_idx)
        width = conv_kernel_size or conv_states.shape[-1]
        if before is None:
            full = nn.functional.pad(conv_states, (max(0, width - conv_states.shape[-1]), 0))
        else:
            full = torch.cat([before, conv_states], dim=-1)
        if self._call.continued:
            self._conv.setdefault(state_idx, []).append(full[..., -width:])
        return full

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int = 0, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        assert self._call is not None
        if self._call.continued:
            self._recurrent.setdefault(state_idx, []).append(recurrent_states)
        return recurrent_states

    def is_recording_past(self, layer_idx: int = 0) -> bool:
        return False

    def _inherited(self, kept: dict[int, list[Tensor]], state_idx: int) -> Tensor | None:
        """[S, ...] the states that the rows of this call start from."""
        assert self._call is not None
        if self._call.parent is None or state_idx not in kept:
            return None
        return torch.cat(kept[state_idx]).index_select(0, self._call.parent)
