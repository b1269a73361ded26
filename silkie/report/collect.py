"""A run directory -> what its report shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from silkie.evaluation.compare import Comparison
from silkie.io.files import is_below, read_file
from silkie.io.jsonl import json_document
from silkie.report.names import metric_name
from silkie.report.schema import (
    Card,
    Curve,
    Report,
    RunFile,
    read_run_file,
)
from silkie.report.scored import comparison_row, flip_cards, score_evaluation

__all__ = ["collect", "comparison_report", "curves_of", "merged_curves", "pick_cards", "read_run", "short_names"]

MAX_CARDS = 160

RUN_FILE = "silkie_run.json"  # of `silkie.training.model_card`, which is not imported: it loads torch

# Panels of the log: title -> (name of the series, keys in the log history by preference).
PANELS: tuple[tuple[str, str, dict[str, tuple[str, ...]]], ...] = (
    ("Loss", "", {"train": ("loss",), "evaluation": ("eval_loss",)}),
    (
        "Reward margin",
        "chosen minus rejected reward",
        {"train": ("rewards/margins",), "evaluation": ("eval_rewards/margins",)},
    ),
    (
        "Preference accuracy",
        "chosen answer has the higher reward",
        {"train": ("rewards/accuracies",), "evaluation": ("eval_rewards/accuracies",)},
    ),
    ("Rewards", "", {"chosen": ("rewards/chosen",), "rejected": ("rewards/rejected",)}),
    (
        "Log-probability of answers",
        "summed over tokens",
        {"chosen": ("logps/chosen",), "rejected": ("logps/rejected",)},
    ),
    ("Gradient norm", "", {"norm": ("grad_norm",)}),
)


def collect(run_dir: str | Path, *, evaluations: bool = True) -> Report:
    """Read `report.json` (see `silkie.report.schema`) and the trainer's state from a run directory; either may be
    missing, not both.

    Configuration and data that `report.json` does not give are those that the trainer saved (`silkie_run.json`,
    `adapter_config.json`).

    Args:
        evaluations: score and compare the results files that `report.json` names.

    Raises:
        FileNotFoundError: neither is there, or a file that `report.json` names is missing.
        ValueError: `report.json` is not as the schema says.
    """
    root = Path(run_dir)
    file = root / "report.json"
    described = read_run_file(file) if file.is_file() else None
    given = described or RunFile()
    state_file = root / given.trainer_state if given.trainer_state else _trainer_state(root)
    if described is None and state_file is None:
        raise FileNotFoundError(
            f"{root} has neither report.json nor trainer_state.json (in it or in a checkpoint): is it the run's output"
            " directory?"
        )
    history = given.log_history or (_history(state_file) if state_file else [])
    saved = _saved_run(root)
    report = Report(
        title=given.title or root.resolve().name,
        summary=given.summary,
        configuration=_sections(given.configuration) or saved["configuration"],
        data=_sections(given.data) or saved["data"],
        curves=curves_of(history),
        notes=list(given.notes),
    )
    if compared := [evaluation.compared for evaluation in given.evaluations if evaluation.compared]:
        report.names = compared[0]
    for evaluation in given.evaluations if evaluations else ():
        rows, cards, notes = score_evaluation(root, evaluation)
        report.benchmarks += rows
        report.gallery += cards
        report.notes += notes
    report.benchmarks += given.benchmarks
    report.gallery += [
        replace(card, image=_existing(root, card.image)) if isinstance(card.image, str) else card
        for card in given.gallery
    ]
    report.gallery_counts = Counter(card.flip for card in report.gallery)
    report.gallery = pick_cards(report.gallery, MAX_CARDS)
    return report


def read_run(run_dir: str | Path) -> RunFile:
    """A run's `report.json`; an empty one where there is none."""
    file = Path(run_dir) / "report.json"
    return read_run_file(file) if file.is_file() else RunFile()


def comparison_report(comparison: Comparison, image_root: str | Path | None, names: tuple[str, str]) -> Report:
    """The page of `compare --html`: metrics, categories and every flipped question."""
    root, names = Path(image_root or "."), short_names(*map(Path, names))
    pairs = [*comparison.fixed, *comparison.broken]
    cards, notes = flip_cards(pairs, root, comparison.benchmark)
    rows = [
        comparison_row(
            m,
            comparison.benchmark,
            names,
            comparison.questions,
            headline=i == 0,
            said=comparison.warnings if i == 0 else ((), ()),
        )
        for i, m in enumerate(comparison.metrics)
    ]
    rows += [
        replace(
            comparison_row(m, f"{comparison.benchmark}: {name}", names, None),
            group="categories (p-values corrected by Holm)",
        )
        for name, m in comparison.categories.items()
    ]
    flips = f"{len(comparison.fixed)} questions went from wrong to right, {len(comparison.broken)} from right to wrong"
    p = "" if comparison.mcnemar_p is None else f" (McNemar's exact test: p = {comparison.mcnemar_p:.2g})"
    return Report(
        title=f"{comparison.benchmark}: {names[0]} against {names[1]}",
        summary=f"{comparison.questions} questions; {flips}{p}.",
        names=names,
        benchmarks=rows,
        gallery=cards,
        notes=notes,
    )


def short_names(a: Path, b: Path) -> tuple[str, str]:
    """The files' names without endings; with their folders where the names are the same (`base/pope.jsonl`,
    `trained/pope.jsonl`)."""
    if a.stem != b.stem:
        return a.stem, b.stem
    return f"{a.parent.name}/{a.stem}", f"{b.parent.name}/{b.stem}"


def curves_of(history: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """The panels for which the log history has points; benchmark scores of the training callback get their own panels.
    Rounds (`round` in the lines) are series of their own: a line through two of them would show a jump that no training
    made."""
    rounds: dict[str, list[Mapping[str, Any]]] = {}
    for row in history:
        rounds.setdefault(str(row.get("round", "")), []).append(row)
    if len(rounds) > 1:
        return merged_curves({name: _curves(own) for name, own in rounds.items()})
    return _curves(history)


def merged_curves(curves: Mapping[str, list[Curve]]) -> list[Curve]:
    """Panels of the same title as one, each series under the name of its run or round."""
    panels: dict[str, Curve] = {}
    for name, own in curves.items():
        for curve in own:
            panel = panels.setdefault(curve.title, Curve(title=curve.title, note=curve.note, series={}))
            alone = len(curve.series) == 1
            panel.series.update({name if alone else f"{name}: {key}": points for key, points in curve.series.items()})
    return list(panels.values())


def _curves(history: Sequence[Mapping[str, Any]]) -> list[Curve]:
    curves = []
    for title, note, keys in PANELS:
        series = {name: points for name, names in keys.items() if (points := _points(history, names))}
        if series:
            curves.append(Curve(title=title, note=note, series=series))
    plain = {
        "eval_loss",
        "eval_runtime",
        "eval_samples_per_second",
        "eval_steps_per_second",
        "eval_num_tokens",
        "eval_model_preparation_time",
    }
    taken = plain | {key for _, _, keys in PANELS for names in keys.values() for key in names}
    scores = list(
        dict.fromkeys(k for row in history for k in row if k.startswith("eval_") and k not in taken and "/" not in k)
    )
    for key in scores:
        points = _points(history, (key,))
        if key.count("_") >= 2 and not key.endswith(("_unreadable", "_yes_rate")):
            benchmark, _, metric = key.removeprefix("eval_").partition("_")
            curves.append(
                Curve(
                    title=f"{benchmark.upper()}: {metric_name(metric)}",
                    note="during training",
                    series={metric_name(metric): points},
                )
            )
    return curves


def pick_cards(cards: Sequence[Card], limit: int) -> list[Card]:
    """At most `limit` cards: all flips first, then the rest, spread evenly; the order of the input is kept."""
    if len(cards) <= limit:
        return list(cards)
    order = {"fixed": 0, "broken": 0, "unjudged": 1, "wrong": 1, "right": 1}
    flipped = [i for i, card in enumerate(cards) if order[card.flip] == 0]
    others = [i for i, card in enumerate(cards) if order[card.flip] == 1]
    flips_kept = _evenly(flipped, max(limit // 2, limit - len(others)))
    return [cards[i] for i in sorted(flips_kept + _evenly(others, limit - len(flips_kept)))]


def _evenly(values: Sequence[int], count: int) -> list[int]:
    return list(values) if len(values) <= count else [values[i * len(values) // count] for i in range(count)]


def _points(history: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[tuple[float, float]]:
    """(step, value) of the first of the keys that occurs; one point per step."""
    for key in keys:
        found = {
            float(row["step"]): float(row[key])
            for row in history
            if isinstance(row.get(key), int | float) and "step" in row
        }
        if found:
            return sorted(found.items())
    return []


def _trainer_state(root: Path) -> Path | None:
    """The state in the directory itself, else that of the latest checkpoint."""
    return next(
        (folder / "trainer_state.json" for folder in _saved_folders(root) if (folder / "trainer_state.json").is_file()),
        None,
    )


def _saved_folders(root: Path) -> list[Path]:
    """Where a run saves: its directory, then its checkpoints, the latest first."""
    steps = [
        (int(number), folder)
        for folder in root.glob("checkpoint-*")
        if (number := folder.name.partition("-")[2]).isdigit()
    ]
    return [root, *(folder for _, folder in sorted(steps, reverse=True))]


def _saved_run(root: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Configuration and data as the trainer saved them: silkie's own file, and the adapter's configuration."""
    own, adapter = (
        next((_json(file) for folder in _saved_folders(root) if (file := folder / name).is_file()), {})
        for name in (RUN_FILE, "adapter_config.json")
    )
    configuration = dict(own.get("configuration", {}))
    names = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "target modules"}
    if adapter:
        base = {} if configuration else {"base model": adapter.get("base_model_name_or_path")}
        configuration["Adapter"] = base | {title: adapter[name] for name, title in names.items() if name in adapter}
    return {"configuration": configuration, "data": own.get("data", {})}


def _sections(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Flat entries get a section without a name."""
    flat = {k: v for k, v in data.items() if not isinstance(v, dict)}
    return ({"": flat} if flat else {}) | {k: v for k, v in data.items() if isinstance(v, dict)}


def _existing(root: Path, image: str) -> Path:
    path = root / image
    if not is_below(path, root):
        raise ValueError(f"{root / 'report.json'} names the image {image}, which lies outside {root}.")
    if not path.is_file():
        raise FileNotFoundError(f"{root / 'report.json'} names the image {image}, which is not there.")
    return path


def _history(state_file: Path) -> list[dict[str, Any]]:
    history = _json(state_file).get("log_history", [])
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise ValueError(f"{state_file}: `log_history` must be a list of objects.")
    return history


def _json(file: Path) -> dict[str, Any]:
    value = json_document(read_file(file), str(file))
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(value).__name__}.")
    return value
