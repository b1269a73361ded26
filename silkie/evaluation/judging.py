"""Have a judge rate answers that `run` wrote: the judge's reply is stored in the record's `judge` field, and `score`
reads the rating out of it."""

from __future__ import annotations

from pathlib import Path

from silkie.evaluation.benchmark import Benchmark
from silkie.evaluation.records import read_records
from silkie.evaluation.run import Task, read_meta

__all__ = ["judge_tasks"]


def judge_tasks(benchmark: Benchmark, results: str | Path, images: str | Path | None = None) -> list[Task]:
    """A judging task per answer of a results file.

    Args:
        images: folder that the records' image paths are relative to. Default: the data folder that `run` noted beside
            the results.

    Raises:
        ValueError: the benchmark needs no judge.
        ResultError: a record without an answer; with file and line.
    """
    if benchmark.judge_prompt is None:
        raise ValueError(
            f"{benchmark.name} is scored by rule: it needs no judge. Use `score {benchmark.name} {results}`."
        )
    root = Path(images or read_meta(results).get("data") or Path(results).parent)
    tasks = []
    for record in read_records(results):
        if not isinstance(record.data.get("answer"), str):
            raise record.error("no answer to judge. Expected a results file of `run`.")
        names = record.data.get("images") or ([record.data["image"]] if record.data.get("image") else [])
        shown = tuple(str(root / name) for name in names) if benchmark.judge_sees_image else ()
        # results that were judged before may be judged again: the old reply must not reach the new judge
        row = {key: value for key, value in record.data.items() if key != "judge"}
        try:
            prompt = benchmark.judge_prompt({"prompt": record.prompt, **row})
        except KeyError as error:
            raise record.error(f"the judge's prompt wants the field {error}, found {sorted(row)}.") from None
        tasks.append(Task(row, prompt, shown))
    return tasks
