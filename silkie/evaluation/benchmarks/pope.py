"""POPE (arXiv 2305.10355): is an object in the image? Three question sets: random, popular and adversarial negatives.
"Yes" is the positive class.

Results: JSONL. Either each line carries its `label`, or the answers stand beside the question file, whose lines are
matched by `question_id` where both have one, by the text of the question (and the image) where the answers carry it,
and by position, as the official scorer does, where they carry nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from silkie.evaluation.benchmark import Benchmark
from silkie.evaluation.matching import check_answered_once, match_questions
from silkie.evaluation.records import Question, Record, ResultError, answer_of, check_unique, find_image, read_records
from silkie.evaluation.scoring import Array, Item, Score, build_score, confusion_counts, confusion_rates
from silkie.evaluation.yes_no import read_pope

__all__ = ["SETS", "export_results", "load_questions", "score_results"]

SETS = ("random", "popular", "adversarial")
SUFFIXES = (".jsonl", ".json")
_PLACES = ("", "data", "annotations", "questions")


def score_results(results: str | Path, annotations: str | Path | None = None) -> Score:
    """Score one file, or a folder with a file per set (its name contains random, popular or adversarial).

    Args:
        annotations: the question file (or the folder of question files) where the answers carry no labels. Default:
            searched beside the results.

    Raises:
        ResultError: no answer or label in a record, a label that is not yes/no, question and answer files that do not
            match; with file and line.
    """
    path = Path(results)
    files = (
        [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES and _is_answers(file)]
        if path.is_dir()
        else [path]
    )
    if not files:
        raise ResultError(path, None, "no POPE answer files. Expected JSONL files with an `answer` in every line.")
    items = [item for file in files for item in _file_items(file, annotations)]
    return build_score("pope", items, pope_rates, category_order=SETS, warnings=_warnings(items))


def pope_rates(sums: Array) -> dict[str, Array]:
    """Sums of `confusion_counts` [..., 7] -> rates in 0..1. No share of unreadable answers: POPE reads every one as yes
    or no."""
    return {name: rate for name, rate in confusion_rates(sums).items() if name != "unreadable"}


def load_questions(data: str | Path) -> list[Question]:
    """Questions of a POPE file, or of every `*random*`, `*popular*`, `*adversarial*` JSON file of a folder; images in
    `images/`, `val2014/` or beside."""
    root = Path(data)
    files = (
        [root]
        if root.is_file()
        else [f for name in SETS for f in sorted(root.rglob(f"*{name}*")) if f.suffix in SUFFIXES]
    )
    if not files:
        raise ResultError(
            root,
            None,
            "no POPE question files. Expected names that contain random, popular or adversarial, such as"
            " coco_pope_random.json.",
        )
    folder = root.parent if root.is_file() else root
    questions = []
    for file in files:
        name = _set_of(file)
        for record in read_records(file):
            image = record.text(("image",), "image")
            found = find_image(image, folder, folder / "images", folder / "val2014", file.parent)
            questions.append(
                Question(
                    id=f"{name}/{record.id}",
                    prompt=record.prompt,
                    images=(found,),
                    category=name,
                    label=_label(record),
                )
            )
    return questions


def export_results(items: Sequence[dict], out: str | Path) -> Path:
    """Write records of `run pope` as `<set>.jsonl` with question_id, image, text, label and answer."""
    from json import dumps

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    by_set: dict[str, list[str]] = {}
    for record in items:
        row = {
            "question_id": record["id"].split("/")[-1],
            "image": Path(record["image"]).name,
            "question": record["prompt"],
            "label": record["label"],
            "answer": record["answer"],
        }
        by_set.setdefault(record["category"] or "all", []).append(dumps(row, ensure_ascii=False))
    for name, lines in by_set.items():
        (folder / f"pope_{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _file_items(file: Path, annotations: str | Path | None) -> list[Item]:
    answers = read_records(file)
    labelled = [record.data.get("label") is not None for record in answers]
    questions = answers if all(labelled) and annotations is None else _questions_for(file, answers, annotations)
    if answers and all("id" in r.data or "question_id" in r.data for r in answers):
        for own in _sets(answers):
            check_unique(own)
    if questions is answers:
        for own in _sets(answers):
            check_answered_once(own)
    items = []
    for answer, question in zip(answers, questions, strict=True):
        text, label, name = (
            answer_of(answer),
            _label(question),
            answer.category if answer.category in SETS else _set_of(file),
        )
        read = read_pope(text)
        image, asked = question.image or answer.image, question.prompt or answer.prompt
        items.append(
            Item(
                id=f"{name}/{answer.id.split('/')[-1]}",
                answer=text.strip(),
                counts=confusion_counts(read, label, positive="yes"),
                value=float(read == label),
                correct=read == label,
                category=name,
                # the six questions of an image, in every set, stand or fall together
                cluster=image or f"{name}/{answer.id}",
                image=image,
                prompt=asked if asked != text else "",  # {question_id, text, label}: the text is the answer
                label=label,
                read=read,
            )
        )
    return items


def _sets(answers: Sequence[Record]) -> list[list[Record]]:
    """The answers by their set: every set asks about the same images, under the same ids."""
    by_set: dict[str, list[Record]] = {}
    for record in answers:
        by_set.setdefault(record.category if record.category in SETS else "", []).append(record)
    return list(by_set.values())


def _questions_for(file: Path, answers: list[Record], annotations: str | Path | None) -> list[Record]:
    source = _question_file(file, answers, annotations)
    questions = read_records(source)
    return match_questions(file, answers, questions, source)


def _question_file(file: Path, answers: list[Record], annotations: str | Path | None) -> Path:
    """The labelled questions of an answer file: those of its set (random, popular, adversarial) where names tell, else
    the only ones there."""
    if annotations and not Path(annotations).is_dir():
        return Path(annotations)
    places = (
        [Path(annotations)]
        if annotations
        else [base / sub for base in (file.parent, file.parent.parent) for sub in _PLACES]
    )
    files = dict.fromkeys(
        f for place in places if place.is_dir() for f in sorted(place.iterdir()) if f.suffix in SUFFIXES and f != file
    )
    candidates = [f for f in files if _is_questions(f)]
    name = _set_of(file)
    matching = [f for f in candidates if _set_of(f) == name] or [f for f in candidates if not name or not _set_of(f)]
    if len(matching) == 1:
        return matching[0]
    unlabelled = next((record for record in answers if record.data.get("label") is None), answers[0])
    found = (
        f"several question files fit ({', '.join(f.name for f in matching[:4])})"
        if matching
        else "no question file was found"
    )
    raise unlabelled.error(
        f"no `label`, and {found}. Expected a `label` (yes/no) in every line, or --annotations QUESTION_FILE."
    )


def _is_questions(file: Path) -> bool:
    """Whether a file beside the answers holds labelled questions; files of other kinds are passed over."""
    try:
        first = read_records(file)[0]
    except (ResultError, OSError):
        return False
    return first.data.get("label") is not None and not _is_answers(file)


def _label(record: Record) -> str:
    label = record.text(("label",), "label").strip().lower()
    if label not in ("yes", "no"):
        raise record.error(f"the label must be yes or no, found {record.data['label']!r}.")
    return label


def _set_of(file: Path) -> str:
    return next((name for name in SETS if name in file.name.lower()), "")


def _is_answers(file: Path) -> bool:
    """Question files may lie in the same folder: they have no answer."""
    try:
        answer_of(read_records(file)[0])
    except ResultError as error:
        if "no answer" in str(error):
            return False
        raise
    return True


def _warnings(items: Sequence[Item]) -> list[str]:
    free = sum(item.read == "yes" and not item.answer.lower().startswith("yes") for item in items)
    return [f"{free} answers say neither yes nor no; POPE's rule reads them as yes."] if free else []


BENCHMARK = Benchmark(
    name="pope",
    title="POPE",
    load_questions=load_questions,
    score_results=score_results,
    export_results=export_results,
    layout="""\
JSONL or JSON list with `answer` and `label`; or without labels, beside or with --annotations their file;
or a folder of such files, one each for random, popular, adversarial""",
    max_new_tokens=16,
    prompt_suffix=" Please answer yes or no.",
)
