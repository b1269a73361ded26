"""Can silkie train this model, and how: encoding, both layouts against the model's plain forward, LoRA coverage, one
step. What `python -m silkie.model check` prints."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.batch.collator import GroupCollator, image_joins
from silkie.batch.encoding import GroupEncoder
from silkie.data.schema import group_features
from silkie.model import recurrent
from silkie.model.adapters import Coverage, coverage, with_default_targets
from silkie.model.attention import Attention
from silkie.model.dropout import dropout_rates
from silkie.model.families import causal_lm, check_merges_images
from silkie.model.forward import LogpsForward
from silkie.model.layout import choose_layout
from silkie.model.positions import PromptPositions
from silkie.model.processor import ask_for_token_types
from silkie.model.vision import describe_vision, vision_is_frozen
from silkie.training.self_test import plain_logps

logger = logging.getLogger(__name__)

EXACT = 1e-5  # nats per token, and relative difference of a gradient, in float64: models round in fp32 inside
# Relative difference of a gradient where recurrent layers compute in fp32 whatever their dtype, in another order when
# they fork. A leaking state or a lost gradient is 1e-1 or more.
EXACT_RECURRENT = 1e-3


@dataclass(slots=True, kw_only=True)
class LayoutVerdict:
    """How a layout compares with the model's plain forward.

    Attributes:
        difference: largest difference of a token's log-prob, in nats.
        gradient: largest relative difference of an adapter weight's gradient.
        room: the `gradient` up to which it is exact.
        error: why it could not be run.
    """

    difference: float = math.nan
    gradient: float = math.nan
    room: float = EXACT
    error: str | None = None

    @property
    def ran(self) -> bool:
        """Whether it was tried."""
        return self.error is not None or not math.isnan(self.difference)

    @property
    def exact(self) -> bool:
        return self.error is None and self.difference <= EXACT and self.gradient <= self.room


@dataclass(slots=True, kw_only=True)
class ModelVerdict:
    """What silkie makes of a model.

    Attributes:
        name: of the model or its type.
        layout: what `layout="auto"` takes; None where the model is refused.
        why: the reason for the layout, or why the model is refused.
        known: False where the model, its processor or its own forward did not run, which says nothing about silkie.
        rows, packed: the layouts.
        coverage: of the default LoRA adapter.
        vision: which parts make features.
        stepped: whether one training step with the default adapter ran.
        seconds: that the check took.
    """

    name: str
    layout: str | None = None
    why: str = ""
    known: bool = True
    rows: LayoutVerdict = field(default_factory=LayoutVerdict)
    packed: LayoutVerdict = field(default_factory=LayoutVerdict)
    coverage: Coverage | None = None
    vision: str = ""
    stepped: bool = False
    seconds: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether the layout that runs equals the plain forward, and a step of training ran."""
        run = {"rows": self.rows, "packed": self.packed}.get(self.layout or "")
        return run is not None and run.exact and self.stepped


def check_model(name: str, model: Any, processor: Any, rows: Sequence[Mapping[str, Any]]) -> ModelVerdict:
    """Checks a model on preference groups. It is changed: float64, with a LoRA adapter.

    Args:
        rows: groups, two or more of different prompt length.
    """
    start, verdict, doing = time.monotonic(), ModelVerdict(name=name), ""
    try:
        check_merges_images(model)
        ask_for_token_types(processor, type(causal_lm(model)).forward)
        encoder = GroupEncoder(processor)
        doing = "its own processor takes no row with an image"
        rows, refused = _usable(model, encoder, rows)
        doing = ""
        choice = choose_layout(
            causal_lm(model).config,
            SimpleNamespace(
                layout="auto", attention_backend="sdpa", share_prefix="off", device="cpu", bf16=False, fp16=False
            ),
        )
        if hasattr(causal_lm(model), "set_experts_implementation"):
            causal_lm(model).set_experts_implementation("eager")  # grouped products have no float64
        adapted = _with_adapter(model.double())
        verdict.coverage, verdict.vision = coverage(adapted), describe_vision(adapted)
        doing = "its own forward does not run"
        truth = _truth(adapted, encoder, rows)
    except Exception as error:  # whatever a model's own classes raise
        logger.debug("%s", name, exc_info=True)
        verdict.why, verdict.known = ": ".join(filter(None, [doing, _told(error)])), not doing
        verdict.seconds = time.monotonic() - start
        return verdict
    verdict.layout, verdict.why = choice.layout, "; ".join([choice.reason, *refused])
    verdict.rows = _layout(adapted, encoder, rows, "rows", truth)
    verdict.packed = _layout(adapted, encoder, rows, "packed", truth)
    if verdict.layout == "packed" and not verdict.packed.exact:
        verdict.layout, verdict.why = "rows", f"packed is not exact: {_short(verdict.packed)}"
    if verdict.layout == "rows" and not verdict.rows.exact:
        verdict.layout, verdict.why = None, f"not exact: {_short(verdict.rows)}"
    if verdict.layout:
        try:
            _step(adapted.unload().float(), processor, rows, verdict.layout)
            verdict.stepped = True
        except Exception as error:
            logger.debug("%s", name, exc_info=True)
            verdict.layout, verdict.why = None, f"a training step failed: {_told(error)}"
    verdict.seconds = time.monotonic() - start
    return verdict


def _usable(
    model: Any, encoder: GroupEncoder, rows: Sequence[Mapping[str, Any]]
) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The groups that a model and its processor take, and what they say of the others: some take no text without an
    image, some no second image.

    Raises:
        Exception: what they say of the first, where fewer than two are left to compare.
    """
    kept, errors = [], {}
    for row in rows:
        try:
            encoder.encode(row)
            if not row["images"]:
                with torch.no_grad():
                    plain_logps(model, encoder, row, dict)
            kept.append(row)
        except Exception as error:  # whatever a processor's or a model's own code raises
            errors[len(row["images"])] = error
    if len(kept) < 2:
        raise next(iter(errors.values()))
    counts = {0: "no image", 1: "one image", 2: "two images"}
    return kept, [f"a row with {counts[n]} is refused ({_told(error)})" for n, error in errors.items()]


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:240]


def _short(layout: LayoutVerdict) -> str:
    return layout.error or f"log-probs differ by {layout.difference:.2g}, gradients by {layout.gradient:.2g}"


def _with_adapter(model: Any) -> Any:
    """The default adapter, both factors random, so that every gradient is alive."""
    config = with_default_targets(LoraConfig(r=4, lora_alpha=8), model)
    torch.manual_seed(0)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.train()


def encode_image(image: Any) -> dict[str, Any]:
    """A picture as a dataset stores it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _truth(model: Any, encoder: GroupEncoder, rows: Sequence[Mapping[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    """`_plain_forward`, with what the model's class keeps in fp32 back in fp32 where it does not run in float64."""
    try:
        return _plain_forward(model, encoder, rows)
    except RuntimeError as error:
        kept = [w for w in _named_weights(model) if any(k in w[0] for k in _kept_in_fp32(model))]
        if "dtype" not in str(error) or not kept:
            raise
    for _, weight in kept:
        weight.data = weight.data.float()
    return _plain_forward(model, encoder, rows)


def _kept_in_fp32(model: Any) -> list[str]:
    """Parts of the names of weights that transformers keeps in fp32 in a model of another dtype (private)."""
    return list(getattr(causal_lm(model), "_keep_in_fp32_modules_strict", None) or [])


def _named_weights(model: Any) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _plain_forward(
    model: Any, encoder: GroupEncoder, rows: Sequence[Mapping[str, Any]]
) -> tuple[Tensor, dict[str, Tensor]]:
    with _without_dropout(model):
        logps = [logps for row in rows for logps in plain_logps(model, encoder, row, dict)]
    flat = torch.cat(logps)
    if not flat.isfinite().all():
        raise ValueError("log-probs of the plain forward are not finite")
    return flat.detach(), _gradients(model, flat)


def _layout(
    model: Any,
    encoder: GroupEncoder,
    rows: Sequence[Mapping[str, Any]],
    layout: Any,
    truth: tuple[Tensor, dict[str, Tensor]],
) -> LayoutVerdict:
    base, tokenizer = causal_lm(model), encoder.tokenizer
    collate = GroupCollator(
        encoder=encoder,
        positions=PromptPositions(model),
        layout=layout,
        pad_id=tokenizer.pad_token_id,
        image_token_id=getattr(base.config, "image_token_id", None),
        joins=image_joins(encoder),
    )
    forward = LogpsForward(attention=Attention(backend="sdpa", layout=layout))
    try:
        if layout == "packed":
            recurrent.install(base)
        with _without_dropout(model):
            own_logps = forward(model, collate(rows), frozen_vision=vision_is_frozen(model))
        found = _gradients(model, own_logps.per_token_logps)
    except Exception as error:
        logger.debug("%s", layout, exc_info=True)
        return LayoutVerdict(error=_told(error))
    logps, gradients = truth
    largest = max(float(g.norm()) for g in gradients.values())
    difference = float((own_logps.per_token_logps.detach() - logps).abs().max())
    relative = max(float((found[n] - g).norm() / max(float(g.norm()), 1e-3 * largest)) for n, g in gradients.items())
    room = EXACT_RECURRENT if layout == "packed" and recurrent.count_recurrent(base.config) else EXACT
    return LayoutVerdict(difference=difference, gradient=relative, room=room)


def _gradients(model: Any, logps: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed mix of the tokens' log-probs."""
    model.zero_grad()
    (logps * torch.linspace(-1.0, 2.0, len(logps), dtype=logps.dtype)).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    return gradients


@contextlib.contextmanager
def _without_dropout(model: Any) -> Any:
    """Training mode, which some models compute differently, with every dropout and every skipped path off."""
    random = list(dropout_rates(model))
    for module, name, _ in random:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, rate in random:
            setattr(module, name, rate)


def _step(model: Any, processor: Any, rows: Sequence[Mapping[str, Any]], layout: Any) -> None:
    """One step of the trainer with the default adapter, self-test included."""
    data = [
        {
            **dict.fromkeys(("id", "models")),
            **row,
            "images": [encode_image(image) for image in row["images"]],
            "pair_weights": [1.0] * len(row["pairs"]),
        }
        for row in rows
    ]
    with tempfile.TemporaryDirectory() as folder:
        args = SilkieDPOConfig(
            output_dir=folder,
            layout=layout,
            max_steps=1,
            per_device_train_batch_size=len(rows),
            use_cpu=next(model.parameters()).device.type == "cpu",
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        SilkieDPOTrainer(
            model,
            args=args,
            train_dataset=Dataset.from_list(data, features=group_features()),
            processing_class=processor,
            peft_config=LoraConfig(r=4, lora_alpha=8),
        ).train()
