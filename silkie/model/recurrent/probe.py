"""Whether a model's recurrent layers can be forked, found out by doing it: before the weights are loaded, each kind of
mixer runs prompts and responses both ways, on the device and in the dtype of the run, and gradients are compared.

A mixer can ignore the state it is given (Mamba-1 does for several tokens), a kernel can fail to send a gradient through
it (log-probs stay exact!), a projection can write something of padding into a state. All of that shows here.
Legend: R responses, D hidden.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING, PretrainedConfig

from silkie.batch.packing import Segment
from silkie.model.recurrent.fork import forked
from silkie.model.recurrent.layers import cache_argument, count_recurrent, mixers
from silkie.model.recurrent.plan import fork_plan

logger = logging.getLogger(__name__)

# Longer and shorter than the 64 tokens that chunked kernels take at a time, prompts of two lengths, one response of one
# token.
_PROMPTS = {70: (1, 66), 3: (9,)}
_ROOM = 1e-3  # relative error beyond what rounding explains


def why_not_forkable(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the recurrent layers of a model cannot be forked, or None (also where it has none)."""
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
    for mixer in {type(m): m for _, m in found}.values():
        for precision in dict.fromkeys((torch.float32, dtype)):  # half precision hides much in its rounding
            if reason := _why_not_exact(mixer, skeleton.config.get_text_config(), device, precision):
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
            with torch.device("meta"):
                return mapping[type(own)](own)
    raise ValueError(f"transformers has no model class for {type(text).__name__}, whose layers could be looked at")


def _why_not_exact(mixer: nn.Module, config: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Prompts and responses of a mixer with random weights, forked and one sequence at a time."""
    name = type(mixer).__name__
    row, segments = _row()
    hidden = torch.randn(1, row, config.hidden_size, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        twin = _twin(mixer, device)
        truth = _results(twin, hidden, segments, fork=False)
    except Exception as problem:  # whatever a module may raise that is used to living in its model
        return f"{name} cannot be tried out by itself ({type(problem).__name__}: {problem})"
    twin, hidden = twin.to(dtype), hidden.to(dtype)
    rounding = _results(twin, hidden, segments, fork=False)
    try:
        results = _results(twin, hidden, segments, fork=True)
    except Exception as problem:
        return f"{name} does not run from the state of a prompt ({type(problem).__name__}: {problem})"
    for what in truth:
        error, allowed = _error(results[what], truth[what]), 3 * _error(rounding[what], truth[what]) + _ROOM
        if not error <= allowed:
            return (
                f"{name} does not start from the state of a prompt as if it had read the prompt: {what} are off by"
                f" {error:.2g} in {dtype} on {device.type} (allowed {allowed:.2g})"
            )
        logger.info("%s starts from the state of a prompt: %s within %.2g", name, what, error)
    return None


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


def _row() -> tuple[int, list[Segment]]:
    """The tokens of one packed row, and its segments."""
    at = 0
    segments: list[Segment] = []
    for prompt, responses in _PROMPTS.items():
        parent = len(segments)
        for length in (prompt, *responses):
            segments.append(Segment(0, at, at + length, parent if len(segments) > parent else None))
            at += length
    return at, segments


def _results(twin: nn.Module, hidden: Tensor, segments: list[Segment], *, fork: bool) -> dict[str, Tensor]:
    """Outputs of the responses, and gradients of a fixed mix of them: those of prompts have come through a state."""
    hidden = hidden.detach().clone().requires_grad_()
    twin.zero_grad()
    both = _forked(twin, hidden, segments) if fork else _alone(twin, hidden, segments)
    out = torch.cat([both[:, s.start : s.end] for s in segments if s.parent is not None], 1)
    mix = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    (out * mix).sum().backward()
    assert hidden.grad is not None
    prompts = [hidden.grad[:, s.start : s.end] for s in segments if s.parent is None]
    weights = [p.grad.flatten() for p in twin.parameters() if p.grad is not None]
    results = {"outputs": out, "prompt gradients": torch.cat(prompts, 1), "weight gradients": torch.cat(weights)}
    return {what: value.detach().double().cpu() for what, value in results.items()}


def _alone(twin: nn.Module, hidden: Tensor, segments: list[Segment]) -> Tensor:
    """[1, T, D] each segment behind its prompt, as a sequence of its own."""
    out = []
    for s in segments:
        own, prompt = hidden[:, s.start : s.end], None if s.parent is None else segments[s.parent]
        sequence = own if prompt is None else torch.cat([hidden[:, prompt.start : prompt.end], own], 1)
        out.append(twin(sequence)[:, -s.length :])
    return torch.cat(out, 1)


def _forked(twin: nn.Module, hidden: Tensor, segments: list[Segment]) -> Tensor:
    def run(rows: Tensor, mask: Tensor | None, states: Any) -> Tensor:
        return twin(rows, attention_mask=mask, **{cache_argument(type(twin)): states})

    return forked(run, hidden, fork_plan(segments, hidden.shape[1], hidden.device))


def _error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())
