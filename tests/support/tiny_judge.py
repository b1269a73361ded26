"""A real, tiny VLM (Qwen2.5-VL architecture) that has learnt by heart to answer a judge's question in VLFeedback's
Markdown form.

It looks at nothing but the place of a text: text 1 always gets a 4 and text 2 a 2. So its ratings are worthless and its
position bias is known."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from silkie.feedback import JudgeItem, default_rubric
from silkie.feedback.prompting import Form, judge_text, rubric_text
from silkie.feedback.rubric import Aspect, Rubric
from tests.support.tiny import QWEN_TEMPLATE, SPECIAL, tiny_model, tiny_processor

RATINGS = (4, 2)
# VLFeedback's aspects without the explanations: a short question is quick to learn.
RUBRIC = Rubric(
    name="short", introduction="rate .", aspects=tuple(Aspect(name=name) for name in default_rubric().aspect_names)
)
COLOURS = ("red", "green", "blue", "white")


def answer() -> str:
    lines = []
    for name in RUBRIC.aspect_names:
        lines.append(f"#### {name} Assessment")
        for number, rating in enumerate(RATINGS, 1):
            lines += [f"##### Output for Text {number}", f"Rating: {rating}", f"Rationale: seen{number} ."]
    return " \n ".join(lines)


def tokenizer() -> PreTrainedTokenizerFast:
    words = dict.fromkeys(
        [
            *answer().split(" "),
            *COLOURS,
            "circle",
            "square",
            "a",
            "is",
            "it",
            "what",
            "?",
            "user",
            "assistant",
            "system",
        ]
    )
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*SPECIAL, *words, "\n"]))}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[1:7],
    )
    fast.chat_template = QWEN_TEMPLATE
    return fast


def question(item: JudgeItem, form: Form) -> list[dict]:
    parts = [rubric_text(RUBRIC), judge_text(item, RUBRIC, form)]
    content = [{"type": "text", "text": parts[0]}, {"type": "image"}, {"type": "text", "text": parts[1]}]
    return [{"role": "user", "content": content}]


def save_judge(folder: Path, *, steps: int = 300, seed: int = 0) -> float:
    """Train the judge and save model and processor; returns the final loss per token."""
    tok = tokenizer()
    processor = tiny_processor()
    processor.tokenizer = tok
    processor.chat_template = tok.chat_template
    model = tiny_model(vocab_size=len(tok), hidden=64, seed=seed, num_attention_heads=8).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.div_(6.0)  # the spread that `tiny_model` adds for numerics tests makes training slow
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    target = tok(answer() + " <|im_end|>", add_special_tokens=False, return_tensors="pt").input_ids
    rng = random.Random(seed)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        # Texts of any length and of unknown words, and both forms of the question: the answer must not depend on them.
        texts = tuple(" ".join(rng.choices((*COLOURS, "a", "is", "other"), k=rng.randint(1, 14))) for _ in RATINGS)
        item = JudgeItem(
            id="x",
            prompt=" ".join(rng.choices(("what", "is", "it", "?", "other"), k=rng.randint(2, 8))),
            responses=texts,
        )
        text = processor.apply_chat_template(
            question(item, rng.choice(("json", "markdown"))), tokenize=False, add_generation_prompt=True
        )
        batch = processor(text=[text], images=[[Image.new("RGB", (56, 56), rng.choice(COLOURS))]], return_tensors="pt")
        ids = torch.cat([batch["input_ids"], target], dim=1)
        labels = ids.clone()
        labels[:, : batch["input_ids"].shape[1]] = -100
        loss = model(
            input_ids=ids,
            labels=labels,
            attention_mask=torch.ones_like(ids),
            pixel_values=batch["pixel_values"],
            image_grid_thw=batch["image_grid_thw"],
            **_token_types(batch, target),
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return loss.item()


def _token_types(batch: dict, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """`mm_token_type_ids` (which tokens stand for an image), where the processor gives them."""
    if "mm_token_type_ids" not in batch:
        return {}
    return {"mm_token_type_ids": torch.cat([batch["mm_token_type_ids"], torch.zeros_like(target)], dim=1)}
