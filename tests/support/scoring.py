"""Groups through a model in every layout, and the truth beside it: one response at a time through the model's stock
forward."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from silkie.batch.collator import GroupCollator
from silkie.batch.encoding import GroupEncoder
from silkie.model.adapters import default_lora_targets
from silkie.model.attention import IMPLEMENTATIONS, Attention
from silkie.model.families import causal_lm, family_of
from silkie.model.forward import LogpsForward, SequenceLogps
from silkie.model.positions import PromptPositions
from silkie.model.recurrent import CALLS, SHARED_CALLS, Calls
from silkie.model.vision import FeatureCache, vision_is_frozen
from tests.support.tiny import conversation, image


def groups(family: str) -> list[dict[str, Any]]:
    """4, 2 and 3 responses; one image, two images of different sizes, none (PaliGemma's processor wants an image)."""

    def row(images: list[Any], question: str, responses: list[str]) -> dict[str, Any]:
        return {
            "images": images,
            "prompt": conversation(question, len(images)),
            "responses": responses,
            "pairs": [[0, 1]],
        }

    return [
        row([image(0)], "what is in image ?", ["a red cat", "yes", "no not a dog on the table", "is it ?"]),
        row([image(1, 112, 56), image(2)], "how many cat are there in the image ?", ["two cat", "one"]),
        row([image(3)] if family == "paligemma" else [], "is there a dog", ["no", "yes yes", "one two three"]),
    ]


def with_lora(model: Any, seed: int = 0) -> Any:
    """LoRA on the language model, both factors random, so that every gradient is alive."""
    torch.manual_seed(seed)
    peft = get_peft_model(
        model,
        LoraConfig(r=4, lora_alpha=8, target_modules=default_lora_targets(model)),
        autocast_adapter_dtype=False,
    )
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return peft


def collate(
    model: Any,
    processor: Any,
    rows: list[dict[str, Any]],
    layout: str,
    groups_per_row: int | None = 1,
    *,
    share_prefix: bool = False,
) -> dict[str, Any]:
    return GroupCollator(
        encoder=GroupEncoder(processor),
        positions=PromptPositions(model),
        layout=layout,
        groups_per_row=groups_per_row,
        pad_id=processor.tokenizer.pad_token_id,
        image_token_id=causal_lm(model).config.image_token_id,
        share_prefix=share_prefix,
    )(rows)


def score(
    model: Any,
    processor: Any,
    rows: list[dict[str, Any]],
    layout: str,
    backend: str = "sdpa",
    *,
    batch: dict[str, Any] | None = None,
    fused: bool = True,
    share_prefix: bool = False,
    calls: Calls | None = None,
) -> SequenceLogps:
    """The log-probs of all responses; "flex" and "varlen" hold all groups in one row."""
    per_row = None if backend in ("flex", "varlen") else 1
    if batch is None:
        batch = collate(model, processor, rows, layout, per_row, share_prefix=share_prefix)
    causal_lm(model).set_attn_implementation({"text_config": IMPLEMENTATIONS[backend]})
    frozen = vision_is_frozen(model)
    calls = calls or (SHARED_CALLS if share_prefix else CALLS)
    forward = LogpsForward(attention=Attention(backend=backend, layout=layout, calls=calls), fused=fused)
    return forward(model, batch, frozen_vision=frozen, cache=FeatureCache() if frozen else None)


def stock_logps(family: str, model: Any, processor: Any, rows: list[dict[str, Any]]) -> Tensor:
    """fp [R]: every response in a sequence of its own, through the model's stock forward, positions and mask left to
    the model."""
    encoder, sums = GroupEncoder(processor), []
    base = causal_lm(model)
    base.set_attn_implementation({"text_config": "sdpa"})
    for row in rows:
        for response in row["responses"]:
            group = encoder.encode({**row, "responses": [response]})
            answer = group.responses[0]
            ids = torch.cat([group.prompt_ids, answer])[None]
            fill = family_of(base.config).response_types
            types = {
                name: torch.cat([value, torch.full_like(answer, fill.get(name, 0), dtype=value.dtype)])[None]
                for name, value in group.token_inputs.items()
            }
            vision = {k: v.to(base.dtype) if v.is_floating_point() else v for k, v in group.vision.items()}
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **types, **vision).logits[0]
            n = len(answer)
            sums.append(logits[-n - 1 : -1].log_softmax(-1).gather(1, answer[:, None]).sum())
    return torch.stack(sums)


def gradients(model: Any, logps: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed mix of the responses' log-probs."""
    model.zero_grad()
    (logps * torch.linspace(-1.0, 2.0, len(logps), dtype=logps.dtype)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
