"""CHAIR (arXiv 1809.02156): how much of a description is not in the image.

CHAIR_i = hallucinated mentions / all mentions; CHAIR_s = descriptions with a hallucination / descriptions; recall =
true objects named / true objects. Both rates are over the whole set, as published. Results: JSONL with `answer` and
`objects` (what is in the image); objects named are searched in the text with the word list of `vocabulary`, or given as
`mentioned`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from silkie.evaluation.benchmark import Benchmark
from silkie.evaluation.lexicon import mentions
from silkie.evaluation.records import (
    Question,
    Record,
    ResultError,
    answer_of,
    check_unique,
    find_beside,
    find_image,
    read_json,
    read_records,
)
from silkie.evaluation.scoring import Array, Item, Score, build_score, ratio

__all__ = [
    "chair_counts",
    "chair_item",
    "chair_rates",
    "export_results",
    "load_questions",
    "score_items",
    "score_results",
]

LOWER = ("chair_i", "chair_s")


def chair_counts(mentioned: Iterable[str], truth: Iterable[str]) -> tuple[float, ...]:
    """(descriptions, with a hallucination, mentions, hallucinated mentions, true objects, true objects named, exact) of
    one description.

    Args:
        mentioned: canonical names of the objects named, in order; repeats count as further mentions, as in CHAIR's own
            scorer.
        truth: canonical names of the objects in the image.
    """
    every, true = list(mentioned), set(truth)
    named, wrong = set(every), sum(name not in true for name in every)
    return (
        1.0,
        float(wrong > 0),
        float(len(every)),
        float(wrong),
        float(len(true)),
        float(len(named & true)),
        float(named == true),
    )


def chair_rates(sums: Array) -> dict[str, Array]:
    """Sums of `chair_counts` [..., 7] -> rates in 0..1. `exact`: descriptions that name all true objects and nothing
    else."""
    total, bad, named, wrong, true, covered, exact = np.moveaxis(np.asarray(sums, dtype=np.float64), -1, 0)
    return {
        "chair_s": ratio(bad, total),
        "chair_i": ratio(wrong, named),
        "recall": ratio(covered, true),
        "exact": ratio(exact, total),
        "objects_per_answer": ratio(named, total),
    }


def chair_item(
    *,
    id: str,
    answer: str,
    mentioned: Sequence[str],
    truth: Sequence[str],
    image: str = "",
    prompt: str = "",
    category: str = "",
) -> Item:
    """One described image. Its paired value is 1 where nothing was hallucinated."""
    counts = chair_counts(mentioned, truth)
    missed = sorted(set(truth) - set(mentioned))
    return Item(
        id=id,
        answer=answer,
        counts=counts,
        value=1.0 - counts[1],
        correct=counts[1] == 0,
        category=category,
        cluster=image or id,
        image=image,
        prompt=prompt,
        label=", ".join(truth),
        invented=tuple(sorted(set(mentioned) - set(truth))),
        note=f"not named: {', '.join(missed)}" if missed else "",
    )


def score_items(items: list[Item]) -> Score:
    """Score items of `chair_item` (the demo's oracle makes them without a file)."""
    return build_score("chair", items, chair_rates, lower_is_better=LOWER)


def score_results(results: str | Path, annotations: str | Path | None = None) -> Score:
    """Score JSONL records {id, image, answer, objects: [...], vocabulary: {form: name} or mentioned: [...]}.

    Args:
        annotations: a JSON object form -> canonical name (synonyms), where the records carry neither `mentioned` nor
            `vocabulary`. Default: `vocabulary.json` beside the results; without one, the union of all `objects`.

    Raises:
        ResultError: a record without answer or objects; with file and line.
    """
    path = Path(results)
    records = read_records(path)
    check_unique(records)
    truths = [_strings(record, "objects") for record in records]
    shared: Mapping[str, str] = _vocabulary(path, annotations) or {name: name for truth in truths for name in truth}
    items = []
    for record, truth in zip(records, truths, strict=True):
        answer = answer_of(record)
        own = record.data.get("vocabulary", shared)
        named = _strings(record, "mentioned") if "mentioned" in record.data else mentions(answer, own)
        items.append(
            chair_item(
                id=record.id,
                answer=answer,
                mentioned=named,
                truth=truth,
                image=record.image,
                prompt=record.prompt,
                category=record.category,
            )
        )
    return score_items(items)


def load_questions(data: str | Path) -> list[Question]:
    """Questions of a JSONL file (or `questions.jsonl` in a folder): {id, image, objects, prompt?, category?}; images
    beside it or in `images/`."""
    path = Path(data)
    file = path / "questions.jsonl" if path.is_dir() else path
    questions = []
    for record in read_records(file):
        image = record.text(("image",), "image")
        found = find_image(image, file.parent, file.parent / "images")
        extra = {"objects": _strings(record, "objects")} | {
            k: record.data[k] for k in ("vocabulary",) if k in record.data
        }
        questions.append(
            Question(
                id=record.id,
                prompt=record.prompt or "Describe this image.",
                images=(found,),
                category=record.category,
                extra=extra,
            )
        )
    return questions


def export_results(items: Sequence[dict], out: str | Path) -> Path:
    """CHAIR has no official results file; the JSONL of `run` is the format."""
    raise ValueError("chair has no official results layout: the JSONL file that `run` wrote is the results file.")


def _strings(record: Record, field: str) -> list[str]:
    value = record.data.get(field)
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise record.error(f"`{field}` must be a list of object names, found {value!r:.80}.")
    return value


def _vocabulary(results: Path, annotations: str | Path | None) -> dict[str, str] | None:
    file = Path(annotations) if annotations else find_beside(results, ["vocabulary.json"])
    if file is None:
        return None
    table = read_json(file)
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise ResultError(file, None, "expected a JSON object: word form -> object name, both text.")
    return table


BENCHMARK = Benchmark(
    name="chair",
    title="CHAIR",
    load_questions=load_questions,
    score_results=score_results,
    export_results=export_results,
    layout="JSONL with `answer` and `objects`",
)
