"""What is saved beside a checkpoint for its reader: the model card (what it was trained from, on what, how, and with
which result), and the same configuration and data summary as JSON for the report page."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from peft import PeftModel

import silkie

if TYPE_CHECKING:
    from silkie.trainer import SilkieDPOTrainer

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
RUN_FILE = "silkie_run.json"
_METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def write_card(directory: str | Path, trainer: SilkieDPOTrainer) -> None:
    """Writes README.md and silkie_run.json into a checkpoint directory."""
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    (path / "README.md").write_text(card_text(trainer))
    (path / RUN_FILE).write_text(json.dumps(run_description(trainer), indent=1) + "\n")


def run_description(trainer: SilkieDPOTrainer) -> dict[str, dict[str, dict[str, Any]]]:
    """Configuration and data of a run by section, as `silkie.report` shows them. Options that were left open (None) are
    left out."""
    options = {name: _plain(value) for name in _OPTIONS if (value := getattr(trainer.args, name, None)) is not None}
    setup = (line.partition(": ") for line in trainer.setup_lines())
    return {
        "configuration": {
            "Training": {"model": _shown(trainer.model.config._name_or_path or "built from config"), **options},
            "Run": {name: text for name, _, text in setup},
        },
        "data": {name: report.numbers() for name, report in trainer.reports.items()},
    }


def card_text(trainer: SilkieDPOTrainer) -> str:
    """The card in Markdown with a YAML header that the hub reads."""
    base = trainer.model.config._name_or_path or "a model built from config"
    adapter = isinstance(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False), PeftModel)
    header: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["silkie", "trl", "dpo"],
    }
    if not Path(base).is_dir() and "/" in base:
        header["base_model"] = base
    load = 'from silkie.inference import load_policy\n\nmodel, processor = load_policy("path/to/this/directory")'
    sections = [
        "---\n" + yaml.safe_dump(header, sort_keys=False) + "---",
        f"# {Path(str(trainer.args.output_dir)).name}",
        (
            f"Preference-trained from `{_shown(base)}` with silkie {silkie.__version__}"
            f" ({'LoRA adapter' if adapter else 'full weights'}, {'+'.join(trainer.args.loss_type)} loss, reference:"
            f" {trainer.reference.kind if trainer.reference else 'none'})."
        ),
        f"```python\n{load}\n```",
        "## Data\n\n"
        + "\n".join(f"- {line}" for name, report in trainer.reports.items() for line in report.lines(name)),
        "## Training metrics\n\n" + _metric_table(trainer.state.log_history),
        "## Options\n\n```json\n"
        + json.dumps({k: _plain(getattr(trainer.args, k, None)) for k in _OPTIONS}, indent=1)
        + "\n```",
        "## Versions\n\n"
        + ", ".join(
            [f"python {platform.python_version()}", *(f"{p} {importlib.metadata.version(p)}" for p in _VERSIONS)]
        ),
    ]
    return "\n\n".join(sections) + "\n"


def _shown(base: str) -> str:
    """A hub name as it is; of a local path only its last part, which says as much and gives no directory away."""
    return Path(base).name if Path(base).is_dir() else base


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, list, type(None))) else str(value)


def _metric_table(history: list[dict[str, Any]]) -> str:
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
