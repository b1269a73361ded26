"""The reference policy (adapter off, frozen copy of a pre-loaded adapter, or second model) and its cache on disk."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor

from silkie.io.journal import Appender, scan
from silkie.model.families import causal_lm
from silkie.model.vision import vision_parameters

logger = logging.getLogger(__name__)

REFERENCE_ADAPTER = "ref"  # TRL's name for the frozen copy of a pre-loaded adapter


class Reference:
    """The reference policy of a run.

    Args:
        policy: the policy, wrapped or not.
        model: a second model, or None: the policy's own weights with the adapter off (or with the frozen copy "ref").

    Raises:
        ValueError: no second model, and the policy has no adapter to switch off.
    """

    def __init__(self, policy: Any, model: Any | None) -> None:
        self.model = model
        self.peft = _peft_model(policy)
        if model is None and self.peft is None:
            raise ValueError(
                "Full fine-tuning needs a reference model: pass `ref_model`, or train a LoRA adapter with"
                " `peft_config`."
            )
        self.shares_vision = model is None or _same_weights(vision_parameters(policy), vision_parameters(model))

    @property
    def kind(self) -> str:
        """How the reference is made, in words."""
        if self.model is not None:
            return "second model"
        return "copy of the initial adapter" if self._adapter else "adapter off"

    @property
    def _adapter(self) -> str | None:
        return REFERENCE_ADAPTER if self.peft is not None and REFERENCE_ADAPTER in self.peft.peft_config else None

    @contextmanager
    def active(self, policy: Any) -> Iterator[Any]:
        """Yields the model to call: in eval mode (no dropout, nothing to checkpoint), with the reference's adapter
        state, without gradients."""
        model = self.model if self.model is not None else policy
        training = model.training
        switch = nullcontext() if self.model is not None else self._switched()
        model.eval()
        try:
            with torch.no_grad(), switch:
                yield model
        finally:
            model.train(training)

    @contextmanager
    def _switched(self) -> Iterator[None]:
        assert self.peft is not None
        if self._adapter is None:
            with self.peft.disable_adapter():
                yield
            return
        previous = self.peft.active_adapter
        self.peft.set_adapter(self._adapter)
        try:
            yield
        finally:
            self.peft.set_adapter(previous)

    def weights_hash(self) -> str:
        """Hash of the reference's weights on this rank (ZeRO-3: of its shard)."""
        model: Any = self.model if self.model is not None else self.peft
        skip = (
            []
            if self.peft is None or self.model is not None
            else [f".{name}." for name in self.peft.peft_config if name != self._adapter]
        )
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps(causal_lm(model).config.to_dict(), sort_keys=True, default=str).encode())
        digest.update(json.dumps(self._adapter_configs(), sort_keys=True, default=_json_ready).encode())
        for name, parameter in model.named_parameters():
            if not any(s in name for s in skip):
                # ZeRO-3 keeps a rank's shard there and leaves the parameter itself empty.
                data = getattr(parameter, "ds_tensor", parameter).detach()
                data = data.to_local() if hasattr(data, "to_local") else data
                digest.update(name.encode())
                digest.update(data.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _adapter_configs(self) -> dict[str, Any]:
        """Configs of the adapters that are active in the reference: the hash of the weights misses an adapter's scale
        (`lora_alpha`, `use_rslora`)."""
        wrapped: Any = self.peft if self.model is None else _peft_model(self.model)
        active = (
            wrapped.active_adapters
            if self.model is not None and wrapped is not None
            else [self._adapter]
            if self._adapter
            else []
        )
        return {name: wrapped.peft_config[name].to_dict() for name in active}


def match_dtypes(model: Any) -> None:
    """Gives the weights of the frozen copy the dtypes of the adapter that it is a copy of, so that policy and reference
    are equal at the first step. TRL makes the copy in float32, and afterwards turns the adapter alone to bfloat16 where
    the model is quantized; ZeRO-3 takes parameters of one dtype only."""
    peft = _peft_model(model)
    if peft is None or REFERENCE_ADAPTER not in peft.peft_config:
        return
    for name, parameter in peft.named_parameters():
        if f".{REFERENCE_ADAPTER}." in name:
            own = peft.get_parameter(name.replace(f".{REFERENCE_ADAPTER}.", ".default."))
            parameter.data = parameter.data.to(own.dtype)


def _json_ready(value: Any) -> Any:
    """JSON-ready; sets are sorted, because their order differs between processes."""
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else str(value)


def _peft_model(model: Any) -> PeftModel | None:
    # DDP and DeepSpeed keep the model that they wrap in `.module`.
    while not isinstance(model, PeftModel):
        model = getattr(model, "module", None)
        if model is None:
            return None
    return model


def _same_weights(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two towers hold the same numbers on all ranks. Under ZeRO-3 every rank compares its shards; FSDP2 shards
    the reference before the policy, so they cannot be compared and are taken as different."""
    if any(isinstance(p, DTensor) for p in (*a, *b)):
        return False
    mine, other = ([getattr(p, "ds_tensor", p) for p in side] for side in (a, b))
    same = len(a) == len(b) and all(
        x.shape == y.shape and x.device == y.device and x.dtype == y.dtype and torch.equal(x, y)
        for x, y in zip(mine, other, strict=True)
    )
    return all(gather_object([same]))


def group_key(row: Mapping[str, Any], text: str) -> str:
    """Hash of what a group's reference log-probs depend on, besides model and tokenizer: responses, image bytes, the
    template's variables and the `text` of its prompt as the chat template wrote it (a template may write the date)."""
    digest = hashlib.blake2b(digest_size=16)
    form = [row["form"]] if row.get("form") else []
    digest.update(json.dumps([text, row["responses"], row.get("chat_template_kwargs"), *form]).encode())
    digest.update(json.dumps(row.get("image_digests") or []).encode())
    return digest.hexdigest()


class ReferenceStore:
    """Reference log-probs by group, on disk and in memory.

    One file of JSON lines per writer, only ever appended to: a killed pass loses at most its last lines and the next
    run resumes from there. fp32 numbers are kept exactly.

    Args:
        directory: of the cache.
        run_key: everything that the numbers depend on besides the group: weights, tokenizer, image processor, layout,
            dtype, kernel.
        tokens: whether per-token values are kept too.
    """

    def __init__(self, directory: str | Path, run_key: str, *, tokens: bool = False) -> None:
        self.directory = Path(directory) / run_key
        self.tokens = tokens
        # Group key -> per response its log-prob [1], or those of its tokens [n]
        self.values: dict[str, list[np.ndarray]] = {}
        self._file: Appender | None = None

    def load(self) -> int:
        """Reads what earlier passes wrote; returns the number of groups."""
        # A device or a pipe of such a name may have no end
        for file in sorted(f for f in self.directory.glob("*.jsonl") if f.is_file()):
            for entry in scan(file):
                record = entry.record or {}  # empty: what a killed writer or a broken disk left of a line
                try:
                    if record["tokens"] == self.tokens:
                        self.values[record["key"]] = [
                            np.frombuffer(base64.b64decode(v, validate=True), dtype="<f4") for v in record["logps"]
                        ]
                except (KeyError, TypeError, ValueError):
                    continue
        return len(self.values)

    def add(self, key: str, values: list[np.ndarray]) -> None:
        """Keeps the values of one group and appends them to this process's file.

        Raises:
            OSError: the file cannot be written (full disk); what was written before stays valid.
        """
        if self._file is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._file = Appender(self.directory / f"{platform.node()}-{os.getpid()}.jsonl", sync=False)
            # a process of the same number may have been killed here in the middle of a line
            if self._file.size:
                self._file.write(b"\n")
        self.values[key] = values
        packed = [base64.b64encode(v.astype("<f4").tobytes()).decode() for v in values]
        self._file.write(json.dumps({"key": key, "tokens": self.tokens, "logps": packed}).encode() + b"\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
