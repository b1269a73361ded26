"""Whether a model's recurrent layers can be forked, found out by doing it: before the weights are loaded, each kind of
mixer runs prompts and responses both ways, on the device and in the dtype of the run, and gradients are compared.

A mixer can ignore the state it is given (Mamba-1 does for several tokens), a kernel can fail to send a gradient through
it (log-probs stay exact!), a projection can write something of padding into a state. All of that shows here.
Legend: R responses, D hidden.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING, PretrainedConfig

from silkie.batch.packing import Segment, lineage
from silkie.model.recurrent.calls import CALLS, SHARED_CALLS, Calls
from silkie.model.recurrent.fork import forked
from silkie.model.recurrent.layers import cache_argument, count_recurrent, mixers
from silkie.model.recurrent.plan import fork_plan
from silkie.model.weightless import weightless

logger = logging.getLogger(__name__)

# (tokens, parent) of the segments of a row: longer and shorter than the 64 tokens that chunked kernels take at a time,
# prompts of two lengths, one response of one token; and the same where prompts share a stem.
_ROWS: dict[Calls, list[tuple[int, int | None]]] = {
    CALLS: [(70, None), (1, 0), (66, 0), (3, None), (9, 3)],
    SHARED_CALLS: [(70, None), (67, 0), (1, 1), (66, 1), (5, 0), (4, 4), (3, None), (9, 6)],
}
_ROOM = 1e-3  # relative error beyond what rounding explains


def why_not_forkable(
    config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    calls: Calls = CALLS,
    try_out: bool = True,
) -> str | None:
    """The reason why the recurrent layers of a model cannot be forked, or None (also where it has none).

    Args:
        calls: of a mixer in a forward pass of the run.
        try_out: run the mixers, at the width of the model. False: ask only what config and classes tell.
    """
    layers = count_recurrent(config)
    if not layers:
        return None
    try:
        skeleton = _skeleton(config)
        found = mixers(skeleton)
    except ValueError as problem:
        return str(problem)
    if len(found) != layers:
        return f"{layers} of its layers are recurrent, but {len(found)} modules keep states in transformers' cache"
    for mixer in {type(m): m for _, m in found}.values() if try_out else ():
        if reason := _why_not_exact(mixer, skeleton.config.get_text_config(), device, dtype, calls):
            return reason
    return None


def _skeleton(config: PretrainedConfig) -> Any:
    """The language model without weights.

    Raises:
        ValueError: transformers has no class for it.
    """
    text: Any = copy.deepcopy(config.get_text_config())
    mapping: Any
    for mapping, own in ((MODEL_MAPPING, text), (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, copy.deepcopy(config))):
        if type(own) in mapping:
            with weightless():
                return mapping[type(own)](own)
    raise ValueError(f"transformers has no model class for {type(text).__name__}, whose layers could be looked at")


def _why_not_exact(mixer: nn.Module, config: Any, device: torch.device, dtype: torch.dtype, calls: Calls) -> str | None:
    """Prompts and responses of a mixer with random weights, forked and one sequence at a time: in float32 with
    transformers' own code, which shows what the mixer does with a state (half precision hides much in its rounding),
    then in the dtype and with the kernels of the run, which shows what they do."""
    row, segments = _packed_row(calls)
    hidden = torch.randn(1, row, config.hidden_size, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        twin = _twin(mixer, device)
        with _without_kernels(type(mixer)):
            truth = _results(twin, hidden, segments, calls=None)
            plain = _results(twin, hidden, segments, calls=calls)
        if reason := _difference(type(mixer), "transformers' code in float32", plain, truth, truth):
            return reason
        twin, hidden = twin.to(dtype), hidden.to(dtype)
        alone = _results(twin, hidden, segments, calls=None)
        forks = _results(twin, hidden, segments, calls=calls)
    except Exception as problem:  # whatever a module may raise that is used to living in its model
        return f"{type(mixer).__name__} cannot be tried out by itself ({type(problem).__name__}: {problem})"
    return _difference(
        type(mixer), f"the kernels of this run in {str(dtype).removeprefix('torch.')}", forks, alone, truth
    )


def _difference(
    mixer: type[nn.Module], what: str, forks: dict[str, Tensor], alone: dict[str, Tensor], truth: dict[str, Tensor]
) -> str | None:
    """Why forked results do not count as those of sequences that are run alone: they are further from the truth than
    rounding explains."""
    errors = {}
    for part in truth:
        # Measured against what the same kernels lose without forks: a fixed tolerance would be too wide in float32 or
        # too narrow in bf16.
        errors[part], allowed = _error(forks[part], truth[part]), 3 * _error(alone[part], truth[part]) + _ROOM
        if not errors[part] <= allowed:
            return (
                f"{mixer.__name__} does not start from the state of a prompt as if it had read the prompt: with {what},"
                f" {part} are off by {errors[part]:.2g} (allowed {allowed:.2g})"
            )
    found = ", ".join(f"{part} within {error:.2g}" for part, error in errors.items())
    logger.info("%s starts from the state of a prompt with %s: %s", mixer.__name__, what, found)
    return None


@contextmanager
def _without_kernels(mixer: type[nn.Module]) -> Iterator[None]:
    """Within the context, a mixer's forward runs transformers' PyTorch code in place of the kernels that it has bound
    (some refuse float32, some have a backward pass that is to be tried, not trusted)."""
    scope = inspect.unwrap(mixer.forward).__globals__
    bound = {name: scope[name] for name in inspect.unwrap(mixer.forward).__code__.co_names if name in scope}
    kernels = {name: f for name, f in bound.items() if callable(f) and hasattr(f, "__wrapped__")}
    scope.update({name: inspect.unwrap(f) for name, f in kernels.items()})
    try:
        yield
    finally:
        scope.update(kernels)


def _twin(mixer: nn.Module, device: torch.device) -> nn.Module:
    """A mixer (without weights) with weights of its own: wide projections, biases alive, and states that last."""
    twin = copy.deepcopy(mixer).to_empty(device=device).float().train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.dim() > 1:
                values = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
            else:  # time steps and decays among them: between -1 and 0 a state keeps about 0.7 per token
                values = torch.rand(parameter.shape, generator=generator) - 1
            parameter.copy_(values)
        for buffer in twin.buffers():  # constants that a model works out for its mixers
            if buffer.is_floating_point():
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return twin


def _packed_row(calls: Calls) -> tuple[int, list[Segment]]:
    """The tokens of one packed row, and its segments."""
    at = 0
    segments: list[Segment] = []
    for length, parent in _ROWS[calls]:
        segments.append(Segment(0, at, at + length, parent))
        at += length
    return at, segments


def _results(twin: nn.Module, hidden: Tensor, segments: list[Segment], *, calls: Calls | None) -> dict[str, Tensor]:
    """Outputs of all that continues a prompt, and gradients of a fixed mix of them: those of prompts have come through
    a state. `calls` None: one sequence at a time."""
    hidden = hidden.detach().clone().requires_grad_()
    twin.zero_grad()
    both = _alone(twin, hidden, segments) if calls is None else _forked(twin, hidden, segments, calls)
    out = torch.cat([both[:, s.start : s.end] for s in segments if s.parent is not None], 1)
    mix = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    (out * mix).sum().backward()
    assert hidden.grad is not None
    prompts = [hidden.grad[:, s.start : s.end] for s in segments if s.parent is None]
    weights = [p.grad.flatten() for p in twin.parameters() if p.grad is not None]
    results = {"outputs": out, "prompt gradients": torch.cat(prompts, 1), "weight gradients": torch.cat(weights)}
    return {what: value.detach().double().cpu() for what, value in results.items()}


def _alone(twin: nn.Module, hidden: Tensor, segments: list[Segment]) -> Tensor:
    """[1, T, D] each segment behind its ancestors, as a sequence of its own."""
    out = []
    for n, s in enumerate(segments):
        sequence = torch.cat([hidden[:, a.start : a.end] for a in lineage(segments, n)], 1)
        out.append(twin(sequence)[:, -s.length :])
    return torch.cat(out, 1)


def _forked(twin: nn.Module, hidden: Tensor, segments: list[Segment], calls: Calls) -> Tensor:
    def run(rows: Tensor, mask: Tensor | None, states: Any) -> Tensor:
        return twin(rows, attention_mask=mask, **{cache_argument(type(twin)): states})

    return forked(run, hidden, fork_plan(segments, hidden.shape[1], hidden.device, calls=calls))


def _error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())
