"""Ask a model a benchmark's questions and write its answers: batched, resumable, the same file every time.

The questions are cut into batches once, in their order; a results file grows by whole batches. An interrupted run
resumes after its last whole batch, with the same batches and seeds, so that the finished file equals, byte for
byte, that of a run that was never cut off.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silkie.evaluation.answerers import Answerer
from silkie.evaluation.benchmark import Benchmark
from silkie.evaluation.records import Question, ResultError, read_json
from silkie.io.journal import Appender, scan, truncate

__all__ = ["Task", "answer_tasks", "meta_path", "question_tasks", "read_meta"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked, and the record that the answer completes (its `id` identifies it in the file)."""

    record: dict[str, Any]
    prompt: str
    images: tuple[str, ...] = ()


def question_tasks(benchmark: Benchmark, questions: Sequence[Question], data: str | Path) -> list[Task]:
    """The tasks of a benchmark. Image paths in the records are relative to `data` where they lie below it.

    Raises:
        ResultError: an image that is not there (all are checked before the first answer), or an id that occurs twice.
    """
    root = Path(data)
    tasks: list[Task] = []
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise ResultError(root, None, f"two questions have the id {question.id!r}; expected one each.")
        seen.add(question.id)
        if missing := next((image for image in question.images if not Path(image).is_file()), None):
            raise ResultError(root, None, f"question {question.id}: the image {missing} is not there.")
        suffix = "" if question.category in benchmark.no_suffix_for else benchmark.prompt_suffix
        asks_already = question.prompt.lower().rstrip().endswith(suffix.strip().lower())
        prompt = question.prompt if asks_already else question.prompt.rstrip() + suffix
        record: dict[str, Any] = {"benchmark": benchmark.name, "id": question.id}
        if question.category:
            record["category"] = question.category
        if question.images:
            record["image"] = _relative(question.images[0], root)
        if len(question.images) > 1:
            record["images"] = [_relative(image, root) for image in question.images]
        record["prompt"] = prompt
        if question.label is not None:
            record["label"] = question.label
        tasks.append(Task({**record, **question.extra}, prompt, question.images))
    return tasks


def answer_tasks(
    tasks: Sequence[Task],
    outputs: Mapping[str | Path, Answerer],
    *,
    settings: Mapping[str, Any],
    batch_size: int = 8,
    workers: int = 2,
    seed: int = 0,
    field: str = "answer",
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Answer every task with every answerer and write one results file each.

    Args:
        outputs: results file -> who answers. A batch's images are decoded once for all of them.
        settings: what determined the answers (model, data, generation ...); stored in FILE.meta.json. A run is
            continued only with equal settings.
        workers: processes that decode images ahead; 0 decodes in this one.
        field: the field of the record that receives the answer (`judge` for judges).
        overwrite: start over instead of continuing.

    Raises:
        ResultError: a file that was written with other settings or questions.
    """
    from tqdm import tqdm

    if not tasks:
        raise ValueError("There are no questions to answer.")
    full = {
        **settings,
        "batch_size": batch_size,
        "seed": seed,
        "field": field,
        "questions": len(tasks),
        "fingerprint": _fingerprint(tasks),
    }
    done = {Path(file): _prepare(Path(file), tasks, full, batch_size, overwrite) for file in outputs}
    answerers = {Path(file): answerer for file, answerer in outputs.items()}
    first = min(done.values())
    if first:
        logger.info("continuing after %d of %d questions", first, len(tasks))
    batches = [range(start, min(start + batch_size, len(tasks))) for start in range(first, len(tasks), batch_size)]
    pixels = any(answerer.wants_pixels for answerer in answerers.values())
    with ExitStack() as stack:
        files = {file: stack.enter_context(closing(Appender(file, sync=False))) for file in answerers}
        bar = stack.enter_context(
            tqdm(total=len(tasks), initial=first, unit="question", disable=not progress, smoothing=0.1)
        )
        for rows, decoded in zip(batches, _decoded(tasks, batches, workers if pixels else 0, pixels), strict=True):
            own = [tasks[i] for i in rows]
            for file, answerer in answerers.items():
                if rows.start < done[file]:
                    continue
                images: Sequence[Sequence[Any]] = decoded if answerer.wants_pixels else [task.images for task in own]
                # a text-only and an image half of a batch take two seeds
                answers = answerer.answer(
                    [task.prompt for task in own], images, seed=seed + 2 * (rows.start // batch_size)
                )
                lines = [
                    json.dumps({**task.record, field: text}, ensure_ascii=False) + "\n"
                    for task, text in zip(own, answers, strict=True)
                ]
                files[file].write("".join(lines).encode())
            bar.update(len(rows))


def meta_path(results: str | Path) -> Path:
    """Where the settings of a results file are."""
    return Path(f"{results}.meta.json")


def read_meta(results: str | Path) -> dict[str, Any]:
    """The settings of a results file; empty where it was not written by `run`."""
    file = meta_path(results)
    if not file.exists():
        return {}
    settings = read_json(file)
    if not isinstance(settings, dict):
        raise ResultError(file, None, f"expected a JSON object of settings, found {type(settings).__name__}.")
    return settings


def _prepare(file: Path, tasks: Sequence[Task], settings: dict[str, Any], batch_size: int, overwrite: bool) -> int:
    """Make the file ready to be appended to; the number of questions it already answers (whole batches)."""
    meta = meta_path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and not overwrite:
        if not meta.is_file():
            raise ResultError(
                file,
                None,
                f"exists, but {meta.name} does not: it was not written by `run`. Choose another file, or --overwrite.",
            )
        before = read_meta(file)
        plain = json.loads(json.dumps(settings))
        if different := sorted(key for key in plain.keys() | before.keys() if plain.get(key) != before.get(key)):
            shown = "; ".join(f"{key}: {before.get(key)!r} then, {plain.get(key)!r} now" for key in different[:4])
            raise ResultError(
                file,
                None,
                f"was begun with other settings ({shown}). Choose another file, use the same settings, or --overwrite.",
            )
        return _cut_to_whole_batches(file, tasks, batch_size)
    # settings first, answers last: a run that is killed between these lines starts over, instead of being refused or
    # continued with other settings
    file.unlink(missing_ok=True)
    meta.write_text(json.dumps(settings, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    file.touch()
    return 0


def _cut_to_whole_batches(file: Path, tasks: Sequence[Task], batch_size: int) -> int:
    ends = [0]  # of the answers that are complete; a line without its line break was being written
    for entry in scan(file):
        if not entry.ended:
            break
        if entry.number > len(tasks):
            raise ResultError(file, entry.number, f"more answers than the {len(tasks)} questions.")
        if entry.record is None or "id" not in entry.record:
            raise ResultError(
                file, entry.number, "not an answer that `run` wrote. Repair or remove the file, or --overwrite."
            )
        identity, expected = entry.record["id"], tasks[entry.number - 1].record["id"]
        if identity != expected:
            raise ResultError(file, entry.number, f"answers question {identity!r}, expected {expected!r}.")
        ends.append(entry.end)
    answered = len(ends) - 1
    whole = answered if answered == len(tasks) else answered // batch_size * batch_size
    truncate(file, ends[whole])
    return whole


class _Batches:
    """Decoded images by batch, for a DataLoader (a map-style data set)."""

    def __init__(self, tasks: Sequence[Task], batches: Sequence[range]) -> None:
        self.tasks, self.batches = tasks, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> list[list[Any]] | Exception:
        """An image that cannot be read is handed over, not raised: a DataLoader would bury the message under a worker's
        traceback."""
        from silkie.data.images import ImageError, open_image

        own = [self.tasks[i] for i in self.batches[index]]
        try:
            return [[open_image(image, where=f"question {task.record['id']}") for image in task.images] for task in own]
        except ImageError as error:
            return error


def _decoded(tasks: Sequence[Task], batches: Sequence[range], workers: int, pixels: bool) -> Iterator[list[list[Any]]]:
    """Per batch the images of each question, decoded by worker processes a few batches ahead, in order."""
    if not pixels:
        yield from ([[] for _ in rows] for rows in batches)
        return
    dataset = _Batches(tasks, batches)
    batches_in_order: Iterable[list[list[Any]] | Exception] = (dataset[i] for i in range(len(dataset)))
    if workers > 0 and len(batches) > 1:
        from torch.utils.data import DataLoader

        batches_in_order = DataLoader(
            dataset,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=min(workers, len(batches)),
            shuffle=False,
            worker_init_fn=_end_with_parent,
        )
    for batch in batches_in_order:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _end_with_parent(worker: int) -> None:
    """A worker of a killed run ends too. Torch's own check does not run while decoded images wait in a pipe that nobody
    reads any more."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _fingerprint(tasks: Sequence[Task]) -> str:
    """Changes when a question, its order or its image's name changes."""
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(
            json.dumps([task.record, task.prompt, [Path(image).name for image in task.images]], sort_keys=True).encode()
        )
    return digest.hexdigest()[:16]


def _relative(image: str, root: Path) -> str:
    base = root if root.is_dir() else root.parent
    path = Path(image)
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else image
