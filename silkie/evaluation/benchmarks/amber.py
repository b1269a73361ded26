"""AMBER (arXiv 2311.07397): descriptions (CHAIR, Cover, Hal, Cog) and yes/no questions (existence, attribute,
relation).

Official results: a JSON list of {id, response}; `annotations.json` (and, for descriptions, `relation.json` and
`safe_words.txt`) from the release's data folder. In the yes/no part "No" is the positive class: precision and recall
measure how well hallucinated questions are rejected.

All rates are percentages over the whole set, as in the official scorer. That scorer adds 0.001 to every denominator and
rounds to one decimal before it combines precision and recall; `Score.official` holds those printed numbers,
`Score.metrics` the exact ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from silkie.evaluation.benchmark import Benchmark
from silkie.evaluation.benchmarks._amber_words import Lexicon, load_lexicon, match_words
from silkie.evaluation.records import (
    Question,
    Record,
    ResultError,
    answer_of,
    check_unique,
    find_beside,
    find_image,
    read_records,
)
from silkie.evaluation.scoring import Array, Item, Score, build_score, confusion_counts, confusion_rates, ratio
from silkie.evaluation.yes_no import read_exact, read_first_word

__all__ = ["amber_rates", "export_results", "load_questions", "score_results"]

# (descriptions, with a hallucination, mentions, hallucinated, true objects, covered, likely hallucinations, of them
# named)
GENERATIVE, DISCRIMINATIVE = 8, 7
DIMENSIONS = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
}
ORDER = ("generative", "existence", "attribute", "state", "number", "action", "relation")


def score_results(results: str | Path, annotations: str | Path | None = None, *, variant: str | None = None) -> Score:
    """Score an official results file, or the JSONL of `run amber`.

    Args:
        annotations: `annotations.json` or the folder that holds it. Default: searched beside the results.
        variant: "nltk" finds nouns and near-synonyms as the official scorer does, with NLTK and spaCy; without it word
            lists and spelling rules do, which need nothing installed.

    Raises:
        ValueError: variant "nltk" where NLTK, spaCy or their data are not installed.
        ResultError: no annotations, an id that is not in them, a question answered twice, no response; with file and
            line.
    """
    path = Path(results)
    source = _annotation_file(path, annotations)
    truth = {record.id: record for record in _annotations(source)}
    records = read_records(path)
    check_unique(records)
    lexicon = load_lexicon(source.parent, truth.values(), nltk=variant == "nltk")
    items = [_item(record, _annotation(record, truth, source), lexicon) for record in records]
    warnings = []
    if any(item.category == "generative" for item in items):
        warnings += lexicon.warnings
    if unread := [item.answer for item in items if item.read == "other"]:
        led = sum(read_first_word(answer) != "other" for answer in unread)
        warnings.append(
            f"{len(unread)} yes/no responses are not exactly 'Yes' or 'No' and are scored as wrong, as in the official"
            f" scorer ({led} of them start with yes or no)."
        )
    score = build_score(
        "amber",
        items,
        amber_rates,
        category_of=_categories,
        category_order=ORDER,
        lower_is_better=("chair", "hal", "cog", "unreadable"),
        warnings=warnings,
    )
    score.official = _as_printed(score)
    _drop_empty(score)
    return score


def amber_rates(sums: Array) -> dict[str, Array]:
    """Sums [..., 8 + 7] -> percentages. `amber` = (100 - chair + f1) / 2, the paper's overall score."""
    sums = np.asarray(sums, dtype=np.float64)
    total, bad, named, wrong, true, covered, likely, hit = np.moveaxis(sums[..., :GENERATIVE], -1, 0)
    chair = 100 * ratio(wrong, named)
    yes_no = {name: 100 * value for name, value in confusion_rates(sums[..., GENERATIVE:]).items()}
    return {
        "amber": (100 - chair + yes_no["f1"]) / 2,
        "chair": chair,
        "cover": 100 * ratio(covered, true),
        "hal": 100 * ratio(bad, total),
        "cog": 100 * ratio(hit, likely),
        "accuracy": yes_no["accuracy"],
        "precision": yes_no["precision"],
        "recall": yes_no["recall"],
        "f1": yes_no["f1"],
        "yes_rate": yes_no["yes_rate"],
        "unreadable": yes_no["unreadable"],
    }


def load_questions(data: str | Path) -> list[Question]:
    """Questions of `query_all.json`, or of `query_generative.json` and `query_discriminative.json`, in the folder or
    its `query/`; images in `image/`,
    `images/` or beside."""
    root = Path(data)
    names = ("query_all.json", "query_generative.json", "query_discriminative.json")
    files = (
        [root]
        if root.is_file()
        else [
            p
            for base in (root, root / "query", root / "data" / "query")
            for name in names
            if (p := base / name).is_file()
        ]
    )
    files = files[:1] if files and files[0].name == names[0] else files
    if not files:
        raise ResultError(
            root, None, f"no AMBER queries. Expected one of {', '.join(names)} in the folder or in its query/."
        )
    folder = root.parent if root.is_file() else root
    truth = {record.id: record for record in _annotations(_annotation_file(files[0], None))}
    questions = []
    for file in files:
        for record in read_records(file):
            image = record.text(("image",), "image")
            found = find_image(image, folder / "image", folder / "images", folder)
            kind = truth[record.id].category if record.id in truth else ""
            questions.append(Question(id=record.id, prompt=record.prompt, images=(found,), category=_dimension(kind)))
    return questions


def export_results(items: Sequence[dict], out: str | Path) -> Path:
    """Write records of `run amber` as the official JSON list; a yes/no answer that starts with yes or no is written as
    exactly "Yes" or "No"."""
    path = Path(out)
    rows = [
        {
            "id": int(r["id"]) if str(r["id"]).isdigit() else r["id"],
            "response": official_response(r["answer"], r["category"]),
        }
        for r in items
    ]
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return path


def official_response(answer: str, category: str) -> str:
    """What the official file holds for a free answer: the release asks for "Yes" or "No" alone in the yes/no part."""
    read = read_first_word(answer)
    return answer if category == "generative" or read == "other" else read.capitalize()


def _item(record: Record, annotation: Record, lexicon: Lexicon) -> Item:
    kind, truth = annotation.category, annotation.data.get("truth")
    common: dict[str, Any] = {
        "id": record.id,
        "category": _dimension(kind),
        "image": record.image,
        "prompt": record.prompt,
    }
    # `run` stores free answers and marks them with their benchmark; an official file is read to the letter
    answer = (
        official_response(answer_of(record), common["category"])
        if record.data.get("benchmark") == "amber"
        else answer_of(record)
    )
    if kind == "generative":
        hallu = annotation.data.get("hallu")
        if not isinstance(truth, list) or not isinstance(hallu, list):
            raise annotation.error("a generative annotation needs the lists `truth` and `hallu`.")
        found = match_words(answer, truth, hallu, lexicon)
        clean = not found.wrong
        counts = (
            1.0,
            float(not clean),
            float(len(found.named)),
            float(len(found.wrong)),
            float(len(truth)),
            float(found.covered),
            float(len(hallu)),
            float(found.likely_hit),
        )
        return Item(
            **common,
            answer=answer,
            counts=counts + (0.0,) * DISCRIMINATIVE,
            value=float(clean),
            correct=clean,
            label=", ".join(truth),
            invented=tuple(dict.fromkeys(found.wrong)),
        )
    if truth not in ("yes", "no"):
        raise annotation.error(f"the truth of a yes/no question must be 'yes' or 'no', found {truth!r}.")
    read = read_exact(answer)
    return Item(
        **common,
        answer=answer,
        label=truth,
        read=read,
        counts=(0.0,) * GENERATIVE + confusion_counts(read, truth, positive="no"),
        value=float(read == truth),
        correct=read == truth,
    )


def _annotation(record: Record, truth: dict[str, Record], source: Path) -> Record:
    if record.data.get("id") is None:
        raise record.error(f"no id: found {record.fields}, expected `id` and `response`.")
    if record.id not in truth:
        raise record.error(f"id {record.id} is not in {source}.")
    return truth[record.id]


def _annotations(source: Path) -> list[Record]:
    """The records of annotations.json; excerpts that hold the list under `annotations` are unwrapped."""
    records = read_records(source)
    if len(records) == 1 and isinstance(inner := records[0].data.get("annotations"), list):
        return [Record(source, records[0].line, row) for row in inner]
    return records


def _annotation_file(results: Path, annotations: str | Path | None) -> Path:
    given = Path(annotations) if annotations else None
    if given is not None and given.is_dir():
        given = next(
            (p for p in (given / "annotations.json", given / "data" / "annotations.json") if p.is_file()),
            given / "annotations.json",
        )
    source = given or find_beside(results, ["annotations.json"])
    if source is None:
        raise ResultError(
            results,
            None,
            "AMBER's annotations.json was not found beside the results. Pass --annotations FILE_OR_FOLDER (the"
            " release's data folder).",
        )
    return source


def _dimension(kind: str) -> str:
    return "generative" if kind == "generative" else DIMENSIONS.get(kind, "relation")


def _categories(item: Item) -> list[str]:
    return [item.category, "attribute"] if item.category in ("state", "number", "action") else [item.category]


def _as_printed(score: Score) -> dict[str, float]:
    """The official script's own rounding: 0.001 more in every denominator, one decimal, F1 of the rounded rates with
    its small constant."""
    sums = score.table().totals().sum(0)
    printed: dict[str, float] = {}
    if sums[0]:
        _, bad, named, wrong, true, covered, likely, hit = sums[:GENERATIVE]
        clean = sums[0] - bad
        printed |= {
            "CHAIR": _percent(wrong, named),
            "Cover": _percent(covered, true),
            "Hal": round(100 - clean / (sums[0] + 0.001) * 100, 1),
            "Cog": _percent(hit, likely),
        }
    if sums[GENERATIVE]:
        printed |= _printed_yes_no(score, None, "", 0.0001)
    for name in ORDER[1:]:
        if any(name in _categories(item) for item in score.items):
            # the constants differ in the official script: 0.001 for existence, 0.0001 elsewhere
            printed |= _printed_yes_no(score, name, f" ({name})", 0.001 if name == "existence" else 0.0001)
    return printed


def _printed_yes_no(score: Score, name: str | None, suffix: str, constant: float) -> dict[str, float]:
    rows = [
        item.counts[GENERATIVE:]
        for item in score.items
        if item.category != "generative" and (name is None or name in _categories(item))
    ]
    total, right, true_positive, predicted, labelled, _, _ = np.sum(rows, axis=0)
    # each of the three attribute kinds brings its own 0.001
    kinds = 3 if name == "attribute" else 1
    accuracy, precision, recall = (
        _percent(a, b, kinds) for a, b in ((right, total), (true_positive, predicted), (true_positive, labelled))
    )
    f1 = round(2 * (precision / 100) * (recall / 100) / (precision / 100 + recall / 100 + constant) * 100, 1)
    return {
        f"Accuracy{suffix}": accuracy,
        f"Precision{suffix}": precision,
        f"Recall{suffix}": recall,
        f"F1{suffix}": f1,
    }


def _percent(numerator: float, denominator: float, kinds: int = 1) -> float:
    return round(float(numerator) / (float(denominator) + 0.001 * kinds) * 100, 1)


def _drop_empty(score: Score) -> None:
    """Remove the metrics of the part (descriptions or yes/no) that the file does not hold."""
    score.metrics = {k: v for k, v in score.metrics.items() if v is not None}
    score.categories = {
        name: {k: v for k, v in row.items() if v is not None and k != "amber"} for name, row in score.categories.items()
    }


BENCHMARK = Benchmark(
    name="amber",
    title="AMBER",
    load_questions=load_questions,
    score_results=score_results,
    export_results=export_results,
    layout="""\
JSON list of {id, response}; annotations.json, relation.json and safe_words.txt beside it or with
--annotations FOLDER""",
    prompt_suffix=" Please answer yes or no.",
    no_suffix_for=frozenset({"generative"}),
    annotations_in_data=True,
    variants=("nltk",),
)
