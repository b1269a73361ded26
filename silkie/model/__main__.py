"""`python -m silkie.model`: can silkie train a model, and how.

check DIR_OR_TYPE   a model directory, or the name of a model type of transformers (a tiny model with random weights)
sweep               every image-text-to-text type of transformers that can be built here, as a Markdown page
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from silkie.model import tiny
from silkie.plan.check import ModelVerdict, check_model

OPTIONAL = ("torchvision", "timm", "scipy")  # packages that some types of transformers need


def main(arguments: Sequence[str] | None = None, prog: str = "python -m silkie.model") -> int:
    """0 where every model named can be trained exactly, else 1."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="one model: both layouts, LoRA coverage, one step")
    check.add_argument("model", help="model directory, or a model type of transformers")
    sweep = commands.add_parser("sweep", help="every type that can be built offline")
    sweep.add_argument("types", nargs="*", help="model types; none: all")
    sweep.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("silkie").setLevel(logging.ERROR)
    if options.command == "check":
        verdict = check_named(options.model)
        print("\n".join(lines(verdict)))
        return 0 if verdict.exact else 1
    verdicts = []
    for name in options.types or tiny.types():
        verdicts.append(check_named(name))
        print(f"{name}: {verdicts[-1].layout or 'refused'} {verdicts[-1].why}", file=sys.stderr, flush=True)
    text = models_page(verdicts)
    if options.out:
        options.out.write_text(text)
    else:
        print(text)
    return 0


def check_named(name: str) -> ModelVerdict:
    """The verdict on a model directory or a model type."""
    try:
        model, processor = _loaded(name) if Path(name).is_dir() else tiny.tiny(name)
    except Exception as error:  # a type may lack a package, or be no model that continues text
        return ModelVerdict(name=name, why=_not_built(error))
    return check_model(name, model, processor, tiny.tiny_groups(_pictures()))


def _not_built(error: Exception) -> str:
    """Why a tiny model could not be made: it says nothing about the model."""
    text = next(iter(str(error).strip().splitlines()), "")
    told = f"{type(error).__name__}: {text}"
    if isinstance(error, ImportError):
        known = [package for package in OPTIONAL if package in str(error)]
        told = f"needs {known[0]}" if known else told
    return f"could not be built here: {told}"[:240]


def _loaded(directory: str) -> tuple[object, object]:
    from transformers import AutoModelForImageTextToText

    from silkie.model.processor import load_processor

    return AutoModelForImageTextToText.from_pretrained(directory, use_safetensors=True), load_processor(directory)


def _pictures() -> list[Image.Image]:
    """Four pictures of different sizes and contents."""
    sizes = [(56, 56), (84, 56), (56, 56), (56, 56)]
    return [Image.effect_noise(size, 40 + 20 * i).convert("RGB") for i, size in enumerate(sizes)]


def lines(verdict: ModelVerdict) -> list[str]:
    """Human-readable summary lines."""
    shown = [
        f"{verdict.name}: {'exact' if verdict.exact else 'refused'}",
        f"  layout: {verdict.layout} ({verdict.why})",
    ]
    for name, layout in (("packed", verdict.packed), ("rows", verdict.rows)):
        figures = f"log-probs within {layout.difference:.1e}, gradients within {layout.gradient:.1e}"
        shown.append(f"  {name} against the plain forward: {layout.error or figures}")
    if verdict.coverage:
        shown.append(f"  default LoRA: on {verdict.coverage}")
    return [
        *shown,
        f"  vision: {verdict.vision}",
        f"  one training step: {'ran' if verdict.stepped else 'did not run'}",
    ]


def models_page(verdicts: Sequence[ModelVerdict]) -> str:
    """examples/models.md."""
    exact = [v for v in verdicts if v.exact]
    table = [
        "| type | layout | log-probs | gradients | LoRA covers | why | needs |",
        "|---|---|---|---|---|---|---|",
    ]
    for v in sorted(exact, key=lambda v: v.name):
        run = v.packed if v.layout == "packed" else v.rows
        share = f"{100 * v.coverage.share:.0f} %" if v.coverage else ""
        figures = f"{run.difference:.0e} | {run.gradient:.0e} | {share}"
        table.append(f"| {v.name} | {v.layout} | {figures} | {v.why} | {', '.join(tiny.needed_packages(v.name))} |")
    others = [v for v in sorted(verdicts, key=lambda v: v.name) if not v.exact]
    unbuilt = [f"- `{v.name}`: {v.why}" for v in others if v.why.startswith("could not be built here")]
    refused = [f"- `{v.name}`: {v.why}" for v in others if not v.why.startswith("could not be built here")]
    return (
        "# Which models\n\n"
        "Made by `python -m silkie.model sweep --out examples/models.md`: every image-text-to-text type of the"
        " installed transformers, as a tiny model with random weights in float64 with the default LoRA adapter, on four"
        " groups with one image, two, none and one. Log-probs: largest difference of a token from the model's plain"
        " forward, in nats; gradients: largest relative difference of an adapter weight's gradient (torch's CPU"
        " attention keeps its softmax normaliser in float32: 1e-7)."
        f' {len(exact)} of {len(verdicts)} types are exact in the layout that `layout="auto"` takes.'
        f" Made with {_versions()}; packages that a type does not work without are in the last column."
        " A type that is not in the table may still train: the same test runs at the start of every run and stops what"
        " is not exact. `silkie check DIR` runs it on a model of yours.\n\n"
        + "\n".join(table)
        + "\n\nRefused before any compute, or stopped by the self-test:\n\n"
        + "\n".join(refused)
        + "\n\nNot known: a tiny model and processor of these types could not be built here (a missing package, or"
        " numbers that do not fit together), which says nothing about the types. `check` runs on a real model of"
        " them.\n\n" + "\n".join(unbuilt) + "\n"
    )


def _versions() -> str:
    """transformers, and the packages that some types need, where they are installed."""
    found = []
    for package in ("transformers", *OPTIONAL):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package).partition('+')[0]}")
    return ", ".join(found)


if __name__ == "__main__":
    sys.exit(main())
