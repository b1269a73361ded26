"""What measures the steps of a contender of `bench_step.py`. Peers' environments import it too: torch and transformers
only."""

from __future__ import annotations

import ctypes
import math
import re
import resource
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import TrainerCallback


class StepMeter(TrainerCallback):
    """Whole steps: collation, both passes, backward, optimizer. The first, a warm-up, runs under the FLOP counter and
    is not timed. Every run starts from the same LoRA weights, whatever made the adapter.

    Attributes:
        seconds: per timed step; on a CPU processor seconds of the process, which other jobs on the machine disturb
            little.
        flops: of the counted step, as torch counts them; of causal attention on a CPU what its kernel computes.
        losses: of all steps, as logged.
        tokens: input tokens of the counted step, of all its forward passes.
        extra_bytes: peak memory of the timed steps over what the process held before them (CUDA: the allocator's peak).
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.flops, self.tokens, self.extra_bytes = 0, 0, 0
        self._last, self._held, self._step = 0.0, 0, 0
        self._counter: FlopCounterMode | None = None
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        same_adapter(model)

    def on_log(self, args: Any, state: Any, control: Any, *, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        if self._step == 0:
            self._hook = model.get_input_embeddings().register_forward_pre_hook(self._count)
            cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the counter knows CUDA's attention only
            self._counter = FlopCounterMode(
                display=False,
                custom_mapping={
                    cpu: _forward_flops,
                    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_flops,
                },
            )
            self._counter.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self._now()
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._hook.remove()
            self.flops, self._counter = self._counter.get_total_flops(), None
            self._held = _hold(self.device)
            now = self._now()
        else:
            self.seconds.append(now - self._last)
            self.extra_bytes = _peak(self.device) - self._held
        self._last, self._step = now, self._step + 1

    def _count(self, embedding: Any, inputs: tuple[Any, ...]) -> None:
        self.tokens += inputs[0].numel()

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def same_adapter(model: torch.nn.Module) -> None:
    """Sets LoRA's weights from the names of the layers that they belong to: B zero, A random. Tools draw A in orders of
    their own, so that equal seeds make different runs."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.zero_()
            elif ".lora_A." in name:
                layer = name[name.find("layers.") :].split(".lora_A.")[0]
                gen = torch.Generator().manual_seed(zlib.crc32(layer.encode()))
                weight.copy_(torch.randn(weight.shape, generator=gen) / weight.shape[1] ** 0.5)


def _forward_flops(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    whole = sdpa_flop_count(query.shape, key.shape, value.shape)
    return round(whole * _computed(query.shape[-2], key.shape[-2], _causal(args, 1, kwargs)))


def _backward_flops(grad: Any, query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    whole = sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)
    return round(whole * _computed(query.shape[-2], key.shape[-2], _causal(args, 3, kwargs)))


for _formula in (_forward_flops, _backward_flops):
    _formula._get_raw = True  # type: ignore[attr-defined]  # the counter then hands over tensors, not shapes


def _causal(args: tuple[Any, ...], place: int, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("is_causal", args[place] if len(args) > place else False))


def _computed(queries: int, keys: int, causal: bool) -> float:
    """The part of all scores that the CPU's flash kernel computes: blocks of queries meet the keys up to their last
    query in steps of 512, as aten/src/ATen/native/cpu/FlashAttentionKernel.cpp has it. Without this, TRL's rows of 756
    tokens would be credited with work that nobody does."""
    if not causal:
        return 1.0
    block = 256 if queries >= 768 else 64 if queries >= 192 else 32
    starts = range(0, queries, block)
    met = [min(keys, 512 * math.ceil(min(start + block, keys) / 512)) for start in starts]
    return sum(min(block, queries - start) * n for start, n in zip(starts, met, strict=True)) / (queries * keys)


def _hold(device: str) -> int:
    """Bytes held now; resets the peak."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return 0
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
