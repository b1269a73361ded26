"""Sample, rate, build, train, evaluate: silkie's public commands on boards of photographs.

Every step is kept on disk and done once; a stopped run is continued by the same command."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel

from photographs.boards import (
    CELLS,
    DESCRIBE,
    FORMS,
    GROUPS,
    SPLITS,
    Board,
    boards,
    check,
    existence,
    judge,
    mentions,
    position,
    preference_prompts,
    render,
)
from photographs.settings import Arm, Sampling, Sizes
from photographs.sources import Sources, photographs
from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.data import PairOptions, load_preferences
from silkie.evaluation import Score, score
from silkie.evaluation.__main__ import main as evaluation_command
from silkie.feedback import OracleJudge, RateOptions, SampleOptions, build_dataset, load_pool, rate_file, sample_file
from silkie.inference import load_policy, merge

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 32
BATCH = 64
# Held-out boards that were answered before: seed of `boards` -> how many. 12 by a test of run.py, 200 by the first run.
# The second run has answered those of HELD_OUT_SEED: settings chosen after it want them here, and another seed.
OPENED = {2024: 12, 2025: 200}
HELD_OUT_SEED = 2026
EVALUATIONS = ("chair", "chair_sampled", "pope", "mme")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run keeps things, what it knows of the base, and its sizes."""

    root: Path
    sources: Sources
    sizes: Sizes
    sampling: Sampling
    confusable: Sequence[int]

    @property
    def base(self) -> Path:
        return self.root / "base"


def write_lines(rows: Iterable[Mapping[str, Any]], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def draw_boards(place: Place, split: str, count: int, seed: int, folder: Path) -> list[Board]:
    """Boards of a split, with their images in `folder`."""
    pictures, labels = photographs(place.sources, SPLITS[split][0])
    own = boards(labels, split, count, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for board in own:
        if not (folder / board.file).exists():
            render(board, pictures).save(folder / board.file)
    return own


# --- preferences -----------------------------------------------------------------------------------------------------


def preferences(
    place: Place, folder: Path, own: Sequence[Board], images: Path, seed: int, arm: Arm, policy: Path
) -> Path:
    """Responses of `policy` to prompts about boards, rated and built: a directory in VLFeedback's schema. Arms with
    other ratings share the responses."""
    rated_in = folder / f"group{arm.group:g}"
    rated_in.mkdir(parents=True, exist_ok=True)
    dataset = rated_in / "dataset"
    if (dataset / "pairs.csv").exists():
        return dataset
    shutil.rmtree(dataset, ignore_errors=True)
    prompts = write_lines(
        preference_prompts(own, seed, place.sizes.questions, place.confusable), folder / "prompts.jsonl"
    )
    member = {
        "name": "policy",
        "local": str(policy),
        "temperatures": [arm.temperature or place.sampling.temperature],
        "top_p": arm.top_p or place.sampling.top_p,
        "max_tokens": MAX_NEW_TOKENS,
        "batch_size": BATCH,
    }
    (folder / "pool.yaml").write_text(json.dumps({"members": [member]}), encoding="utf-8")
    options = SampleOptions(
        k=arm.responses or place.sizes.responses, minimum=2, redraws=1, seed=seed, image_root=str(images)
    )
    sampled = sample_file(prompts, load_pool(folder / "pool.yaml"), folder / "responses.jsonl", options)
    logger.info("%s", sampled.text())
    if sampled.stopped:  # half of the prompts are not the study
        raise SystemExit(f"sampling was stopped ({sampled.stopped}); run the same command again to resume")
    rated = rate_file(
        folder / "responses.jsonl",
        OracleJudge(partial(judge, group=arm.group)),
        rated_in / "journal.jsonl",
        RateOptions(image_root=str(images)),
    )
    logger.info("%s", rated.text())
    built = build_dataset(folder / "responses.jsonl", rated_in / "journal.jsonl", dataset, image_root=str(images))
    logger.info("%s", built.text())
    return dataset


def load_groups(dataset: Path, arm: Arm, seed: int) -> Dataset:
    """The preference groups of an arm."""
    pairs: Any = arm.pairs
    if arm.aspects or arm.min_margin:
        pairs = PairOptions(strategy=arm.pairs, aspects=arm.aspects or None, min_margin=arm.min_margin)  # type: ignore[arg-type]
    data = load_preferences(str(dataset), pairs=pairs, on_error="skip")
    return shuffled(data, seed) if arm.shuffled else data


def shuffled(data: Dataset, seed: int) -> Dataset:
    """The same groups with as many pairs whose sides are drawn at random, group by group."""
    rng = np.random.default_rng([seed, 9])

    def draw(row: dict[str, Any]) -> dict[str, Any]:
        order = rng.permutation(len(row["responses"]))
        return {"pairs": [[int(order[chosen]), int(order[rejected])] for chosen, rejected in row["pairs"]]}

    return data.map(draw, features=data.features, load_from_cache_file=False)


# --- training --------------------------------------------------------------------------------------------------------


def train(
    place: Place,
    arm: Arm,
    data: Dataset,
    directory: Path,
    seed: int,
    references: Path,
    adapter: Path | None = None,
) -> dict[str, Any]:
    """Train an adapter (or go on with `adapter`, which is then also the reference) and save it. `references`: folder of
    the reference log-probs. Returns what the page and the table say about the run."""
    done = directory / "training.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    model, processor = load_policy(place.base)
    peft_config: LoraConfig | None = LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM")
    if adapter is not None:
        model, peft_config = PeftModel.from_pretrained(model, str(adapter), is_trainable=True), None
    arguments: dict[str, Any] = {
        "output_dir": str(directory),
        "loss_type": list(arm.losses),
        "loss_weights": list(arm.loss_weights) if len(arm.losses) > 1 else None,
        "beta": arm.beta,
        "learning_rate": arm.learning_rate,
        "num_train_epochs": arm.epochs,
        "per_device_train_batch_size": arm.batch,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "gradient_checkpointing": False,
        "bf16": model.dtype == torch.bfloat16,
        "use_cpu": not torch.cuda.is_available(),
        # arms learn from the same responses: their reference values are computed once
        "precompute_ref_log_probs": set(arm.losses) <= {"sigmoid", "sft"},
        "reference_cache_dir": str(references),
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": [],
        "seed": seed,
        "dataloader_pin_memory": False,
    }
    start = time.process_time()
    trainer = SilkieDPOTrainer(
        model=model,
        args=SilkieDPOConfig(**{**arguments, **arm.options}),
        train_dataset=data,
        processing_class=processor,
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model(str(directory))
    result = {
        "groups": len(data),
        "pairs": sum(map(len, data["pairs"])),
        "cpu_seconds": round(time.process_time() - start, 1),
        "plan": trainer.plan_lines(),
        "log": trainer.state.log_history,
    }
    done.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def run_arm(
    place: Place, arm: Arm, seed: int, folder: Path, images: Path, own: Sequence[Board]
) -> tuple[Path, dict[str, Any]]:
    """Every round of an arm. Arms with the base's own sampling share the responses of round 1.

    Returns:
        The adapter's directory, and of the last round what `train` returns.
    """
    adapter: Path | None = None
    result: dict[str, Any] = {}
    own_sampling = (arm.temperature, arm.top_p, arm.responses) != (None, None, None) or arm.rounds > 1
    share = len(own) // arm.rounds
    for number in range(arm.rounds):
        directory = folder / "arms" / arm.name / f"round{number + 1}"
        feedback = directory / "feedback" if own_sampling else folder / "feedback"
        part = own[number * share : (number + 1) * share] if arm.rounds > 1 else own
        feedback.mkdir(parents=True, exist_ok=True)
        policy = merged(adapter) if adapter else place.base
        dataset = preferences(place, feedback, part, images, seed + 1000 * number, arm, policy)
        references = feedback / "references"
        result = train(place, arm, load_groups(dataset, arm, seed), directory, seed, references, adapter)
        adapter = directory
    assert adapter is not None
    return adapter, result


def merged(adapter: Path) -> Path:
    """The adapter folded into the base, as one would serve it: on a CPU it answers twice as fast as base + adapter."""
    directory = adapter / "merged"
    if not (directory / "model.safetensors").exists():
        shutil.rmtree(directory, ignore_errors=True)
        if status := merge([str(adapter), str(directory)]):
            raise RuntimeError(f"`silkie merge {adapter} {directory}` ended with status {status}")
    return directory


# --- evaluation ------------------------------------------------------------------------------------------------------


def opened_before(place: Place) -> set[int]:
    """The photographs of held-out boards that earlier runs have answered: no longer held out."""
    labels = photographs(place.sources, SPLITS["held-out"][0])[1]
    return {
        photograph
        for seed, count in OPENED.items()
        for board in boards(labels, "held-out", count, seed)
        for photograph in board.photographs
    }


def write_benchmarks(place: Place, split: str, seed: int, folder: Path, without: Collection[int] = ()) -> Path:
    """Questions in the layouts of CHAIR, POPE and MME over boards of a split, `without` photographs. Idempotent."""
    if (folder / "done").exists():
        return folder
    pictures, labels = photographs(place.sources, SPLITS[split][0])
    sizes = place.sizes
    own = boards(labels, split, max(sizes.held_out, sizes.sampled, sizes.question_boards), seed, without)
    rng = np.random.default_rng([seed, 31])
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for board in own:
        render(board, pictures).save(images / board.file)
    rows = [{"id": b.id, "image": b.file, "objects": b.things, "prompt": DESCRIBE} for b in own]
    for name, count in (("chair", sizes.held_out), ("chair_sampled", sizes.sampled)):
        write_lines(rows[:count], folder / name / "questions.jsonl")
        (folder / name / "vocabulary.json").write_text(json.dumps(FORMS), encoding="utf-8")
        link = folder / name / "images"
        if not link.exists():
            link.symlink_to(images.resolve(), target_is_directory=True)
    asked = own[: sizes.question_boards]
    _write_pope(asked, rng, place.confusable, folder / "pope", images)
    _write_mme(asked, rng, pictures, folder / "mme")
    (folder / "done").touch()
    return folder


def _write_pope(asked: Sequence[Board], rng: Any, confusable: Sequence[int], folder: Path, images: Path) -> None:
    """Two of POPE's three sets. Its "popular" set has no meaning where all kinds are equally frequent."""
    for name, like in (("random", None), ("adversarial", confusable)):
        rows = []
        for board in asked:
            for label in (True, False):
                ask = existence(board, rng, label, like)
                rows.append(
                    {
                        "question_id": len(rows) + 1,
                        "image": board.file,
                        "text": ask.text,
                        "label": "yes" if label else "no",
                    }
                )
        write_lines(rows, folder / f"boards_pope_{name}.jsonl")
    if not (folder / "images").exists():
        (folder / "images").symlink_to(images.resolve(), target_is_directory=True)


def _write_mme(asked: Sequence[Board], rng: Any, pictures: NDArray[np.uint8], folder: Path) -> None:
    for subtask, make in (("existence", existence), ("position", position)):
        (folder / subtask).mkdir(parents=True, exist_ok=True)
        for board in asked:
            render(board, pictures).save(folder / subtask / board.file)
            lines = [f"{make(board, rng, label).text}\t{'Yes' if label else 'No'}" for label in (True, False)]
            (folder / subtask / f"{board.id}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def evaluate(
    place: Place, benchmarks: Path, out: Path, adapter: Path | None, which: Sequence[str] = EVALUATIONS
) -> dict[str, Score]:
    """Answers of the base (no adapter) or of a trained policy through `python -m silkie.evaluation run`, scored."""
    scores = {}
    for name in which:
        file = out / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        vocabulary = out / "vocabulary.json"
        vocabulary.write_text(json.dumps(FORMS), encoding="utf-8")
        kind = name.partition("_")[0]
        if not (out / f"{name}.done").exists():
            policy = merged(adapter) if adapter else place.base
            command = ["run", kind, "--data", str(benchmarks / name), "--model", str(policy), "--out", str(file)]
            command += ["--batch-size", str(BATCH), "--workers", "0"]
            command += ["--max-new-tokens", str(MAX_NEW_TOKENS if kind == "chair" else 5)]
            if name.endswith("_sampled"):
                command += ["--temperature", str(place.sampling.temperature), "--top-p", str(place.sampling.top_p)]
            if status := evaluation_command(command):
                raise RuntimeError(f"`python -m silkie.evaluation {' '.join(command)}` ended with status {status}")
            (out / f"{name}.done").touch()
        scores[name] = score(kind, str(file))
    if adapter:
        shutil.rmtree(adapter / "merged", ignore_errors=True)  # 270 MB an arm
    return scores


def caption_values(found: Score) -> dict[str, NDArray[np.float64]]:
    """Values per board.

    By CHAIR's counts: whether a name is invented (`chair_s`), the share of the things named (`recall`). By the oracle:
    things and groups invented, of these the names (groups apart), the share covered by name or group, whether all is
    named and nothing invented (`exact`), and how many groups are named."""
    counts = np.array([item.counts for item in found.items])
    checks = [check(item.answer, [name.strip() for name in str(item.label).split(",")]) for item in found.items]
    return {
        "chair_s": counts[:, 1],
        "recall": counts[:, 5] / counts[:, 4],
        "invented": np.array([float(len(c.invented)) for c in checks]),
        "wrong_names": np.array([float(sum(x not in GROUPS.values() for x in c.invented)) for c in checks]),
        "covered": np.array([c.hits + c.grouped for c in checks]) / counts[:, 4],
        "exact": np.array([float(c.hits == len(CELLS) and not c.invented and not c.repeated) for c in checks]),
        "groups": np.array([float(sum(m in GROUPS.values() for m in mentions(i.answer))) for i in found.items]),
    }


def as_json(value: Any) -> Any:
    """Dataclasses as plain JSON values."""
    return json.loads(json.dumps(asdict(value), default=str))
