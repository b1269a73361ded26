"""MME (arXiv 2306.13394): 14 subtasks of yes/no questions, two questions per image.

Official layout of results: a folder with one `<subtask>.txt` per subtask, a line per question, tab-separated: image,
question, Yes/No, answer; the two questions of an image follow each other. A subtask scores 100 * acc + 100 * acc+ (at
most 200): acc over questions, acc+ over images (both right).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from silkie.evaluation.benchmark import Benchmark
from silkie.evaluation.records import Question, Record, ResultError, answer_of, read_records, read_text
from silkie.evaluation.scoring import Array, Item, Score, build_score, ratio
from silkie.evaluation.yes_no import read_mme

__all__ = ["COGNITION", "PERCEPTION", "export_results", "load_questions", "mme_items", "score_results"]

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = PERCEPTION + COGNITION

PROMPT_SUFFIX = " Please answer yes or no."
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def score_results(results: str | Path, annotations: str | Path | None = None) -> Score:
    """Score a folder of `<subtask>.txt`, one such file, or the JSONL that `run mme` wrote.

    Raises:
        ResultError: a line without four fields, a label that is not Yes/No, an image with one question, a question
            answered twice; with file and line.
    """
    path = Path(results)
    foreign: list[Path] = []
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        # like the official scorer, look at the files of the subtasks alone; a folder with other names is a custom
        # set
        if any(_canonical(file.stem) in SUBTASKS for file in files):
            foreign = [file for file in files if _canonical(file.stem) not in SUBTASKS]
            files = [file for file in files if file not in foreign]
        if not files:
            raise ResultError(
                path,
                None,
                "no .txt files. Expected MME's official layout: one tab-separated file per subtask, such as"
                f" {SUBTASKS[0]}.txt.",
            )
        records = [record for file in files for record in _read_subtask(file)]
    elif path.suffix == ".txt":
        records = _read_subtask(path)
    else:
        records = [_from_json(record) for record in read_records(path)]
    score = score_items(mme_items(records))
    if foreign:
        score.warnings.append(
            f"files that are no subtask of MME were not read: {', '.join(file.name for file in foreign)}."
        )
    return score


def score_items(items: list[Item]) -> Score:
    """The official numbers of MME items (see `mme_items`)."""
    present = {item.stratum for item in items}
    warnings = []
    if missing := [name for name in SUBTASKS if name not in present]:
        warnings.append(
            f"{len(missing)} of the 14 subtasks are missing ({', '.join(missing)}): the totals are sums over the"
            " subtasks that are there."
        )
    if unknown := sorted(present - set(SUBTASKS)):
        warnings.append(f"not MME subtasks, not part of perception and cognition: {', '.join(unknown)}.")
    return build_score("mme", items, mme_rates, totals=mme_totals, category_order=SUBTASKS, warnings=warnings)


def mme_items(records: Sequence[Record]) -> list[Item]:
    """Pair up the records (subtask in `category`, in file order) and read their answers."""
    by_subtask: dict[str, list[Record]] = {}
    for record in records:
        by_subtask.setdefault(record.category, []).append(record)
    return [item for subtask, own in by_subtask.items() for item in _subtask_items(subtask, own)]


def mme_rates(sums: Array) -> dict[str, Array]:
    """Sums (questions, right, images, both right, unreadable) [..., 5] -> score, acc, acc+. Shares are in 0..1, the
    score in 0..200."""
    questions, right, images, both, other = np.moveaxis(np.asarray(sums, dtype=np.float64), -1, 0)
    acc, acc_plus = ratio(right, questions), ratio(both, images)
    return {
        "score": 100 * acc + 100 * acc_plus,
        "acc": acc,
        "acc_plus": acc_plus,
        "unreadable": ratio(other, questions),
    }


def mme_totals(sums: Array, strata: Sequence[str]) -> dict[str, Array]:
    """Sums [..., S, 5] -> perception (at most 2000), cognition (at most 800) and their sum."""
    scores = mme_rates(sums)["score"]
    pooled = mme_rates(sums.sum(-2))
    totals = {}
    # MME adds up subtask scores, it does not pool their questions: a subtask of 40 weighs as much as one of 400
    for name, members in (("perception", PERCEPTION), ("cognition", COGNITION)):
        columns = [i for i, stratum in enumerate(strata) if stratum in members]
        if columns:
            totals[name] = scores[..., columns].sum(-1)
    if len(totals) == 2:
        totals["total"] = totals["perception"] + totals["cognition"]
    if not totals:
        totals["score"] = scores.sum(-1)
    return {**totals, "acc": pooled["acc"], "acc_plus": pooled["acc_plus"], "unreadable": pooled["unreadable"]}


def load_questions(data: str | Path) -> list[Question]:
    """Questions of the benchmark's release: `<subtask>/` folders with an image and a text file of the same name (each
    line: question TAB Yes/No) side by
    side, or in `images/` and `questions_answers_YN/`; or a folder of official results files, whose answers are
    ignored."""
    root = Path(data)
    folders = (
        [folder for folder in sorted(root.iterdir()) if folder.is_dir() and _question_files(folder)]
        if root.is_dir()
        else []
    )
    if not folders:
        raise ResultError(
            root,
            None,
            "no MME subtask folders. Expected <subtask>/<image> beside <subtask>/<image's name>.txt with lines"
            " 'question TAB Yes|No'.",
        )
    order = {name: i for i, name in enumerate(SUBTASKS)}
    folders.sort(key=lambda folder: (order.get(folder.name, len(order)), folder.name))
    return [
        question for folder in folders for file in _question_files(folder) for question in _questions_of(folder, file)
    ]


def export_results(items: Sequence[dict], out: str | Path) -> Path:
    """Write records of `run mme` as official `<subtask>.txt` files. Tabs and line ends inside an answer become spaces,
    one for one."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {}
    for record in items:
        question = record["prompt"].removesuffix(PROMPT_SUFFIX) + PROMPT_SUFFIX
        fields = (Path(record["image"]).name, question, "Yes" if record["label"] == "yes" else "No", record["answer"])
        lines.setdefault(record["category"], []).append("\t".join(re.sub(r"[\t\r\n]", " ", field) for field in fields))
    for subtask, own in lines.items():
        (folder / f"{subtask}.txt").write_text("\n".join(own) + "\n", encoding="utf-8")
    return folder


def _subtask_items(subtask: str, records: Sequence[Record]) -> list[Item]:
    seen: dict[tuple[str, str, str], Record] = {}
    for record in records:
        first = seen.setdefault((record.image, record.prompt, _label(record)), record)
        if first is not record:
            raise record.error(
                f"{record.image}: this question was already answered at {first.path}:{first.line}:"
                f" {record.prompt[:80]!r}. Remove one of them."
            )
    items: list[Item] = []
    number: Counter[str] = Counter()  # of a question among those of its image
    for start in range(0, len(records), 2):
        pair = records[start : start + 2]
        if len(pair) < 2 or pair[0].image != pair[1].image:
            raise pair[0].error(
                f"{subtask}: image {pair[0].image!r} has one question here"
                + (f" (the next line is about {pair[1].image!r})" if len(pair) == 2 else " (the file ends)")
                + ". Expected two lines per image, one after the other: acc+ is over such pairs."
            )
        reads = [read_mme(answer_of(record)) for record in pair]
        labels = [_label(record) for record in pair]
        right = [read == label for read, label in zip(reads, labels, strict=True)]
        for k, record in enumerate(pair):
            # the pair's own counts go with its second question, once
            pair_counts = (1.0, float(all(right))) if k == 1 else (0.0, 0.0)
            items.append(
                Item(
                    id=f"{subtask}/{Path(record.image).name}/{number[record.image]}",
                    answer=answer_of(record).strip(),
                    counts=(1.0, float(right[k]), *pair_counts, float(reads[k] == "other")),
                    value=float(right[k]),
                    correct=right[k],
                    category=subtask,
                    stratum=subtask,
                    # the number of the pair: an image may carry several pairs
                    cluster=f"{record.image}#{start // 2}",
                    image=record.image,
                    prompt=record.prompt,
                    label=labels[k],
                    read=reads[k],
                )
            )
            number[record.image] += 1
    return items


def _label(record: Record) -> str:
    label = record.text(("label",), "label").strip().lower()
    if label not in ("yes", "no"):
        raise record.error(f"the ground truth must be Yes or No, found {record.data['label']!r}.")
    return label


def _read_subtask(file: Path) -> list[Record]:
    records = []
    # split at "\n" alone: str.splitlines would also cut at form feeds and Unicode separators inside an answer
    for number, line in enumerate(read_text(file).split("\n"), 1):
        line = line.rstrip("\r")
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) != 4:
            raise ResultError(
                file,
                number,
                f"{len(fields)} tab-separated field{'s' * (len(fields) != 1)}, expected 4: image, question, Yes/No,"
                f" answer. Found {line[:120]!r}.",
            )
        image, prompt, label, answer = fields
        record = Record(
            file,
            number,
            {"image": image, "prompt": prompt, "label": label, "answer": answer, "category": _canonical(file.stem)},
        )
        _label(record)
        records.append(record)
    if not records:
        raise ResultError(file, 1, "the file has no answers.")
    return records


def _canonical(subtask: str) -> str:
    """MME's own spelling of a subtask ("ocr" -> "OCR"); another name as it is."""
    return next((name for name in SUBTASKS if name.lower() == subtask.lower()), subtask)


def _from_json(record: Record) -> Record:
    if not record.category:
        raise record.error(
            f"no subtask: found {record.fields}, expected `category` (or a folder of official <subtask>.txt files)."
        )
    _label(record)
    return Record(record.path, record.line, {**record.data, "category": _canonical(record.category)})


def _question_files(folder: Path) -> list[Path]:
    separate = folder / "questions_answers_YN"
    return sorted((separate if separate.is_dir() else folder).glob("*.txt"))


def _questions_of(folder: Path, file: Path) -> list[Question]:
    images = folder / "images" if (folder / "images").is_dir() else folder
    image = next(
        (images / (file.stem + suffix) for suffix in IMAGE_SUFFIXES if (images / (file.stem + suffix)).is_file()), None
    )
    if image is None:
        raise ResultError(
            file, None, f"no image {file.stem} with one of the endings {', '.join(IMAGE_SUFFIXES)} in {images}."
        )
    questions: list[Question] = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        prompt, _, label = line.rpartition("\t")
        if label.strip().lower() not in ("yes", "no") or not prompt:
            raise ResultError(file, number, f"expected 'question TAB Yes|No', found {line[:120]!r}.")
        questions.append(
            Question(
                id=f"{folder.name}/{image.name}/{len(questions)}",
                prompt=prompt.strip(),
                images=(str(image),),
                category=folder.name,
                label=label.strip().lower(),
            )
        )
    return questions


BENCHMARK = Benchmark(
    name="mme",
    title="MME",
    load_questions=load_questions,
    score_results=score_results,
    export_results=export_results,
    layout="folder of <subtask>.txt (or one of them): image TAB question TAB Yes|No TAB answer, two lines per image",
    max_new_tokens=16,
    prompt_suffix=PROMPT_SUFFIX,
    results_folder="*.txt",
)
