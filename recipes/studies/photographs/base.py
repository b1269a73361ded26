"""The base model: pretrained language model + pretrained eye in stock LLaVA, taught to see and nothing else.

1. The language model's GGUF file becomes plain weights; tokenizer and chat template are its own.
2. Closed form: the projector maps an eye feature to the word embedding of what is on the photograph (ridge
   regression), so the language model starts with words in the place of images.
3. A short supervised stage (projector and LoRA) on descriptions and questions of boards of its own.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Trainer,
    TrainingArguments,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from photographs.boards import (
    DESCRIBE,
    MME_SUFFIX,
    NAMES,
    SIDE,
    SPLITS,
    Board,
    boards,
    existence,
    people_say,
    position,
    render,
)
from photographs.sources import Sources, photographs
from photographs.tower import EfficientNetLiteConfig, load_weights

logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"
LANGUAGE_PROJECTIONS = r".*\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
# What the language model's own template writes per message, and its turn for conversations without system message:
# 20 tokens that tell a text model its name. The first is made to take image parts, the second is dropped.
_PLAIN = "message['content']"
_PARTS = "parts(message['content'])"
_MACRO = (
    "{% macro parts(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' %}" + IMAGE_TOKEN + "\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}"
)
_SYSTEM_START, _SYSTEM_END = "{% if loop.first and messages[0]['role'] != 'system' %}", "{% endif %}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseSizes:
    """`eye_boards` for the closed form; then `described` descriptions and `asked` conversations of `questions`
    questions. A share `grouped` of the things described is called by the group's name, whatever they are and however
    well they show.
    """

    eye_boards: int = 1500
    described: int = 640
    asked: int = 320
    questions: int = 6
    grouped: float = 0.3
    batch: int = 16
    learning_rate: float = 1e-3
    rank: int = 16


def fast_dtype() -> torch.dtype:
    """bf16 where this processor multiplies it faster than fp32, else fp32; measured, since no flag says so."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(256, 576).to(dtype), torch.randn(576, 1536).to(dtype)
        a @ b
        times = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(4):
                a @ b
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return min(seconds, key=seconds.__getitem__)


def chat_template(own: str) -> str:
    """The language model's template for messages with image parts, without its default system turn.

    Raises:
        ValueError: the template is not the one this was written for.
    """
    if own.count(_PLAIN) != 1 or own.count(_SYSTEM_START) != 1:
        raise ValueError(f"the language model's chat template has changed: {own!r}")
    head, _, rest = own.partition(_SYSTEM_START)
    return _MACRO + head + rest.partition(_SYSTEM_END)[2].replace(_PLAIN, _PARTS)


def make_processor(sources: Sources) -> LlavaProcessor:
    """The language model's tokenizer with an image token, and an image processor with the eye's mean and scale."""
    file = sources.language_file()
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    template = chat_template(tokenizer.chat_template)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.chat_template = template
    tokenizer.pad_token = "<|endoftext|>"
    size = {"height": SIDE, "width": SIDE}
    pixels = CLIPImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3
    )
    return LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=EfficientNetLiteConfig().patch_size,
        vision_feature_select_strategy="full",
        chat_template=template,
        image_token=IMAGE_TOKEN,
    )


def assemble(sources: Sources, processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """Stock LLaVA, fp32, with both parts' published weights; the projector is still random."""
    file = sources.language_file()
    text: Any = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    tokenizer = processor.tokenizer
    config = {**text.config.to_dict(), "vocab_size": len(tokenizer)}
    config.pop("quantization_config", None)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=EfficientNetLiteConfig(),
            text_config=config,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            image_seq_length=(SIDE // EfficientNetLiteConfig().patch_size) ** 2,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
            projector_hidden_act="linear",
            tie_word_embeddings=True,
        )
    ).float()
    weights = dict(text.model.state_dict())
    known = weights.pop("embed_tokens.weight")
    result = model.model.language_model.load_state_dict(weights, strict=False)
    if result.unexpected_keys or [key for key in result.missing_keys if key != "embed_tokens.weight"]:
        raise ValueError(f"the language model does not fit: {result}")
    with torch.no_grad():
        table = model.model.language_model.embed_tokens.weight
        table[: len(known)] = known
        table[len(known) :] = known.mean(0)
    model.tie_weights()
    load_weights(model.model.vision_tower, str(sources.tower_file()))
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


@torch.no_grad()
def eye_features(model: Any, processor: Any, images: Sequence[Image.Image], dtype: torch.dtype, file: Path) -> Tensor:
    """What the frozen eye makes of boards, computed in `dtype`: [N, 4, D]. Kept in `file`."""
    if file.exists():
        return load_file(file)["features"]
    parts = []
    for start in tqdm(range(0, len(images), 25), desc="reading boards with the frozen eye", unit="batch"):
        pixels = processor.image_processor(images[start : start + 25], return_tensors="pt")["pixel_values"]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            parts.append(model.model.vision_tower(pixels).last_hidden_state.float())
    features = torch.cat(parts)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"features": features}, file)
    return features


@dataclass(frozen=True, slots=True)
class Eye:
    """Ridge regression on the eye's features: `kinds` [D, 10] scores the kinds, `words` [D, H] predicts word
    embeddings; both of features minus `mean` [D]."""

    mean: Tensor
    kinds: Tensor
    words: Tensor
    word_mean: Tensor

    def read(self, features: Tensor) -> Tensor:
        """The kind of every cell: [N, 4]."""
        return ((features - self.mean) @ self.kinds).argmax(-1)


def fit_eye(features: Tensor, labels: Tensor, words: Tensor, penalty: float = 30.0) -> Eye:
    """Closed form.

    Args:
        features: [N, 4, D]. labels: [N, 4]. words: [10, H], the word embedding of every kind.
    """
    x, y = features.flatten(0, 1).double(), labels.flatten()
    mean = x.mean(0)
    x = x - mean
    gram = x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    centre = words.double().mean(0)
    kinds = torch.linalg.solve(gram, x.T @ torch.nn.functional.one_hot(y, len(NAMES)).double())
    predicted = torch.linalg.solve(gram, x.T @ (words.double()[y] - centre))
    return Eye(mean.float(), kinds.float(), predicted.float(), centre.float())


def word_embeddings(model: Any, processor: Any) -> Tensor:
    """[10, H]: the mean embedding of every kind's tokens."""
    table = model.model.language_model.embed_tokens.weight.detach()
    ids = [processor.tokenizer(f" {name}", add_special_tokens=False).input_ids for name in NAMES]
    return torch.stack([table[own].mean(0) for own in ids])


def install(eye: Eye, model: Any) -> None:
    """Make the projector say the word: linear_1 is the regression, linear_2 the identity."""
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        projector.linear_1.weight.copy_(eye.words.T)
        projector.linear_1.bias.copy_(eye.word_mean - eye.mean @ eye.words)
        projector.linear_2.weight.copy_(torch.eye(projector.linear_2.weight.shape[0]))
        projector.linear_2.bias.zero_()


def turns(question: str, answer: str, first: bool) -> list[dict[str, Any]]:
    content = [{"type": "image"}] * first + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def lessons(
    own: Sequence[Board], described: int, grouped: float, seed: int, questions: int = 4
) -> list[list[dict[str, Any]]]:
    """A conversation per board: the first `described` are described, about the others `questions` are answered."""
    rng = np.random.default_rng([seed, 5])
    result = []
    for number, board in enumerate(own):
        if number < described:
            result.append(turns(DESCRIBE, people_say(board, rng, grouped), True))
            continue
        conversation: list[dict[str, Any]] = []
        for k in range(questions):
            label = bool(rng.integers(2))
            ask = existence(board, rng, label) if k % 2 == 0 else position(board, rng, label)
            text = ask.text + MME_SUFFIX * bool(rng.integers(2))
            conversation += turns(text, "Yes." if label else "No.", k == 0)
        result.append(conversation)
    return result


class Lessons(torch.utils.data.Dataset):
    """Conversations as token ids with labels on the assistant's words and its end-of-turn token only."""

    def __init__(self, conversations: Sequence[Any], images: Sequence[Image.Image], processor: Any) -> None:
        self.conversations, self.images, self.processor = conversations, images, processor

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        conversation, render_turns = self.conversations[index], self.processor.apply_chat_template
        text = render_turns(conversation, tokenize=False)
        batch = self.processor(text=[text], images=[self.images[index]], return_tensors="pt")
        ids = batch["input_ids"][0]
        labels = torch.full_like(ids, -100)
        for end in range(2, len(conversation) + 1, 2):
            before = render_turns(conversation[: end - 1], tokenize=False, add_generation_prompt=True)
            start = self._length(before)
            stop = self._length(render_turns(conversation[:end], tokenize=False).removesuffix("\n"))
            labels[start:stop] = ids[start:stop]
        return {"input_ids": ids, "labels": labels, "pixel_values": batch["pixel_values"][0]}

    def _length(self, text: str) -> int:
        cells = (SIDE // EfficientNetLiteConfig().patch_size) ** 2
        text = text.replace(IMAGE_TOKEN, IMAGE_TOKEN * cells)
        return len(self.processor.tokenizer(text, add_special_tokens=False).input_ids)


def batched_order(kinds: Sequence[int], batch: int, seed: int) -> list[int]:
    """An order of the rows in which every batch is of one kind (so that long rows do not pad short ones), the batches
    shuffled. Rows that fill no batch of their kind come last."""
    rng = np.random.default_rng([seed, 6])
    batches, rest = [], []
    for kind in sorted(set(kinds)):
        own = rng.permutation([i for i, k in enumerate(kinds) if k == kind]).tolist()
        whole = len(own) // batch * batch
        batches += [own[i : i + batch] for i in range(0, whole, batch)]
        rest += own[whole:]
    return [i for k in rng.permutation(len(batches)) for i in batches[k]] + rest


@dataclass(frozen=True, slots=True)
class Pad:
    """Right-pads a batch of lessons."""

    pad_id: int

    def __call__(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([row["input_ids"] for row in rows], batch_first=True, padding_value=self.pad_id)
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return {
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
            "labels": pad([row["labels"] for row in rows], batch_first=True, padding_value=-100),
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        }


class Teacher(Trainer):
    """Cross-entropy of the labelled tokens, whose logits alone are computed: one token in seven of a conversation is
    the assistant's, and the vocabulary's 49,153 columns are a fifth of this model's work."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")[:, 1:]
        llava = self.accelerator.unwrap_model(model).get_base_model()
        said = labels != -100
        with self.accelerator.autocast():
            states = llava.model(**inputs).last_hidden_state[:, :-1]
            logits = llava.lm_head(states[said])
        total = torch.nn.functional.cross_entropy(logits.float(), labels[said], reduction="sum")
        return total / (said.sum() if num_items_in_batch is None else num_items_in_batch)


def teach(model: Any, data: Lessons, directory: Path, sizes: BaseSizes, seed: int, dtype: torch.dtype) -> Any:
    """The supervised stage; resumes from its last checkpoint. Returns the model with the adapter folded in."""
    adapter = LoraConfig(
        r=sizes.rank,
        lora_alpha=2 * sizes.rank,
        target_modules=LANGUAGE_PROJECTIONS,
        modules_to_save=["multi_modal_projector"],
    )
    policy = get_peft_model(model.to(dtype), adapter)
    for parameter in policy.parameters():  # frozen weights in the fast dtype, those that train in fp32
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=sizes.batch,
        num_train_epochs=1,
        learning_rate=sizes.learning_rate,
        lr_scheduler_type="cosine",
        train_sampling_strategy="sequential",  # the lessons are in their order
        warmup_steps=5,
        weight_decay=0.0,
        logging_steps=5,
        save_steps=25,
        save_total_limit=1,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        bf16=dtype == torch.bfloat16,
        seed=seed,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    trainer = Teacher(
        model=policy, args=arguments, train_dataset=data, data_collator=Pad(data.processor.tokenizer.pad_token_id)
    )
    trainer.train(resume_from_checkpoint=any(directory.glob("checkpoint-*")) or None)
    (directory / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n", encoding="utf-8")
    return policy.merge_and_unload()


def build_base(sources: Sources, directory: Path, sizes: BaseSizes, *, seed: int = 0) -> dict[str, Any]:
    """Make the base in `directory` (a plain model directory) unless it is there. Returns facts about the eye.

    The facts: `probe`, the share of development photographs whose kind the ridge regression reads rightly, which bounds
    what any training of the language model can reach; `exact`, of boards with all four right; `confusable`, per kind
    the one it is most often taken for (on photographs of the base split).
    """
    facts_file = directory / "facts.json"
    if facts_file.exists():
        return json.loads(facts_file.read_text(encoding="utf-8"))
    pictures, labels = photographs(sources, SPLITS["base"][0])
    processor = make_processor(sources)
    model = assemble(sources, processor)
    count = max(sizes.eye_boards, sizes.described + sizes.asked)
    own = boards(labels, "base", count, seed)
    images = [render(board, pictures) for board in own]
    development = boards(labels, "development", min(300, sizes.eye_boards), seed)
    stage = directory.with_name(directory.name + "-stage")
    dtype = fast_dtype()
    logger.info("this processor is faster in %s", dtype)
    features = eye_features(model, processor, images, dtype, stage / "features.safetensors")
    looked = [render(board, pictures) for board in development]
    unseen = eye_features(model, processor, looked, dtype, stage / "unseen.safetensors")
    truth = torch.tensor([board.labels for board in own])
    eye = fit_eye(features, truth, word_embeddings(model, processor))
    install(eye, model)
    facts = {"dtype": str(dtype).removeprefix("torch."), **eye_facts(eye, unseen, development)}
    half = count // 2  # the confusions are read on photographs that this regression has not seen
    part = fit_eye(features[:half], truth[:half], word_embeddings(model, processor))
    facts["confusable"] = confusions(part.read(features[half:]), truth[half:])
    logger.info("the eye reads %.1f %% of unseen photographs rightly", 100 * facts["probe"])
    taught = own[: sizes.described + sizes.asked]
    conversations = lessons(taught, sizes.described, sizes.grouped, seed, sizes.questions)
    order = batched_order([len(c) for c in conversations], sizes.batch, seed)
    data = Lessons([conversations[i] for i in order], [images[i] for i in order], processor)
    merged = teach(model, data, stage, sizes, seed, dtype)
    facts["train_photographs"] = 4 * (sizes.described + sizes.asked)
    merged.to(dtype).save_pretrained(directory)
    processor.save_pretrained(directory)
    facts_file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def eye_facts(eye: Eye, features: Tensor, own: Sequence[Board]) -> dict[str, Any]:
    read = eye.read(features)
    truth = torch.tensor([board.labels for board in own])
    right = read == truth
    invented = sum(len(set(said) - set(there)) for said, there in zip(read.tolist(), truth.tolist(), strict=True))
    named = sum(len(set(said)) for said in read.tolist())
    return {
        "probe": right.double().mean().item(),
        "exact": right.all(1).double().mean().item(),
        "invented_per_board": invented / len(own),
        "chair_i": invented / named,
        "recall": 1
        - sum(len(set(t) - set(s)) for s, t in zip(read.tolist(), truth.tolist(), strict=True)) / truth.numel(),
    }


def confusions(read: Tensor, truth: Tensor) -> list[int]:
    """Per kind the wrong kind that it is most often read as."""
    counts = torch.zeros(len(NAMES), len(NAMES), dtype=torch.long)
    for said, there in zip(read.flatten().tolist(), truth.flatten().tolist(), strict=True):
        counts[there, said] += said != there
    return counts.argmax(1).tolist()
