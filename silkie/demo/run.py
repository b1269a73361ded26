"""The demo from beginning to end: feedback, then DPO, base and controls side by side, and the page as they come."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from transformers import logging as transformers_logging

from silkie.batch.workers import cores
from silkie.demo.data import preference_items
from silkie.demo.loop import (
    DECODING,
    answer_items,
    feedback,
    held_out,
    load_base,
    make_trainer,
    preferences,
    sharing_reference,
    shown_options,
)
from silkie.demo.model import BASE_DIR
from silkie.demo.outputs import write_outputs
from silkie.demo.processes import Tell, run_tasks
from silkie.demo.results import CONTROLS, DPO, Recipe, Sizes, Summary, Watch
from silkie.demo.scores import score_answers
from silkie.io.console import say
from silkie.plan.dry_run import dry_run as run_one_step
from silkie.stats import Estimate
from silkie.trainer import SilkieDPOTrainer


def run_demo(
    output_dir: str | Path,
    seed: int = 0,
    controls: bool = True,
    dry_run: bool = False,
    *,
    base_dir: str | Path = BASE_DIR,
    sizes: Sizes | None = None,
    processes: int | None = None,
) -> Summary | str:
    """The demo. Writes to `output_dir`: `data/` (VLFeedback JSONL and images), `adapter/`, `eval/` (answers in the
    benchmarks' layouts), `table.md`, `results.json`, `demo.png`, `demo.html`.

    Args:
        seed: of the prompts, of sampling and of training. The held-out evaluation set is the same for every seed.
        controls: also train SFT on the best response, shuffled preferences and longest-as-best.
        dry_run: a few prompts, one optimizer step, the plan; nothing is evaluated.
        base_dir: the base model's directory.
        processes: policies that are trained and evaluated at once. Default: one on a GPU, else one per core.

    Returns:
        The summary (its text is the table), or for a dry run a line that says what was done.
    """
    began = time.perf_counter()
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    transformers_logging.disable_progress_bar()
    sizes = sizes or (Sizes(images=6, card_images=4) if dry_run else Sizes())
    watch = Watch()
    items = preference_items(1000 + seed, images=sizes.images, card_images=sizes.card_images, questions=sizes.questions)
    records = feedback(items, output / "data", base_dir, seed, watch)
    source = {"source": str(records), "image_root": str(records.parent / "images")}
    if dry_run:
        run_one_step(make_trainer(DPO, preferences(DPO, source, seed), base_dir, output / "adapter", seed))
        return f"Dry run: {len(items)} prompts sampled and rated, one optimizer step; records in {records}."
    data = preferences(DPO, source, seed)
    summary = Summary(str(base_dir), seed, len(data), sum(len(pairs) for pairs in data["pairs"]))
    summary.seconds = watch.seconds
    recipes = (DPO, *(CONTROLS if controls else ()))
    # DPO first: base against DPO is what the page shows while the controls are still to come
    tasks = [RecipeTask(recipe, source, str(base_dir), output, seed, sizes) for recipe in (DPO, None, *recipes[1:])]
    titles = {"base": "Base", **{recipe.name: recipe.title for recipe in recipes}}
    measured: dict[str, Measured] = {}
    processes = processes or (1 if torch.cuda.is_available() else min(cores(), len(recipes)))
    for result in run_tasks(measure, tasks, processes=processes, log=output / "demo.log"):
        measured[result.name] = result
        summary.seconds.update(result.seconds)
        if not {"base", "dpo"} <= measured.keys():
            continue
        summary.seconds["in all"] = round(time.perf_counter() - began, 1)
        show(summary, {name: measured[name] for name in titles if name in measured}, titles, output, sizes)
    (output / "results.json").write_text(json.dumps(summary.to_json(), indent=1) + "\n", encoding="utf-8")
    return summary


def show(summary: Summary, measured: dict[str, Measured], titles: dict[str, str], output: Path, sizes: Sizes) -> None:
    """Write table and page of what is measured so far; say what is new."""
    first = not summary.scores
    summary.titles = {name: titles[name] for name in measured}
    summary.scores = {name: result.scores for name, result in measured.items()}
    waiting = [title for name, title in titles.items() if name not in measured]
    answers = {name: result.answers for name, result in measured.items()}
    dpo = measured["dpo"]
    page = write_outputs(summary, held_out(sizes), answers, output, dpo.history, dpo.options, waiting=waiting)
    if not waiting:
        return
    if first:
        say(f"\n{summary.table}\nBase against DPO, with the answers side by side: {page}")
        say(f"{summary.seconds['in all']:.0f} s so far. The controls follow, and each is added to the page:")
    say(f"still to come: {', '.join(waiting)}")


@dataclass(frozen=True, slots=True)
class RecipeTask:
    """A policy to be trained (None: the base as it is) and evaluated."""

    recipe: Recipe | None
    source: dict[str, str]
    base_dir: str
    output: Path
    seed: int
    sizes: Sizes


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of a task: answers and scores by decoding; of DPO also its log and its options."""

    name: str
    answers: dict[str, list[str]]
    scores: dict[str, dict[str, Estimate]]
    seconds: dict[str, float]
    history: list[dict[str, Any]]
    options: dict[str, dict[str, Any]]


def measure(task: RecipeTask, tell: Tell) -> Measured:
    """Train the policy of a task, save it where it is DPO's, and have it answer all held-out questions."""
    watch, recipe = Watch(), task.recipe
    name, title = (recipe.name, recipe.title) if recipe else ("base", "Base")
    history: list[dict[str, Any]] = []
    options: dict[str, dict[str, Any]] = {}
    if recipe is None:
        model, processor = load_base(task.base_dir)
    else:
        trainer = train_quietly(task, recipe, watch, tell)
        if recipe == DPO:
            history, options = trainer.state.log_history, shown_options(trainer)
        trainer.model.merge_adapter()  # generates a sixth faster, and nothing trains it any more
        model, processor = trainer.model, trainer.processing_class
    test, answers, scores, answered = held_out(task.sizes), {}, {}, 0

    def progress(count: int) -> None:
        nonlocal answered
        answered += count
        tell(f"evaluating {title}", answered, len(DECODING) * len(test))

    for mode, temperature in DECODING.items():
        with watch(f"evaluate {title}"):
            texts = answer_items(model, processor, test, temperature=temperature, seed=11, progress=progress)
            answers[mode] = [own[0] for own in texts]
            folder = task.output / "eval" / name / mode.replace("=", "")
            scores[mode] = score_answers(test, answers[mode], folder)
    return Measured(name, answers, scores, watch.seconds, history, options)


def train_quietly(task: RecipeTask, recipe: Recipe, watch: Watch, tell: Tell) -> SilkieDPOTrainer:
    """The trainer of a recipe after its training, which told its steps and printed nothing."""
    own = task.output / ("adapter" if recipe == DPO else f"controls/{recipe.name}")
    quiet = replace(recipe, options={**recipe.options, "disable_tqdm": True})
    shared = sharing_reference(quiet, task.output)
    trainer = make_trainer(shared, preferences(recipe, task.source, task.seed), task.base_dir, own, task.seed)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Steps(lambda done, total: tell(f"training {recipe.title}", done, total)))
    with watch(f"train {recipe.title}"):
        trainer.train()
    if recipe == DPO:
        trainer.save_model(str(own))
    return trainer


class _Steps(TrainerCallback):
    def __init__(self, tell: Callable[[int, int], None]) -> None:
        self.tell = tell

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tell(state.global_step, state.max_steps)
