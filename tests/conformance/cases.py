"""The table of `examples/from_trl.md`: what a user of TRL's DPOTrainer meets after changing one import.

Every row is a `Case` that the tests run in both trainers, or in silkie alone where TRL cannot run it.
"""

from __future__ import annotations

from typing import Any

import datasets
import peft
from peft import LoraConfig

from tests.conformance.compare import METRICS, Case, chats, language_model, talk, turn
from tests.support.tiny import image, tiny_model, tiny_tokenizer

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
PLAIN = [
    {"prompt": "what is in image ?", "chosen": " a red cat", "rejected": " no"},
    {"prompt": "is there a dog", "chosen": " yes", "rejected": " one two three"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
CALL = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
MARK = "silkie reads it as the place of an image; TRL as text, with the images in front"


def parts(text: str, n_images: int = 1) -> list[dict[str, Any]]:
    content = [*({"type": "image"} for _ in range(n_images)), {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def answers(rows: list[dict[str, Any]], chosen: list[Any], rejected: list[Any]) -> list[dict[str, Any]]:
    return [{**row, "chosen": c, "rejected": r} for row, c, r in zip(rows, chosen, rejected, strict=True)]


def many(count: int, images: bool = True) -> list[dict[str, Any]]:
    """Rows of different prompts and lengths."""
    questions = [
        "what is in image ?",
        "how many dog are there",
        "is it a cat ?",
        "what ?",
        "is there a dog",
        "describe table",
    ]
    return [
        {
            "prompt": talk(question),
            "chosen": turn("a red cat" + " yes" * (i % 3)),
            "rejected": turn("no" + " one two" * (i % 2)),
            **({"images": [image(i)]} if images else {}),
        }
        for i, question in enumerate(questions[:count])
    ]


Q = {"target_modules": ["q_proj"]}
ADAPTERS = {
    "DoRA": lambda: LoraConfig(r=4, use_dora=True, **Q),
    "modules_to_save": lambda: LoraConfig(r=4, modules_to_save=["lm_head"], **Q),
    "bias='lora_only'": lambda: LoraConfig(r=4, bias="lora_only", **Q),
    "trainable_token_indices": lambda: LoraConfig(r=4, trainable_token_indices=[3, 4], **Q),
    "VeRA": lambda: peft.VeraConfig(r=4, **Q),
    "LoHa": lambda: peft.LoHaConfig(r=4, **Q),
    "OFT": lambda: peft.OFTConfig(r=4, oft_block_size=0, **Q),
    "IA3": lambda: peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def transformed() -> Any:
    rows = chats()
    data = datasets.Dataset.from_list([{"i": 0}, {"i": 1}])
    return data.with_transform(lambda batch: {name: [rows[i][name] for i in batch["i"]] for name in rows[0]})


def streamed() -> Any:
    return datasets.Dataset.from_list(chats()).to_iterable_dataset()


SEVERAL_TURNS = answers(
    chats(False),
    [turn("a cat") + talk("how many ?") + turn("two"), turn("yes")],
    [turn("no") + talk("how many ?") + turn("one"), turn("no no")],
)
TOOL_CALLS = answers(
    chats(False),
    [[{"role": "assistant", "content": "", "tool_calls": CALL}, {"role": "tool", "content": "two"}, *turn("two")]] * 2,
    [turn("no"), turn("one dog")],
)
TOOL_PROMPT = [
    {
        **row,
        "prompt": [
            *row["prompt"],
            {"role": "assistant", "content": "", "tool_calls": CALL},
            {"role": "tool", "content": "two"},
        ],
    }
    for row in chats(False)
]

DATA = [
    Case(name="conversations with `images`"),
    Case(name="conversations with `image`", rows=[{**r, "image": r["images"][0], "images": ...} for r in chats()]),
    Case(
        name="conversations of text and image parts",
        rows=[{**r, "prompt": parts("what is in image ?")} for r in chats()],
    ),
    Case(
        name="two images of different size",
        rows=[{**r, "images": [image(3), image(4, 84, 56)], "prompt": parts("what ?", 2)} for r in chats()],
    ),
    Case(name="rows without images", rows=[{**r, "images": []} for r in chats()]),
    Case(name="text data on a vision-language model", rows=chats(False)),
    Case(
        name="system and earlier turns in the prompt",
        rows=[
            {**r, "prompt": [{"role": "system", "content": "a cat"}, *talk("is it ?"), *turn("yes"), *talk("what ?")]}
            for r in chats()
        ],
    ),
    Case(name="an extra `messages` column", rows=chats(messages=talk("is it ?") + turn("no"))),
    Case(name="an extra `conversations` column", rows=chats(conversations=[{"from": "human", "value": "is it ?"}])),
    Case(name="an extra `instruction` column", rows=chats(instruction="is it ?")),
    Case(name="an extra `question` column", rows=chats(question="is it ?")),
    Case(name="extra columns of any other name", rows=chats(score=3.0, source="x", responses=["a"])),
    Case(
        name="prompt in chosen and rejected (conversations)",
        rows=[{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]} for r in chats(False)],
    ),
    Case(
        name="prompt in chosen and rejected (strings)",
        rows=[{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]} for r in PLAIN],
    ),
    Case(name="rows of strings", rows=PLAIN),
    Case(
        name="rows of strings with control tokens (a template applied beforehand)",
        rows=[
            {
                **r,
                "prompt": f"<|im_start|>user\n{r['prompt']}<|im_end|>\n<|im_start|>assistant\n",
                "chosen": "yes<|im_end|>",
            }
            for r in PLAIN
        ],
    ),
    Case(
        name="control tokens of the model in a conversation",
        rows=[{**r, "chosen": turn("yes<|im_end|>")} for r in chats()],
        expected="refused",
        why="special_tokens='parse', as TRL does",
    ),
    Case(
        name="control tokens in a conversation, special_tokens='parse'",
        rows=[{**r, "chosen": turn("yes<|im_end|> no")} for r in chats()],
        own={"special_tokens": "parse"},
    ),
    Case(name="several turns in an answer", rows=SEVERAL_TURNS),
    Case(name="tool calls in an answer", rows=TOOL_CALLS),
    Case(name="tool calls in the prompt", rows=TOOL_PROMPT),
    Case(name="a `tools` column", rows=chats(False, tools=TOOLS)),
    Case(name="a `tools` column of JSON text", rows=chats(False, tools='[{"type": "function"}]')),
    Case(name="a `chat_template_kwargs` column", rows=chats(False, chat_template_kwargs={"enable_thinking": False})),
    Case(name="`Dataset.with_transform`", rows=transformed, options={"remove_unused_columns": False}),
    Case(
        name="`IterableDataset` (streaming)",
        rows=streamed,
        note="read in windows of stream_window rows; pairs of the same prompt are joined within a window",
    ),
    Case(
        name="torch-formatted dataset",
        rows=lambda: datasets.Dataset.from_list(chats()).with_format("torch"),
        trl_crashes=True,
    ),
    Case(
        name="rows of strings with image tokens",
        rows=[{**r, "prompt": IMAGE + r["prompt"], "images": [image(i)]} for i, r in enumerate(PLAIN)],
        expected="different",
        why="the end token is added to every answer; TRL leaves it out where rows have images, so that the model does not learn to stop",
    ),
    Case(
        name="rows of strings with images and no image token",
        rows=[{**r, "images": [image(i)]} for i, r in enumerate(PLAIN)],
        trl_crashes=True,
        expected="different",
        why="TRL stops; here the chat template places the images, and the log says so",
    ),
    Case(
        name="prompt in chosen and rejected, with images",
        rows=[
            {"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"], "images": r["images"]}
            for r in chats()
        ],
        trl_crashes=True,
        expected="different",
        why="TRL stops; here it trains",
    ),
    Case(
        name="`images` that are null",
        rows=[{**r, "images": None} for r in chats()],
        trl_crashes=True,
        expected="different",
        why="TRL stops; here it is a row without images",
    ),
    Case(name="rows in random order over two epochs", rows=many(6), options={"max_steps": -1, "num_train_epochs": 2}),
    Case(name="random order with data_seed", rows=many(6), options={"max_steps": 3, "data_seed": 7}),
    Case(name="rows with and without images", rows=[chats()[0], {**chats()[1], "images": []}]),
    Case(
        name="grey images, images with alpha",
        rows=[
            {**r, "images": [image(i).convert(m)]} for i, (r, m) in enumerate(zip(chats(), ("L", "RGBA"), strict=True))
        ],
    ),
    Case(
        name="two rows of the same prompt, in one batch",
        rows=[chats()[0], {**chats()[0], "chosen": turn("two dog"), "rejected": turn("three")}],
    ),
    Case(
        name="a developer turn",
        rows=[{**r, "prompt": [{"role": "developer", "content": "a cat"}, *r["prompt"]]} for r in chats(False)],
        processor=tiny_tokenizer,
    ),
    Case(
        name="an `IterableDataset` that ends before max_steps",
        rows=lambda: datasets.Dataset.from_list(many(4)).to_iterable_dataset(),
        options={"max_steps": 3},
        note="read again, as in TRL; `epoch` in the log is the share of max_steps, TRL adds the number of passes",
    ),
    Case(
        name="a row that is there twice, in one batch",
        rows=[chats()[0], chats()[0], chats()[1]],
        options={"per_device_train_batch_size": 3},
    ),
    Case(
        name="rows of the same prompt and others, in several batches",
        rows=[chats(False)[0], {**chats(False)[0], "rejected": turn("two")}, *many(4, False)[1:3]],
        options={"train_sampling_strategy": "sequential"},
        expected="different",
        why="rows of the same prompt and images are one group, and batches count groups; load_preferences(rows, regroup_pairs=False) joins none",
    ),
    Case(
        name="equal answers in a row",
        rows=[chats(False)[0], {**chats(False)[1], "rejected": turn("two")}],
        expected="different",
        why="the row has no preference and is left out; TRL trains on it without a gradient",
    ),
    Case(
        name="the text <image> in a prompt with images",
        rows=[{**r, "prompt": talk("<image> what ?")} for r in chats()],
        expected="different",
        why=MARK,
    ),
    Case(
        name="an empty answer",
        rows=[{**r, "chosen": turn("")} for r in chats()],
        expected="refused",
        why="Repair the row, or drop and count such rows",
    ),
    Case(
        name="a prompt that ends with the assistant",
        rows=[{**r, "prompt": r["prompt"] + turn("yes")} for r in chats()],
        expected="refused",
        why="Move the last turn of the assistant into chosen and rejected",
    ),
    Case(
        name="an empty prompt of a row of strings",
        rows=[{**r, "prompt": ""} for r in PLAIN],
        expected="refused",
        why="Repair the row, or drop and count such rows",
    ),
    Case(
        name="another number of images than image parts",
        rows=[{**r, "prompt": parts("what ?", 2)} for r in chats()],
        trl_crashes=True,
        expected="refused",
        why="one mark per image",
    ),
    Case(name="a `videos` column", rows=chats(videos=["a.mp4"]), expected="refused", why="sample frames into `images`"),
    Case(
        name="a `DatasetDict` as train_dataset",
        rows=lambda: datasets.DatasetDict(train=datasets.Dataset.from_list(chats())),
        expected="refused",
        why="one split",
    ),
    Case(name="a list as train_dataset", rows=lambda: chats(), expected="refused", why="Dataset.from_list"),
]

LOSSES = [
    *(Case(name=f'loss_type=["{name}"]', options={"loss_type": [name]}) for name in (
        "sigmoid", "hinge", "ipo", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
        "apo_down", "discopop", "sft", "sigmoid_norm",
    )),
    Case(name='loss_type=["exo_pair"]', options={"loss_type": ["exo_pair"], "label_smoothing": 1e-3}),
    Case(name="several losses with weights (MPO)", options={"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}),
    *(Case(name=f"f_divergence_type={kind!r}", options={"f_divergence_type": kind}) for kind in ("forward_kl", "js_divergence", "alpha_divergence")),
    Case(name="ld_alpha", options={"ld_alpha": 0.5}),
    Case(name="use_weighting (WPO)", options={"use_weighting": True}),
    Case(name="label_smoothing, sigmoid", options={"label_smoothing": 0.1}, expected="different", why="conservative DPO; TRL ignores the option for this loss"),
    Case(name="label_smoothing, robust", options={"loss_type": ["robust"], "label_smoothing": 0.1}),
    Case(name="beta", options={"beta": 0.5}),
    Case(name="ld_alpha and use_weighting", options={"ld_alpha": 0.5, "use_weighting": True}),
    Case(name="a loss beside sft, gradient accumulation", rows=many(6, False), options={"loss_type": ["sigmoid", "sft"], "gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential"}, expected="different", why="sft is the mean over all chosen tokens of the optimizer step; TRL's is the mean of the means of micro-batches"),
    Case(name="an option that none of the losses reads", options={"discopop_tau": 0.2}, expected="refused", why="Remove the option or select one of them"),
]  # fmt: skip

OPTIONS = [
    Case(name="LoRA, reference with the adapter off"),
    Case(name="full fine-tuning with a reference model", peft=False, own={"freeze_vision": False}, note="freeze_vision=True is silkie's default; TRL's own DPOConfig trains the tower here, too"),
    Case(name="sync_ref_model", peft=False, own={"freeze_vision": False}, options={"sync_ref_model": True, "ref_model_sync_steps": 1}),
    Case(name="gradient_checkpointing", options={"gradient_checkpointing": True}),
    Case(name="gradient_accumulation_steps", options={"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}),
    Case(name="max_length that cuts answers", rows=chats(False), options={"max_length": 17}),
    Case(name="precompute_ref_log_probs, text data", rows=chats(False), options={"precompute_ref_log_probs": True}),
    Case(name="precompute_ref_log_probs, images", options={"precompute_ref_log_probs": True}, trl_crashes=True, expected="different", why="TRL refuses; here it runs, and its numbers are kept on disk"),
    Case(name="train_sampling_strategy='sequential'", options={"train_sampling_strategy": "sequential", "per_device_train_batch_size": 1}),
    Case(name="dataloader_drop_last", rows=[*chats(), {**chats()[0], "prompt": talk("is it a dog ?")}], options={"dataloader_drop_last": True, "train_sampling_strategy": "sequential"}),
    Case(name="dataloader_drop_last of a stream", rows=lambda: datasets.Dataset.from_list(many(5)).to_iterable_dataset(), options={"dataloader_drop_last": True, "max_steps": 3}, expected="different", why="the rest of a window is dropped; TRL ignores the option there"),
    Case(name="padding_free", options={"padding_free": True}, note="both trainers switch it off with a warning"),
    Case(name="pad_token", options={"pad_token": "<unk>"}),
    Case(name="pad_token that does not exist", options={"pad_token": "nope"}, trl_crashes=True, expected="refused", why="not found in the vocabulary"),
    Case(name="disable_dropout=False", options={"disable_dropout": False}),
    Case(name="max_grad_norm", options={"max_grad_norm": 0.01}),
    Case(name="weight_decay", options={"weight_decay": 0.1}),
    Case(name="token statistics in the log", own={"log_token_stats": True}, metrics=(*METRICS, "entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected", "num_tokens"), note="entropy, mean_token_accuracy and logits/* need log_token_stats=True"),
    *(Case(name=f"another adapter: {name}", adapter=adapter, rows=chats(False)) for name, adapter in ADAPTERS.items()),
    Case(name="prompt tuning, prefix tuning", adapter=lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), expected="refused", why="use LoRA"),
    Case(name="init_lora_weights='pissa'", adapter=lambda: LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), expected="refused", why="Pass that model as `ref_model`"),
    Case(name="a LoRA config without target_modules", adapter=lambda: LoraConfig(r=4), trl_crashes=True, expected="different", why="TRL stops; here it adapts the language model's attention and MLP projections"),
    Case(name="neftune_noise_alpha", options={"neftune_noise_alpha": 5.0}, expected="different", why="other random draws of the same noise; layout='auto' runs one row per response"),
    Case(name="AdamW, cosine schedule, warm-up", options={"optim": "adamw_torch", "lr_scheduler_type": "cosine", "warmup_steps": 1, "max_steps": 4, "learning_rate": 1e-2}),
    Case(name="gradient_checkpointing_kwargs={'use_reentrant': True}", options={"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    Case(name="dataloader_num_workers", options={"dataloader_num_workers": 1}),
    Case(name="train_sampling_strategy='group_by_length'", options={"train_sampling_strategy": "group_by_length"}, expected="refused", why="max_tokens_per_batch"),
    Case(name="accelerator_config.dispatch_batches", options={"accelerator_config": {"dispatch_batches": True}}, trl_crashes=True, expected="different", why="TRL cuts image tensors at the wrong places; here it is switched off with a warning"),
    Case(name="pad_to_multiple_of", rows=chats(False), options={"pad_to_multiple_of": 8}),
    Case(name="truncation_mode='keep_end'", options={"truncation_mode": "keep_end"}, expected="refused", why="prompts never"),
    Case(name="torch_compile", options={"torch_compile": True}, expected="refused", why="recompiles"),
    Case(name="accelerator_config.split_batches", options={"accelerator_config": {"split_batches": True}}, note="one process; with several it is refused: divide per_device_train_batch_size by their number"),
    Case(name="accelerator_config.use_seedable_sampler=False", rows=many(6), options={"accelerator_config": {"use_seedable_sampler": False}}, expected="different", why="the order still depends on seed and epoch alone; TRL's on all that drew random numbers before"),
    Case(name="token statistics over several micro-batches", rows=many(6, False), options={"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}, own={"log_token_stats": True}, metrics=(*METRICS, "entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected", "num_tokens")),
    Case(name="a last micro-batch that is smaller, gradient accumulation", rows=many(5, False), options={"gradient_accumulation_steps": 3, "max_steps": 2, "train_sampling_strategy": "sequential"}, expected="different", why="all pairs of an optimizer step weigh the same; in TRL those of a smaller micro-batch weigh more"),
    Case(name="include_num_input_tokens_seen", options={"include_num_input_tokens_seen": True}, own={"log_token_stats": True}, metrics=("num_input_tokens_seen",), expected="different", why="tokens of the packed rows; num_tokens are those of TRL's"),
    Case(name="max_length shorter than a prompt, text", rows=many(6, False), options={"max_length": 16, "train_sampling_strategy": "sequential"}, note="rows whose prompt leaves no room are dropped and counted"),
    Case(name="max_length shorter than a prompt, images", rows=many(6), options={"max_length": 18, "train_sampling_strategy": "sequential"}, expected="different", why="rows whose prompt leaves no room are dropped and counted; TRL trains on them without a scored token, or stops where image tokens are cut"),
    Case(name="load balancing loss of a mixture of experts", rows=chats(False), options={"router_aux_loss_coef": 0.5}, metrics=(*METRICS, "aux_loss"), adapter=lambda: LoraConfig(r=4, **Q), model=lambda: language_model("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32), processor=tiny_tokenizer, note="in packed rows, too, where a prompt is computed once: its tokens weigh as in TRL's rows"),
    Case(name="dropout rates that are not `nn.Dropout`", rows=chats(False), model=lambda: tiny_model(attention_dropout=0.5), expected="different", why="disable_dropout reaches them, too (attention_dropout, OPT's and a Q-Former's); TRL's leaves them random"),
]  # fmt: skip

LABELS = {"per_device_train_batch_size": 4, "train_sampling_strategy": "sequential", "max_steps": 3}
THUMBS = [
    {"prompt": talk(q), "completion": turn(a), "label": i != 1, "images": [image(i)]}
    for i, (q, a) in enumerate(
        {
            "what is in image ?": "a red cat",
            "how many dog": "one and not two",
            "is it a cat ?": "yes",
            "what ?": "no table",
        }.items()
    )
]
TEXT_THUMBS = [{k: v for k, v in row.items() if k != "images"} for row in THUMBS]
KTO_METRICS = (*METRICS, "kl", "num_tokens")
KTO = [
    Case(kto=True, name="thumbs up and down with images", rows=THUMBS, options=LABELS, metrics=KTO_METRICS),
    Case(kto=True, name="thumbs up and down, text", rows=TEXT_THUMBS, options=LABELS, metrics=KTO_METRICS),
    Case(kto=True, name="thumbs up and down, strings", rows=[{**r, "prompt": "what is in image ?" + " yes" * i, "completion": " " + r["completion"][0]["content"]} for i, r in enumerate(TEXT_THUMBS)], options=LABELS, metrics=KTO_METRICS),
    Case(kto=True, name="desirable_weight, undesirable_weight, beta", rows=THUMBS, options={**LABELS, "desirable_weight": 2.0, "undesirable_weight": 0.5, "beta": 0.5}, metrics=KTO_METRICS),
    Case(kto=True, name="apo_zero_unpaired", note="without `kl` in the log, which TRL writes as 0", rows=THUMBS, options={**LABELS, "loss_type": "apo_zero_unpaired"}, own={"loss_type": "apo_zero_unpaired"}),
    Case(kto=True, name="apo_zero_unpaired, precompute_ref_log_probs, text", rows=TEXT_THUMBS, options={**LABELS, "loss_type": "apo_zero_unpaired", "precompute_ref_log_probs": True}, own={"loss_type": "apo_zero_unpaired"}),
    Case(kto=True, name="several answers to a prompt", rows=[*TEXT_THUMBS[:3], {**TEXT_THUMBS[0], "completion": turn("no"), "label": False}], options={**LABELS, "desirable_weight": 2.0, "undesirable_weight": 0.5, "beta": 0.5}, expected="different", why="TRL scores an answer under the prompt of the row before, which may be its own; here under that of another prompt. TRL's rows are run apart"),
    Case(kto=True, name="gradient accumulation", rows=TEXT_THUMBS, options={**LABELS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, metrics=("loss", "kl", "num_tokens"), note="logps and rewards in the log are means over all desirable, or undesirable, responses; TRL's are means of the means of micro-batches"),
    Case(kto=True, name="random order", rows=THUMBS, options={**LABELS, "train_sampling_strategy": "random"}, trl_crashes=True, expected="different", why="TRL stops; here each micro-batch pairs its own rows for the KL term"),
    Case(kto=True, name="one row per micro-batch", rows=THUMBS, options={**LABELS, "per_device_train_batch_size": 1}, trl_crashes=True, expected="refused", why="per_device_train_batch_size to 2 or more"),
    Case(kto=True, name="kto, precompute_ref_log_probs", rows=TEXT_THUMBS, options={**LABELS, "precompute_ref_log_probs": True}, expected="refused", why="apo_zero_unpaired's can"),
    Case(name="labelled rows and a loss of pairs", rows=THUMBS, trl_crashes=True, expected="refused", why=r"loss_type=\['kto'\]"),
]  # fmt: skip

# Model types on which TRL's numbers are not those of the model's own forward, and why; `tests/integration/
# test_models_trl.py` shows that silkie's are, and that TRL's are without the cause.
_SCALE = (
    "TRL multiplies the logits by `logit_scale` of the text config, which the forward of the vision-language model in"
    " transformers does not"
)
TRL_DIFFERS = {
    "aya_vision": _SCALE,
    "cohere2_vision": _SCALE,
    "granite4_vision": "its Q-Former drops attention at random with a function, which TRL's `disable_dropout` does not"
    " reach; silkie's does",
    "hunyuan_vl": "its image tokens carry the number of the image, which transformers counts over all rows of a batch:"
    " TRL's numbers depend on which rows are together; silkie's are those of each row alone",
    "inkling_mm_model": "its forward divides the logits by `logits_mup_width_multiplier`, which TRL does not",
    "molmo2": "its processor puts the beginning-of-text token before every text, and TRL gives it answers alone: there"
    " is one before every answer",
}
# ... which TRL cannot run: its error, and what it comes from.
TRL_STOPS = {
    "ernie4_5_vl_moe": (
        "The shape of the mask",
        "its processor names the types of tokens `moe_mm_token_type_ids`, which TRL does not pad",
    ),
    "glm4v_moe": (
        "has no attribute 'num_experts'",
        "TRL's load balancing loss reads `num_experts`, and this config says `n_routed_experts`",
    ),
    "glm5_next": (
        "has no attribute 'num_experts'",
        "TRL's load balancing loss reads `num_experts`, and this config says `n_routed_experts`",
    ),
    "llama4": (
        "has no attribute 'last_hidden_state'",
        "its `base_model` is the language model with its head, which TRL takes for what is under the head",
    ),
    "paligemma": (
        "`images` are expected as arguments",
        "TRL tokenises prompts without their images, and this processor takes no text alone",
    ),
}

TABLE = {"Data": DATA, "Losses": LOSSES, "KTO": KTO, "Options": OPTIONS}

# What is called on a trainer; `test_calls.py` runs each.
CALLS = [
    ("positional arguments", "same", "TRL's order"),
    ("a plain `DPOConfig` as `args`", "same", "taken over with all its values; one log line"),
    ("no `args`", "same", "output_dir is MODEL-DPO"),
    ("`data_collator=` of TRL", "same", "its lengths are taken over; silkie's own collator makes the batches"),
    (
        "`data_collator=` of another kind",
        "refused",
        "silkie packs with its own; shape rows with `map` or `with_transform`",
    ),
    ("`processing_class=` a tokenizer", "same", "text data; language models pack, too"),
    ("`compute_metrics=`", "same", "logits and token ids of TRL's rows, from an extra forward, as in TRL"),
    (
        "`evaluate` on raw rows, or a dict of them",
        "same",
        "eval metrics are means over all pairs; TRL averages the means of batches, which differ where the last one is smaller",
    ),
    ('`include_for_metrics=["inputs"]`', "same", "the token ids of TRL's rows"),
    ("`predict` on raw rows", "same", "logits and token ids; text data, too, where TRL stops"),
    (
        "`train(resume_from_checkpoint=True)` without a checkpoint",
        "different",
        "TRL stops; here the run starts from the beginning, and the log says so",
    ),
    ("`LoraConfig()` without targets on a language model", "same", "peft's own targets where it knows the type"),
    ("a model of which nothing trains", "refused", "TRL fails in the backward pass; here before it starts"),
    ("`compute_ref_log_probs(model, batch)`", "same", "on the trainer's own batches"),
    ("`create_model_card(model_name, dataset_name, tags)`", "same", "silkie's card, with DPO's reference"),
    ("`num_tokens` in the log", "same", "tokens that silkie computes are num_packed_tokens"),
]
