"""Sample answers while training: at every evaluation the policy answers a few held-out prompts, and a table of image,
prompt, base answer and trained answer goes to the trackers that take images."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from silkie.data.images import open_image
from silkie.data.schema import to_messages
from silkie.evaluation.callback import Host, preserved_random_state

__all__ = ["SampleAnswers", "Sampled"]

logger = logging.getLogger(__name__)
NAME = "sample_answers"
COLUMNS = ("image", "prompt", "base", "trained")


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row of the table. `image`: the first of the prompt's, None for a prompt without one."""

    image: Image.Image | None
    prompt: str
    base: str
    trained: str


class Reporting(Host, Protocol):
    """A trainer with the callbacks of its trackers."""

    callback_handler: Any


class SampleAnswers(TrainerCallback):
    """Answers `count` prompts of `dataset` at every evaluation, greedily.

    The base answers are those with the adapter off; in full fine-tuning those of the weights that the run began with,
    which are kept in `answers/base.json` of the output directory for a run that resumes. Each table is also written to
    `answers/step_N.jsonl`, whatever the trackers. Training is not disturbed: the random state is put back.

    Args:
        dataset: prepared groups; their prompts are taken evenly over the whole of it.
        max_new_tokens: length of an answer.

    Raises:
        ValueError: `count` < 1.
    """

    def __init__(
        self, dataset: Dataset, count: int, *, trainer: Reporting, seed: int = 0, max_new_tokens: int = 128
    ) -> None:
        if count < 1:
            raise ValueError(f"log_answers must be at least 1, got {count}.")
        count = min(count, len(dataset))
        rows = [dataset[i * len(dataset) // count] for i in range(count)]
        self.prompts = [to_messages(row["prompt"]) for row in rows]
        self.images = [[open_image(image, where="log_answers") for image in row["images"]] for row in rows]
        self.trainer, self.seed, self.max_new_tokens = trainer, seed, max_new_tokens
        self._base: list[str] | None = None
        self._last_step = -1

    @property
    def folder(self) -> Path:
        return Path(self.trainer.args.output_dir) / "answers"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """In full fine-tuning the base answers must be taken before the first step."""
        if hasattr(self.trainer.model, "disable_adapter"):
            return
        file = self.folder / "base.json"
        if state.global_step == 0:
            self._base = self._answers()
            if self.trainer.accelerator.is_main_process:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(self._base, ensure_ascii=False), encoding="utf-8")
        elif file.exists():
            self._base = json.loads(file.read_text(encoding="utf-8"))
        else:
            logger.warning("%s is missing: the table of answers has no base answers after this resume", file)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self._last_step:  # one call per evaluation set
            return
        self._last_step = state.global_step
        trained = self._answers()
        if self._base is None and hasattr(self.trainer.model, "disable_adapter"):
            self._base = self._answers(base=True)
        if not self.trainer.accelerator.is_main_process:
            return
        base = self._base or [""] * len(trained)
        prompts = [words_of(prompt) for prompt in self.prompts]
        first = [own[0] if own else None for own in self.images]
        table = [Sampled(*row) for row in zip(first, prompts, base, trained, strict=True)]
        self._write(table, state.global_step)
        for log in sinks(self.trainer.callback_handler.callbacks):
            log(table, state.global_step)

    def _answers(self, *, base: bool = False) -> list[str]:
        """Every rank answers all prompts: under ZeRO-3 and FSDP all ranks must generate equally often."""
        from trl.models.utils import unwrap_model_for_generation

        from silkie.inference import generate

        host, training = self.trainer, self.trainer.model.training
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "seed": self.seed}
        with (
            preserved_random_state(),
            unwrap_model_for_generation(host.model_wrapped, host.accelerator) as model,
            model.disable_adapter() if base else nullcontext(),
        ):
            answers = generate(model, host.processing_class, self.prompts, self.images, **options)
        host.model.train(training)
        return [texts[0] for texts in answers]

    def _write(self, table: Sequence[Sampled], step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [{key: value for key, value in asdict(row).items() if key != "image"} for row in table]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (self.folder / f"step_{step}.jsonl").write_text(lines, encoding="utf-8")


def words_of(prompt: Sequence[dict[str, Any]]) -> str:
    """The text of a prompt's turns, as the log shows it."""
    return "\n".join(part["text"] for turn in prompt for part in turn["content"] if part["type"] == "text")


def sinks(callbacks: Sequence[TrainerCallback]) -> list[Callable[[Sequence[Sampled], int], None]]:
    """Where tables go: one function per tracker that the run reports to and that takes images."""
    found: list[Callable[[Sequence[Sampled], int], None]] = []
    for callback in callbacks:
        name = type(callback).__name__
        if name == "TensorBoardCallback" and (writer := getattr(callback, "tb_writer", None)) is not None:
            found.append(partial(to_tensorboard, writer))
        elif name in _MODULES:
            found.append(_MODULES[name])
    return found


def to_tensorboard(writer: Any, table: Sequence[Sampled], step: int) -> None:
    """TensorBoard has no tables: a text page, and the images by the number of their row."""
    import numpy as np

    lines = ["| | prompt | base | trained |", "|---|---|---|---|"]
    for number, row in enumerate(table):
        cells = (text.replace("|", "\\|").replace("\n", " ") for text in (row.prompt, row.base, row.trained))
        lines.append(f"| {number} | {' | '.join(cells)} |")
        if row.image is not None:
            writer.add_image(f"{NAME}/{number}", np.asarray(row.image.convert("RGB")), step, dataformats="HWC")
    writer.add_text(NAME, "\n".join(lines), step)


def to_wandb(table: Sequence[Sampled], step: int) -> None:
    import wandb

    rows = [[wandb.Image(r.image) if r.image is not None else None, r.prompt, r.base, r.trained] for r in table]
    # W&B's own step only counts calls; transformers puts the optimizer step under this name
    wandb.log({NAME: wandb.Table(columns=list(COLUMNS), data=rows), "train/global_step": step})


def to_trackio(table: Sequence[Sampled], step: int) -> None:
    import trackio

    rows = [[trackio.Image(r.image) if r.image is not None else None, r.prompt, r.base, r.trained] for r in table]
    trackio.log({NAME: trackio.Table(columns=list(COLUMNS), data=rows)}, step=step)


_MODULES = {"WandbCallback": to_wandb, "TrackioCallback": to_trackio}
