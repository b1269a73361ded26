"""Start-up proof that a run's own path computes what the model's plain forward computes.

The truth is the model's forward on what its own processor makes of a prompt and one response, one sequence at a time,
with the model's own positions and masks: nothing of silkie's. Every layout is held to it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from silkie.batch.companies import Company
from silkie.batch.encoding import GroupEncoder, row_name
from silkie.batch.labels import Labels
from silkie.batch.packing import stems
from silkie.batch.template import plain_texts
from silkie.data.images import open_image
from silkie.data.schema import ROW_FORM, to_messages
from silkie.model.families import causal_lm, family_of, layer_types
from silkie.model.forward import LogpsForward
from silkie.model.vision import FeatureCache
from silkie.training.forward_context import ForwardContext
from silkie.training.non_finite import NonFiniteError

logger = logging.getLogger(__name__)

_TOLERANCE_FP32 = 2e-3
_TOLERANCE_HALF = 0.25
_LOOKED_AT = 64  # groups among which the test chooses
_MOST_RESPONSES = 4  # of a group, which are run through the plain forward

Collate = Callable[[Sequence[Mapping[str, Any]]], Any]


class LayoutMismatch(RuntimeError):
    """The run's layout does not compute what the model's plain forward computes."""


class TokenMismatch(RuntimeError):
    """The run's tokens are not those that the model's processor and chat template make."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """Compares a run's path with the model's plain forward.

    Attributes:
        encoder, collate, forward: the run's own.
        context: device placement and autocast of the run.
        half_precision: whether the run autocasts to fp16 or bf16.
        labels: of the run; prompts may score responses of other groups, too.
        tolerance: largest allowed difference of a token's log-prob, in nats; None: 2e-3, or 0.25 in half precision.
        features: the image features of a batch that the run's passes share.
        agree: the largest of a number over all ranks, so that every rank decides the same.
    """

    encoder: GroupEncoder
    collate: Collate
    forward: LogpsForward
    context: ForwardContext
    half_precision: bool
    labels: Labels | None
    tolerance: float | None
    features: Callable[[Any], FeatureCache | None] = lambda batch: None
    agree: Callable[[float], float] = float

    def __call__(self, model: Any, rows: Sequence[Mapping[str, Any]]) -> float:
        """Runs groups through both paths. Every rank calls it, with the same groups.

        Args:
            model: the policy as the training loop calls it (wrapped by DDP, FSDP2 or DeepSpeed).
            rows: groups of the training data, see `groups_to_test`.

        Returns:
            The largest absolute difference of a token's log-prob, in nats.

        Raises:
            LayoutMismatch: it is above the tolerance.
            TokenMismatch: the tokens differ.
            silkie.training.non_finite.NonFiniteError: the plain forward's log-probs are not finite.
        """
        rows = list(map(_with_few_responses, rows))
        base = causal_lm(model)
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.context.autocast():
                own = self._own(model, base, rows)
                if self.labels is not None and self.labels.mismatched:
                    rows, _ = self.labels.with_mismatched(rows)
                plain = [logps for row in rows for logps in plain_logps(model, self.encoder, row, self.context.prepare)]
        finally:
            model.train(training)
        if not all(bool(logps.isfinite().all()) for logps in plain):
            raise NonFiniteError(
                "Self-test: log-probs of the first groups are not finite even in the model's plain forward. The weights"
                " hold NaN or infinities, or overflow in this dtype: look at the checkpoint, or train in fp32 or bf16."
            )
        difference = self.agree(max(float((a - b).abs().max()) for a, b in zip(own, plain, strict=True)))
        tolerance = self.tolerance
        if tolerance is None:
            tolerance = _TOLERANCE_HALF if self.half_precision or _runs_in_half(base) else _TOLERANCE_FP32
        layout = self.forward.attention.layout
        # Not `difference > tolerance`, which is False for NaN.
        if not difference <= tolerance:
            raise LayoutMismatch(self._message(base, layout, difference, tolerance))
        logger.info(
            "self-test: layout=%r equals the model's plain forward within %.2g per token (tolerance %g)",
            layout,
            difference,
            tolerance,
        )
        return difference

    def _own(self, model: Any, base: Any, rows: Sequence[Mapping[str, Any]]) -> Sequence[Tensor]:
        """fp [n] log-probs of each response's tokens by the run's own path."""
        try:
            batch = self.context.prepare(self.collate(rows))
            cache = self.features(batch)
            logps = self.forward(model, batch, frozen_vision=True, cache=cache).per_token_logps
            if shared := stems(batch["segments"]):
                logger.info("self-test: groups share a stem of %d tokens", shared[0].length)
        # It says nothing about exactness, and the other layout would need more memory.
        except torch.OutOfMemoryError:
            raise
        except (TypeError, KeyError, IndexError, AttributeError, RuntimeError, ValueError) as error:
            layout = self.forward.attention.layout
            raise LayoutMismatch(
                f"Self-test failed: {type(base).__name__} cannot run in layout={layout!r} ({type(error).__name__}:"
                f" {error}). {_remedy(layout)}"
            ) from error
        return logps.split(batch["lengths"].tolist())

    def _message(self, base: Any, layout: str, difference: float, tolerance: float) -> str:
        kinds = ", ".join(sorted(layer_types(base.config)))
        return (
            f"Self-test failed: in layout={layout!r} the log-probs of the first groups differ from the model's plain"
            f" forward by up to {difference:.3g} per token (tolerance {tolerance:g}). {type(base).__name__} has {kinds}"
            f" layers; attention backend: {self.forward.attention.backend}. {_remedy(layout)}"
        )


def groups_to_test(dataset: Any, *, lengths: int = 2) -> list[dict[str, Any]]:
    """Groups among the first of a prepared dataset: two with images and one without where there are both, of different
    prompt length where there are such. Two with images, as their image tensors are joined.

    Args:
        lengths: prompt lengths wanted; further groups are added for them. Recurrent layers pad prompts of one call
            only, so one more than they have calls.
    """
    pictured: dict[int, dict[str, Any]] = {}
    plain: dict[int, dict[str, Any]] = {}
    for i in range(min(len(dataset), _LOOKED_AT)):
        row = dataset[i]
        (pictured if row.get("images") else plain)[i] = row
        seen = {r["prompt_length"] for r in (*pictured.values(), *plain.values())}
        if plain and len({r["prompt_length"] for r in pictured.values()}) > 1 and len(seen) >= lengths:
            break
    both = {**_of_different_length(pictured), **_of_different_length(plain)}
    chosen = {i: both[i] for i in list(both)[:3]}
    for i, row in sorted({**pictured, **plain}.items()):
        known = {r["prompt_length"] for r in chosen.values()}
        if len(known) < lengths and row["prompt_length"] not in known:
            chosen[i] = row
    return [chosen[i] for i in sorted(chosen)]


def _of_different_length(rows: Mapping[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The first row, and the first of another prompt length, or the second where all have the same."""
    others = list(rows)[1:]
    other = [i for i in others if rows[i]["prompt_length"] != rows[next(iter(rows))]["prompt_length"]]
    return {i: rows[i] for i in [*list(rows)[:1], *(other or others)[:1]]}


def company_to_test(dataset: Any, companies: Sequence[Company]) -> list[dict[str, Any]]:
    """Two groups of the training data that share the beginning of their prompts."""
    return [dataset[g] for g in companies[0].groups[:2]]


def plain_logps(
    model: Any, encoder: GroupEncoder, row: Mapping[str, Any], prepare: Callable[[Any], Any]
) -> list[Tensor]:
    """fp [n] log-probs of each response's tokens by the model's plain forward, one sequence at a time.

    Args:
        prepare: moves inputs to the model's device.

    Raises:
        TokenMismatch: the tokens of prompt and response are not those of the encoder.
    """
    base, group, out = causal_lm(model), encoder.encode(row), []
    for response, own in zip(row["responses"], group.responses, strict=True):
        inputs = plain_inputs(encoder, base, row, response)
        ids, start = inputs["input_ids"][0], len(group.prompt_ids)
        expected = torch.cat([group.prompt_ids, own])
        if len(ids) < len(expected) or not torch.equal(ids[: len(expected)], expected):
            raise TokenMismatch(_difference(encoder, row, ids, expected, start))
        inputs = prepare({k: v.to(base.dtype) if _is_floating(v) else v for k, v in inputs.items() if k != "labels"})
        keep = len(ids) - start + 1  # the prompt's last token predicts the response's first
        if "logits_to_keep" in inspect.signature(type(base).forward).parameters:
            inputs["logits_to_keep"] = keep
        logits = model(**inputs, use_cache=False).logits[0, -keep:][: len(own)]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        out.append(logits.log_softmax(-1).gather(1, own.to(logits.device)[:, None])[:, 0])
    return out


def plain_inputs(encoder: GroupEncoder, base: Any, row: Mapping[str, Any], response: str) -> dict[str, Any]:
    """What the model's own processor makes of a row's prompt and one response: the inputs of its plain forward."""
    processor = encoder.processor
    images = [open_image(image, where=row_name(row)) for image in row.get("images") or []]
    if family_of(base.config).suffix:  # the processor puts the response behind the prompt itself
        out = processor(
            text=[encoder.render(row)],
            images=[images],
            suffix=[response],
            return_tensors="pt",
            add_special_tokens=False,
        )
        return dict(out)
    if row.get("form") == "plain":
        return _plain_text_inputs(encoder, row, response, images)
    if encoder.tokenizer is processor or any(row.get(name) for name in ROW_FORM):
        text = encoder.template.write({**row, "responses": [response]}).conversations[0]
        return dict(encoder.splitter.process(text, images))
    waiting = iter(images)
    messages = []
    for message in to_messages(row["prompt"]):
        parts = [
            {"type": "image", "image": next(waiting)} if part["type"] == "image" else part
            for part in message["content"]
        ]
        messages.append({**message, "content": parts})
    messages.append({"role": "assistant", "content": [{"type": "text", "text": response}]})
    kwargs = encoder.template.variables(row)
    return dict(processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **kwargs))


def _plain_text_inputs(encoder: GroupEncoder, row: Mapping[str, Any], response: str, images: Any) -> dict[str, Any]:
    """Inputs of a row of strings: prompt and response as one text, or with images tokenised apart, as TRL does."""
    texts = plain_texts({**row, "responses": [response]}, encoder.tokenizer.eos_token)
    if not images:
        return dict(encoder.processor(text=[texts.conversations[0]], return_tensors="pt"))
    out = dict(encoder.processor(text=[texts.prompt], images=[images], return_tensors="pt", add_special_tokens=False))
    answer = encoder.tokenizer(texts.conversations[0][texts.shared :], add_special_tokens=False, return_tensors="pt")
    ids, prompt = answer["input_ids"], out["input_ids"]
    added = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name, value in list(out.items()):
        if isinstance(value, Tensor) and value.shape == prompt.shape and not value.is_floating_point():
            out[name] = torch.cat([value, added.get(name, torch.zeros_like(ids))], 1)
    return out


def _difference(encoder: GroupEncoder, row: Mapping[str, Any], plain: Tensor, own: Tensor, start: int) -> str:
    at = next((i for i, (a, b) in enumerate(zip(plain, own, strict=False)) if a != b), min(len(plain), len(own)))
    shown = [encoder.tokenizer.decode(ids[max(at - 4, 0) : at + 8]) for ids in (own, plain)]
    return (
        f"Self-test failed: {row_name(row)}: the tokens of prompt and response are not those of the model's processor"
        f" and chat template. They differ from token {at} on ({'prompt' if at < start else 'response'}): silkie has"
        f" {shown[0]!r}, the processor makes {shown[1]!r}. Use a chat template that writes an answer right after its"
        " generation prompt (TRL's *_training templates), or set `chat_template_kwargs`."
    )


def _with_few_responses(row: Mapping[str, Any]) -> dict[str, Any]:
    """The first responses of a group, without the pairs of the others."""
    kept = {name: list(row[name])[:_MOST_RESPONSES] for name in ("responses", "labels", "ratings") if row.get(name)}
    pairs = [list(p) for p in row["pairs"] if max(p) < _MOST_RESPONSES] or ([[0, 1]] if row["pairs"] else [])
    return {**{k: v for k, v in row.items() if k != "pair_weights"}, **kept, "pairs": pairs}


def _remedy(layout: str) -> str:
    if layout == "packed":
        return "Set layout='rows', or attention_backend='sdpa' if another backend is in use."
    return "silkie cannot train this model exactly: use TRL's DPOTrainer for it, and report its config."


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _runs_in_half(base: Any) -> bool:
    """Whether products lose as much as in half precision: half-precision weights, or 8-bit ones, which quantise
    activations, and which columns they spare depends on all rows of the input."""
    half = next(base.parameters()).dtype in (torch.bfloat16, torch.float16)
    return half or getattr(base, "is_loaded_in_8bit", False)
