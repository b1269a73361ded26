"""Which layout and attention backend run on a model, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PretrainedConfig

from silkie.batch.packing import Layout
from silkie.model import recurrent
from silkie.model.attention import IMPLEMENTATIONS, ONE_GROUP_PER_ROW, Backend, probe, why_not_available
from silkie.model.attention.varlen import kernel_name
from silkie.model.families import attention_implementation, layer_types, why_not_packable

Lengths = tuple[int, Sequence[int]]  # of a group's prompt and of its responses


@dataclass(slots=True, frozen=True, kw_only=True)
class LayoutChoice:
    """The layout of a run.

    Attributes:
        layout, reason: what runs and why.
        backend, backend_reason: attention of the language model in the packed layout.
        groups_per_row: groups (trees of them) that share a row; None: the whole micro-batch.
        probed: the backend was found by a trial, and has still to prove itself in the whole model.
        shares_prefix: groups may share the beginning of their prompts; recurrent layers then take one more call.
        sharing: what is shared and why, or why not.
        calls, calls_reason: of a recurrent mixer per forward pass, and what they pad.
    """

    layout: Layout
    reason: str
    backend: Backend
    backend_reason: str
    groups_per_row: int | None
    probed: bool = False
    shares_prefix: bool = False
    sharing: str = "each prompt runs by itself"
    calls: recurrent.Calls = recurrent.CALLS
    calls_reason: str = ""

    @property
    def calls_without_padding(self) -> recurrent.Calls:
        """Those of a run in which all lengths are equal."""
        return recurrent.SHARED_CALLS if self.shares_prefix else recurrent.CALLS

    def apply(self, base: Any) -> None:
        """Sets the language model's attention implementation (the vision tower keeps its own), and has its recurrent
        mixers fork.

        Raises:
            ValueError: not all of the model's recurrent layers can fork.
        """
        if self.layout == "packed":
            forking, expected = recurrent.install(base), recurrent.count_recurrent(base.config)
            if forking != expected:
                raise ValueError(
                    f"{forking} recurrent mixers were found in a model whose config names {expected} recurrent layers:"
                    " set layout='rows'."
                )
        implementation = IMPLEMENTATIONS[self.backend]
        if self.layout == "packed" and attention_implementation(base.config.get_text_config()) != implementation:
            base.set_attn_implementation({"text_config": implementation})

    def on_sdpa(self, reason: str) -> LayoutChoice:
        """The same layout on the backend that is exact everywhere."""
        return replace(self, backend="sdpa", backend_reason=reason, groups_per_row=1, probed=False)

    def shapes(self, dataset: Dataset, *, mismatched: bool = False) -> list[tuple[int, int]]:
        """(rows, tokens of its longest row) of each group in a forward pass.

        Args:
            mismatched: each group also scores the responses of another one; its own are counted once more for them.
        """
        times = 2 if mismatched else 1
        own = (list(r) * times for r in dataset["response_lengths"][:])
        lengths = zip(dataset["prompt_length"][:], own, strict=True)
        if self.layout == "packed":
            return [(1, p + sum(r)) for p, r in lengths]
        return [(len(r), p + max(r)) for p, r in lengths]

    def lines(self) -> list[str]:
        """Human-readable summary lines."""
        out = [f"layout: {self.layout} ({self.reason})"]
        if self.layout == "packed":
            out.append(f"attention: {self.backend} ({self.backend_reason})")
            out.append(f"shared prefixes: {self.sharing}")
        if self.calls_reason:
            out.append(f"recurrent layers: {self.calls_reason}")
        return out


def choose_layout(config: PretrainedConfig, args: Any, groups: Sequence[Lengths] = ()) -> LayoutChoice:
    """The layout for a model.

    Args:
        groups: prompt length and response lengths of groups that could be a micro-batch of the run; on a GPU the
            attention backends are tried on them.

    Raises:
        ValueError: `layout="packed"` is asked for, and packing is wrong for the model.
    """
    if args.layout == "rows":
        return rows_choice("asked for")
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    # The larger number where prefixes may be shared: whether they will be is known only once the data has been looked
    # at.
    calls = recurrent.CALLS if args.share_prefix == "off" else recurrent.SHARED_CALLS
    obstacle = why_not_packable(config, args.device, dtype, calls=calls)
    if args.layout == "packed" and obstacle:
        raise ValueError(f"layout='packed' is not exact here: {obstacle}. Use layout='rows' or 'auto'.")
    if obstacle:
        return rows_choice(obstacle)
    backend, why = _choose_backend(config, args, groups, dtype)
    kinds = ", ".join(sorted(layer_types(config))).replace("_attention", "")
    reason = "asked for" if args.layout == "packed" else f"{config.model_type} has {kinds} attention only"
    if forks := recurrent.count_recurrent(config):
        layers = "recurrent layer starts" if forks == 1 else "recurrent layers start"
        reason = f"{forks} {layers} each response from the state of its prompt"
    return LayoutChoice(
        layout="packed",
        reason=reason,
        backend=backend,
        backend_reason=why,
        groups_per_row=1 if backend in ONE_GROUP_PER_ROW else None,
        probed=args.attention_backend == "auto" and backend not in ONE_GROUP_PER_ROW,
    )


def rows_choice(reason: str) -> LayoutChoice:
    """One row per response, by the model's own attention."""
    return LayoutChoice(
        layout="rows", reason=reason, backend="sdpa", backend_reason="the model's own", groups_per_row=1
    )


def _choose_backend(
    config: PretrainedConfig, args: Any, groups: Sequence[Lengths], dtype: torch.dtype
) -> tuple[Backend, str]:
    """Backend and reason.

    Raises:
        ValueError: the backend asked for cannot run here.
    """
    wanted = args.attention_backend
    device = torch.device(args.device)
    if wanted == "auto":
        # Its gain was measured on a CPU (examples/packing.md); on a GPU, unmeasured, the plain choice is the safe one.
        if device.type == "cpu" and why_not_available("segments", config, device) is None:
            return "segments", "sdpa without the scores that nothing sees, the fastest on a CPU; one group per row"
        own = getattr(config, "dtype", None)  # of a model that runs without autocast
        sizes = probe.sizes_of(config, groups, own if dtype == torch.float32 and own else dtype)
        if device.type == "cuda" and groups and sizes and not recurrent.count_recurrent(config):
            return _agreed(probe.fastest(config, sizes, device))
        return "sdpa", "exact on every device; one group per row"
    if obstacle := why_not_available(wanted, config, device):
        raise ValueError(f"attention_backend={wanted!r} cannot run here: {obstacle}.")
    return wanted, f"asked for; {kernel_name()}" if wanted == "varlen" else "asked for"


def _agreed(choice: tuple[Backend, str]) -> tuple[Backend, str]:
    """The main process's: ranks lay their rows out alike, and two may measure differently."""
    chosen = [choice]
    if PartialState().num_processes > 1:
        broadcast_object_list(chosen)
    return chosen[0]
