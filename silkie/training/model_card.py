"""Model card and run summary written with each checkpoint."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import silkie
from silkie.batch.preparation_report import PreparationReport
from silkie.batch.workers import cores, ranks_here
from silkie.config import SilkieDPOConfig
from silkie.model.layout import LayoutChoice
from silkie.training.reference import Reference

# whether the model reads images -> how it is loaded; transformers takes an adapter's directory, too
_LOADING = {
    True: """\
from silkie.inference import load_policy

model, processor = load_policy("path/to/this/directory")""",
    False: """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")""",
}
_VERSIONS = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
_OPTIONS = (
    "loss_type",
    "loss_weights",
    "beta",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_tokens_per_batch",
    "max_length",
    "max_response_length",
    "seed",
    "bf16",
    "layout",
    "use_fused_logprob",
    "precompute_ref_log_probs",
)
_REFERENCES = """\
DPO: Rafailov et al., [Direct Preference Optimization: Your Language Model is Secretly a Reward \
Model](https://huggingface.co/papers/2305.18290), NeurIPS 2023. Trained with \
[TRL](https://github.com/huggingface/trl)'s trainer.

```bibtex
@inproceedings{rafailov2023direct,
    title = {{Direct Preference Optimization: Your Language Model is Secretly a Reward Model}},
    author = {Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Manning, Christopher D. and Ermon, Stefano \
and Finn, Chelsea},
    booktitle = {Advances in Neural Information Processing Systems 36},
    year = 2023,
}
```"""
RUN_FILE = "silkie_run.json"
_METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


@dataclass(slots=True, frozen=True, kw_only=True)
class RunDescription:
    """What the model card and the run summary report about a run.

    Attributes:
        args: options of the run.
        base: hub name or directory of the model that training started from; "" where it was built from config.
        adapter: whether an adapter is trained, not the whole model.
        reference: how the reference is made; None where the losses need none.
        setup: lines of the form "name: what runs".
        reports: dataset name -> what was kept and dropped.
        log_history: transformers' log of the run.
        reads_images: False for a language model.
        model_name, dataset_name, tags: what `create_model_card` was given.
    """

    args: SilkieDPOConfig
    base: str
    adapter: bool
    reference: str | None
    setup: Sequence[str]
    reports: Mapping[str, PreparationReport]
    log_history: Sequence[Mapping[str, Any]]
    reads_images: bool = True
    model_name: str | None = None
    dataset_name: str | Sequence[str] | None = None
    tags: Sequence[str] = ()


def _as_names(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _in_words(given: str | Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in _as_names(given))


def _shown_options(args: SilkieDPOConfig) -> dict[str, Any]:
    """The options that a reader of a card looks for."""
    return {name: _json_ready(getattr(args, name, None)) for name in _OPTIONS}


def setup_lines(choice: LayoutChoice, reference: Reference | None, args: SilkieDPOConfig, vision: str) -> list[str]:
    """What runs and why, as lines of the form "name: what runs".

    Args:
        vision: what is done with the vision tower.
    """
    kernel = f"silkie.logprob ({args.logprob_impl})" if args.use_fused_logprob else "plain logits"
    return [
        *choice.lines(),
        f"log-probs: {kernel}",
        f"reference: {reference.kind if reference else 'none (the losses need none)'}",
        f"vision tower: {vision}",
        f"data workers: {_workers(args.dataloader_num_workers)}",
    ]


def _workers(number: int | None) -> str:
    shared = f"{cores()} cores here for {ranks_here()} rank(s)"
    return f"{number} per rank ({shared})" if number else f"none, the training process itself ({shared})"


def write_card(directory: str | Path, run: RunDescription) -> None:
    """Writes README.md and silkie_run.json into a checkpoint directory."""
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    (path / "README.md").write_text(card_text(run))
    (path / RUN_FILE).write_text(json.dumps(run_summary(run), indent=1) + "\n")


def run_summary(run: RunDescription) -> dict[str, dict[str, dict[str, Any]]]:
    """Configuration and data of a run by section, as `silkie.report` shows them, without options that are None."""
    options = {name: value for name, value in _shown_options(run.args).items() if value is not None}
    setup = (line.partition(": ") for line in run.setup)
    return {
        "configuration": {
            "Training": {"model": _shown(run.base or "built from config"), **options},
            "Run": {name: text for name, _, text in setup},
        },
        "data": {name: report.numbers() for name, report in run.reports.items()},
    }


def card_text(run: RunDescription) -> str:
    """The card in Markdown with a YAML header that the hub reads."""
    base = run.base or "a model built from config"
    header: dict[str, Any] = {
        "library_name": "peft" if run.adapter else "transformers",
        "pipeline_tag": "image-text-to-text" if run.reads_images else "text-generation",
        "tags": list(dict.fromkeys([*run.tags, "silkie", "trl", "dpo"])),
    }
    if run.dataset_name:
        header["datasets"] = _as_names(run.dataset_name)
    if run.model_name:
        header["model_name"] = run.model_name
    if not Path(base).is_dir() and "/" in base:
        header["base_model"] = base
    data = [f"- {line}" for name, report in run.reports.items() for line in report.lines(name)]
    versions = [f"python {platform.python_version()}", *(f"{p} {importlib.metadata.version(p)}" for p in _VERSIONS)]
    sections = [
        "---\n" + yaml.safe_dump(header, sort_keys=False) + "---",
        f"# {run.model_name or Path(str(run.args.output_dir)).name}",
        (
            f"Preference-trained from `{_shown(base)}` with silkie {silkie.__version__}"
            f" ({'LoRA adapter' if run.adapter else 'full weights'}, {'+'.join(run.args.loss_type)} loss, reference:"
            f" {run.reference or 'none'}){f' on {_in_words(run.dataset_name)}' if run.dataset_name else ''}."
        ),
        f"```python\n{_LOADING[run.reads_images]}\n```",
        "## Data\n\n" + "\n".join(data),
        "## Training metrics\n\n" + _metric_table(run.log_history),
        "## Options\n\n```json\n" + json.dumps(_shown_options(run.args), indent=1) + "\n```",
        "## Versions\n\n" + ", ".join(versions),
        "## References\n\n" + _REFERENCES,
    ]
    return "\n\n".join(sections) + "\n"


def _shown(base: str) -> str:
    """A hub name as it is; of a local path only its last part, so that a published card reveals no directory."""
    return Path(base).name if Path(base).is_dir() else base


def _json_ready(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, list, type(None))) else str(value)


def _metric_table(history: Sequence[Mapping[str, Any]]) -> str:
    train = [entry for entry in history if "loss" in entry]
    if not train:
        return "No step has been logged yet."
    rows = [("first", train[0]), ("last", train[-1])]
    lines = ["| | step | " + " | ".join(_METRICS) + " |", "|---|---|" + "---|" * len(_METRICS)]
    lines += [
        f"| {name} | {e['step']} | " + " | ".join(f"{e[m]:.4g}" if m in e else "" for m in _METRICS) + " |"
        for name, e in rows
    ]
    evals = [entry for entry in history if "eval_loss" in entry]
    if evals:
        lines.append(
            f"\nLast evaluation: loss {evals[-1]['eval_loss']:.4g}, accuracy"
            f" {evals[-1].get('eval_rewards/accuracies', float('nan')):.4g}."
        )
    return "\n".join(lines)
