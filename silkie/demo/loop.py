"""The whole preference loop on the embedded world: sample, rate, write VLFeedback records, train, evaluate, compare
with the controls, report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tqdm import tqdm

from silkie.config import SilkieDPOConfig
from silkie.data import load_preferences
from silkie.demo import oracle
from silkie.demo.data import DemoItem, evaluation_items, vlfeedback_records, write_images, write_jsonl
from silkie.demo.results import Recipe, Scores, Sizes, Summary
from silkie.demo.scenes import draw_scene
from silkie.demo.scores import score_answers
from silkie.feedback import JudgeItem, OracleJudge, RatedItem, rate_items
from silkie.inference import generate, load_policy
from silkie.model.weights import refuse_pickled_adapter
from silkie.trainer import SilkieDPOTrainer

BATCH = 128
# Held-out questions of the final figures. The base weights and the recipe were chosen on those of seed 7.
EVALUATION_SEED = 2024
MAX_NEW_TOKENS = 28
DECODING = {"greedy": 0.0, "T=1": 1.0}


def sharing_reference(recipe: Recipe, output: Path) -> Recipe:
    """The recipe, reading the reference's log-probs from a cache of the run: DPO and its controls train on the same
    responses, so the reference sees each of them once instead of once per epoch and recipe."""
    if set(recipe.losses) <= {"sft"}:  # reads no reference
        return recipe
    cache = {"precompute_ref_log_probs": True, "reference_cache_dir": str(output / "reference")}
    return replace(recipe, options={**cache, **recipe.options})


def held_out(sizes: Sizes) -> list[DemoItem]:
    """The held-out questions; the same for every seed and recipe."""
    return evaluation_items(
        EVALUATION_SEED,
        mme_images=sizes.mme_images,
        pope_images=sizes.pope_images,
        captions=sizes.captions,
        red_team_images=sizes.red_team_images,
    )


def shown_options(trainer: SilkieDPOTrainer) -> dict[str, dict[str, Any]]:
    """The options of a training run that its report page shows."""
    args = trainer.args
    adapter = trainer.model.peft_config["default"]
    names = ("beta", "learning_rate", "num_train_epochs", "per_device_train_batch_size", "lr_scheduler_type", "seed")
    training = {name: getattr(args, name) for name in names}
    losses = dict(zip(args.loss_type, args.loss_weights or [1.0], strict=True))
    return {
        "Training": {"losses": [f"{weight:g} x {name}" for name, weight in losses.items()], **training},
        "Adapter": {"rank": adapter.r, "alpha": adapter.lora_alpha, "targets": sorted(adapter.target_modules)},
        "Run": {line.partition(":")[0]: line.partition(":")[2].strip() for line in trainer.plan_lines() if ":" in line},
    }


def load_base(base_dir: str | Path) -> tuple[Any, Any]:
    """The base model in fp32 (faster than bf16 on a CPU; rounding the weights moved no metric) and its processor."""
    return load_policy(base_dir, dtype=torch.float32)


def answer_items(
    model: Any,
    processor: Any,
    items: Sequence[DemoItem],
    *,
    temperature: float,
    samples: int = 1,
    seed: int = 0,
    title: str = "answering",
    progress: Callable[[int], Any] | None = None,
) -> list[list[str]]:
    """`samples` answers per item, in the order of `items`. Items of one kind are answered together: a batch takes as
    long as its longest answer. `progress`: called with the number of items answered, in the place of a bar."""
    order = sorted(range(len(items)), key=lambda k: (items[k].question.kind, len(items[k].prompt.split())))
    with tqdm(total=len(items), desc=title, unit="prompt", disable=progress is not None) as bar:
        texts = generate(
            model,
            processor,
            [items[k].conversation for k in order],
            [[draw_scene(items[k].scene)] for k in order],
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=temperature,
            num_return_sequences=samples,
            seed=seed,
            batch_size=BATCH,
            progress=progress or bar.update,
        )
    answers: list[list[str]] = [[] for _ in items]
    for k, own in zip(order, texts, strict=True):
        answers[k] = own
    return answers


def feedback(
    items: list[DemoItem], directory: Path, base_dir: str | Path, seed: int, watch: Callable[[str], Any]
) -> Path:
    """Sample four responses per prompt from the base at temperature 1, have the oracle rate them, and write VLFeedback
    records and images."""
    model, processor = load_base(base_dir)
    with watch("sample"):
        responses = answer_items(
            model, processor, items, temperature=1.0, samples=4, seed=seed, title="sampling 4 responses"
        )
    with watch("rate"):
        rated = rate_responses(items, responses)
    return write_records(items, responses, rated, [f"base-sample-{k}" for k in range(4)], directory)


def rate_responses(items: Sequence[DemoItem], responses: Sequence[Sequence[str]]) -> list[RatedItem]:
    """The oracle's ratings of every item's responses."""
    todo = [
        JudgeItem(
            id=item.id,
            prompt=item.prompt,
            responses=tuple(own),
            meta={"scene": item.scene, "question": item.question},
        )
        for item, own in zip(items, responses, strict=True)
    ]
    return rate_items(tqdm(todo, desc="rating", unit="prompt"), OracleJudge(oracle.judge))


def write_records(
    items: Sequence[DemoItem],
    responses: Sequence[Sequence[str]],
    rated: Sequence[RatedItem],
    models: Sequence[str],
    directory: Path,
) -> Path:
    """Write the rated responses as VLFeedback records, and the images beside them; the path of the records."""
    annotations = [
        [
            {aspect: {"Rating": f"{value:g}", "Rationale": why[aspect]} for aspect, value in row.items()}
            for row, why in zip(result.ratings, result.rationales, strict=True)
        ]
        for result in rated
    ]
    write_images(items, directory / "images")
    return write_jsonl(vlfeedback_records(items, responses, annotations, models), directory / "vlfeedback.jsonl")


def preferences(recipe: Recipe, source: dict[str, str], seed: int) -> Dataset:
    """The rated responses as preference groups; for the shuffled control the two sides of every pair are drawn anew,
    group by group."""
    # on_error: samples may be empty
    data = load_preferences(source["source"], image_root=source["image_root"], pairs=recipe.pairs, on_error="skip")
    if not recipe.shuffled:
        return data
    rng = np.random.default_rng(seed)

    def shuffle(row: dict[str, Any]) -> dict[str, Any]:
        order, texts = rng.permutation(len(row["responses"])), row["responses"]
        drawn = [[int(order[chosen]), int(order[rejected])] for chosen, rejected in row["pairs"]]
        # Four samples repeat themselves, so a drawn pair may hold one text twice: there is nothing to prefer in it.
        pairs = [pair for pair in drawn if texts[pair[0]].strip() != texts[pair[1]].strip()]
        return {"pairs": pairs, "pair_weights": [1.0] * len(pairs)}

    return data.map(shuffle, features=data.features, load_from_cache_file=False)


def make_trainer(
    recipe: Recipe, data: Dataset, base_dir: str | Path, directory: Path, seed: int, *, adapter: Path | None = None
) -> SilkieDPOTrainer:
    """A trainer for `recipe`. It starts from the base with a new adapter, or continues `adapter`, which is then also
    the reference."""
    model, processor = load_base(base_dir)
    arguments: dict[str, Any] = {
        "output_dir": str(directory),
        "loss_type": list(recipe.losses),
        "loss_weights": list(recipe.loss_weights) if len(recipe.losses) > 1 else None,
        "beta": 0.1,
        "learning_rate": recipe.learning_rate,
        "num_train_epochs": recipe.epochs,
        "per_device_train_batch_size": 32,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "seed": seed,
        "dataloader_pin_memory": False,
        "dataloader_num_workers": 0,  # the recipes side by side keep every core busy
    }
    args = SilkieDPOConfig(**{**arguments, **recipe.options})
    peft_config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, task_type="CAUSAL_LM") if adapter is None else None
    if adapter is not None:
        refuse_pickled_adapter(adapter)
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    return SilkieDPOTrainer(
        model=model, args=args, train_dataset=data, processing_class=processor, peft_config=peft_config
    )


def evaluate(
    summary: Summary,
    name: str,
    title: str,
    model: Any,
    processor: Any,
    test: list[DemoItem],
    output: Path,
    watch: Callable[[str], Any],
) -> dict[str, list[str]]:
    """Answers to all held-out questions, greedy and at temperature 1; scores go into `summary`."""
    answers: dict[str, list[str]] = {}
    summary.titles[name] = title
    summary.scores[name] = {}
    for mode, temperature in DECODING.items():
        with watch(f"evaluate {title}"):
            texts = answer_items(
                model, processor, test, temperature=temperature, seed=11, title=f"evaluating {title}, {mode}"
            )
            answers[mode] = [own[0] for own in texts]
            summary.scores[name][mode] = score_answers(
                test, answers[mode], output / "eval" / name / mode.replace("=", "")
            )
    return answers


def evaluate_policy(model: Any, processor: Any, test: list[DemoItem], folder: Path) -> Scores:
    """Scores of a policy on held-out items, greedy and at temperature 1; its answers are left in `folder`."""
    scores: Scores = {}
    for mode, temperature in DECODING.items():
        texts = answer_items(
            model, processor, test, temperature=temperature, seed=11, title=f"evaluating {folder.name}, {mode}"
        )
        estimates = score_answers(test, [own[0] for own in texts], folder / mode.replace("=", ""))
        scores[mode] = {key: list(value) for key, value in estimates.items()}
    return scores
