"""Benchmarks while training: every N steps the policy answers chosen question sets, and their scores are logged with
the other metrics."""

from __future__ import annotations

import json
import logging
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from silkie.evaluation.answerers import LocalAnswerer
from silkie.evaluation.benchmark import Benchmark
from silkie.evaluation.benchmarks import get_benchmark
from silkie.evaluation.run import Task, question_tasks

__all__ = ["BenchmarkCallback", "parse_benchmarks"]

logger = logging.getLogger(__name__)


def parse_benchmarks(entries: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """Benchmark -> data folder, from a mapping, or from entries "name=folder" (a YAML definition may stand alone).

    Raises:
        ValueError: an entry of another form.
    """
    if isinstance(entries, Mapping):
        return dict(entries)
    parsed = {}
    for entry in entries:
        name, equals, folder = entry.partition("=")
        if not equals and not name.endswith((".yaml", ".yml")):
            raise ValueError(
                f"benchmark {entry!r}: expected 'name=folder of its data', such as 'pope=data/pope', or the path of a"
                " YAML definition."
            )
        parsed[name] = folder or str(Path(name).parent)
    return parsed


class Host(Protocol):
    """What the callback takes from the trainer it is attached to; every `transformers.Trainer` has it. The events of
    transformers bring the model and the arguments, but not the wrapped model, the accelerator and the log."""

    model: Any
    model_wrapped: Any
    processing_class: Any
    accelerator: Any
    args: Any
    control: TrainerControl

    def log(self, logs: dict[str, float]) -> None: ...


class BenchmarkCallback(TrainerCallback):
    """Runs rule-scored benchmarks every N steps and after the last one.

    Scores are logged through `trainer.log` as `eval_<benchmark>_<metric>`. Training is not disturbed: the random state
    is put back afterwards. All ranks answer, each its share.

    Args:
        benchmarks: name -> data folder, or a list of "name=folder" (see `parse_benchmarks`).
        every_n_steps: optimizer steps between two evaluations.
        limit: questions per benchmark, spread evenly over the set (MME: whole image pairs).
        categories: also log each category's first metric.
        at_start: also before the first step (the base policy).
        output_dir: where `answers_<benchmark>_step<N>.jsonl` go. Default: `<trainer's output_dir>/benchmarks`.
        trainer: the trainer (see `Host`): set it here, or as an attribute, before training starts.

    Raises:
        ValueError: a benchmark that needs a judge, an unknown one, or every_n_steps < 1.
    """

    def __init__(
        self,
        benchmarks: Mapping[str, str] | Sequence[str],
        every_n_steps: int,
        *,
        limit: int | None = None,
        batch_size: int = 8,
        seed: int = 0,
        categories: bool = False,
        at_start: bool = False,
        output_dir: str | Path | None = None,
        trainer: Host | None = None,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}.")
        self.trainer = trainer
        self.every_n_steps, self.limit, self.batch_size, self.seed = every_n_steps, limit, batch_size, seed
        self.categories, self.at_start, self.output_dir = categories, at_start, output_dir
        self.sets: list[tuple[Benchmark, str, list[Task]]] = []
        for name, folder in parse_benchmarks(benchmarks).items():
            benchmark = get_benchmark(name)
            if benchmark.judge_prompt is not None:
                raise ValueError(
                    f"{name} needs a judge and cannot run during training. Use `silkie eval run` on the checkpoints."
                )
            tasks = question_tasks(benchmark, benchmark.load_questions(folder), folder)
            self.sets.append((benchmark, folder, _spread(tasks, limit)))
        self._last_step = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer is None:
            raise ValueError("BenchmarkCallback has no trainer: set callback.trainer = trainer before trainer.train().")
        if self.at_start and state.global_step == 0:
            self.evaluate(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every_n_steps == 0:
            self.evaluate(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step != self._last_step:
            self.evaluate(state.global_step)

    def evaluate(self, step: int) -> dict[str, float]:
        """Answer all sets with the policy as it is now, and log the scores. Every rank must call it."""
        host = self.trainer
        assert host is not None
        self._last_step = step
        logs: dict[str, float] = {}
        training = host.model.training
        with preserved_random_state():
            for benchmark, folder, tasks in self.sets:
                logs |= self._scores(host, benchmark, folder, self._answers(host, benchmark, tasks), step)
            # in evaluation mode, TRL's trainers do not flush the running means of the training metrics into this entry
            host.model.eval()
            due = host.control.should_log
            host.log(logs)
            host.control.should_log = due  # logging clears it, and the step's own entry would be missing
        host.model.train(training)
        return logs

    def _answers(self, host: Host, benchmark: Benchmark, tasks: list[Task]) -> list[dict[str, Any]]:
        """Every rank answers its share (padded: under ZeRO-3 and FSDP all ranks must generate equally often); all get
        all records."""
        from trl.models.utils import unwrap_model_for_generation

        from silkie.data.images import open_image

        rank, ranks = host.accelerator.process_index, host.accelerator.num_processes
        share = -(-len(tasks) // ranks)
        # beyond the end a rank repeats the last task; the dict below keeps one record per question
        own = [tasks[min(i, len(tasks) - 1)] for i in range(rank * share, (rank + 1) * share)]
        records: list[dict[str, Any]] = []
        with unwrap_model_for_generation(host.model_wrapped, host.accelerator) as model:
            answerer = LocalAnswerer(model, host.processing_class, max_new_tokens=benchmark.max_new_tokens)
            for start in range(0, len(own), self.batch_size):
                batch = own[start : start + self.batch_size]
                images = [
                    [open_image(path, where=f"question {task.record['id']}") for path in task.images] for task in batch
                ]
                texts = answerer.answer([task.prompt for task in batch], images, seed=self.seed)
                records += [{**task.record, "answer": text} for task, text in zip(batch, texts, strict=True)]
        every = gather_object(records) if ranks > 1 else records
        return list({record["id"]: record for record in every}.values())

    def _scores(
        self, host: Host, benchmark: Benchmark, folder: str, records: list[dict[str, Any]], step: int
    ) -> dict[str, float]:
        """The main process writes the answers and scores them; the scores are broadcast to the other ranks."""
        scores: list[dict[str, float]] = [{}]
        if host.accelerator.is_main_process:
            out = Path(self.output_dir or Path(host.args.output_dir or tempfile.gettempdir()) / "benchmarks")
            scores = [self._score(out, benchmark, folder, records, step)]
        if host.accelerator.num_processes > 1:
            broadcast_object_list(scores)
        return scores[0]

    def _score(
        self, out: Path, benchmark: Benchmark, folder: str, records: list[dict[str, Any]], step: int
    ) -> dict[str, float]:
        out.mkdir(parents=True, exist_ok=True)
        file = out / f"answers_{benchmark.name}_step{step}.jsonl"
        file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
        score = benchmark.score_results(file, benchmark.annotations(folder))
        logs = {f"eval_{benchmark.name}_{name}": value for name, value in score.metrics.items() if value is not None}
        if self.categories:
            for name, row in score.categories.items():
                metric = next((m for m, value in row.items() if m != "questions" and value is not None), None)
                if metric is not None:
                    logs[f"eval_{benchmark.name}_{name}_{metric}"] = float(row[metric] or 0.0)
        return logs


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Generation seeds all generators; a training run must not depend on whether it was evaluated."""
    python = random.getstate()
    numpy = np.random.get_state()  # noqa: NPY002 (the global generator is what other libraries draw from)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _spread(tasks: list[Task], limit: int | None) -> list[Task]:
    """`limit` tasks spread evenly, neighbours about one image kept together in twos (MME's pairs)."""
    if limit is None or limit >= len(tasks):
        return tasks
    pairs = [tasks[i : i + 2] for i in range(0, len(tasks), 2)]
    wanted = max(1, limit // 2)
    chosen = [pairs[i * len(pairs) // wanted] for i in range(min(wanted, len(pairs)))]
    return [task for pair in chosen for task in pair]
