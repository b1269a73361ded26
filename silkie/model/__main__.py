"""`python -m silkie.model`: can silkie train a model, and how.

check MODEL         a model directory or hub name, or a model type of transformers (a tiny model with random weights)
sweep               every image-text-to-text type of transformers that can be built here, as a Markdown page
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from silkie.io.console import Parser
from silkie.model import tiny
from silkie.model.families import reads_images
from silkie.model.processor import looks_local
from silkie.model.weights import refuse_pickled
from silkie.plan.check import ModelVerdict, check_model

OPTIONAL = ("torchvision", "timm", "scipy")  # packages that some types of transformers need


def main(arguments: Sequence[str] | None = None, prog: str = "python -m silkie.model") -> int:
    """0 where every model named can be trained exactly, else 1."""
    parser = Parser(prog=prog, description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="one model: both layouts, LoRA coverage, one step")
    check.add_argument("model", help="model directory or hub name (in float64: 8 bytes a parameter), or a model type")
    sweep = commands.add_parser("sweep", help="every type that can be built offline")
    sweep.add_argument("types", nargs="*", help="model types; none: all")
    sweep.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("silkie").setLevel(logging.ERROR)
    if options.command == "check":
        try:
            with contextlib.redirect_stdout(sys.stderr):  # transformers' trainer prints its own summary
                verdict = check_named(options.model) if options.model in tiny.types() else check_loaded(options.model)
        except (OSError, ValueError, ImportError) as error:
            check.error(str(error))
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
    """The verdict on a model type."""
    try:
        model, processor = tiny.tiny(name)
    except Exception as error:  # a type may lack a package, or be no model that continues text
        return ModelVerdict(name=name, why=_not_built(error), known=False)
    return check_model(name, model, processor, tiny.tiny_groups(_pictures()))


def check_loaded(path: str) -> ModelVerdict:
    """The verdict on a model directory or hub name.

    Raises:
        OSError, ValueError, ImportError: there is no such model, or its config, weights or processor cannot be loaded;
            the message says which.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    from silkie.model.processor import load_processor

    if not Path(path).is_dir():
        if looks_local(path):
            raise ValueError(f"{path} is not a directory")
        if "/" not in path:
            near = ", ".join(difflib.get_close_matches(path, tiny.types())) or "examples/models.md lists them"
            raise ValueError(f"{path!r} is no directory and no image-text-to-text type of transformers ({near})")
    doing = "config.json of a model"
    try:
        config = AutoConfig.from_pretrained(path)
        if not reads_images(config):
            raise ValueError(f"{config.model_type!r} reads no images, and this is a check for models that do")
        refuse_pickled(path)
        doing = "processor (with its image processor, tokenizer and chat template)"
        processor = load_processor(path)
        doing = "weights"
        model = AutoModelForImageTextToText.from_pretrained(path, use_safetensors=True)
    except (OSError, ValueError, ImportError) as error:
        told = next(iter(str(error).strip().splitlines()), "")
        raise type(error)(f"{path}: no usable {doing}: {told}") from error
    return check_model(path, model, processor, tiny.tiny_groups(_pictures()))


def _not_built(error: Exception) -> str:
    """Why a tiny model could not be made."""
    text = next(iter(str(error).strip().splitlines()), "")
    told = f"{type(error).__name__}: {text}"
    if isinstance(error, ImportError):
        known = [package for package in OPTIONAL if package in str(error)]
        told = f"needs {known[0]}" if known else told
    return f"could not be built here: {told}"[:240]


def _pictures() -> list[Image.Image]:
    """Four pictures of different sizes and contents."""
    sizes = [(56, 56), (84, 56), (56, 56), (56, 56)]
    return [Image.effect_noise(size, 40 + 20 * i).convert("RGB") for i, size in enumerate(sizes)]


def lines(verdict: ModelVerdict) -> list[str]:
    """For people."""
    if not verdict.known:
        return [f"{verdict.name}: not known", f"  why: {verdict.why}"]
    shown = [f"{verdict.name}: {'exact' if verdict.exact else 'refused'}"]
    shown.append(f"  layout: {verdict.layout} ({verdict.why})" if verdict.layout else f"  why: {verdict.why}")
    for name, layout in (("packed", verdict.packed), ("rows", verdict.rows)):
        if layout.ran:
            figures = f"log-probs within {layout.difference:.1e}, gradients within {layout.gradient:.1e}"
            shown.append(f"  {name} against the model's own forward: {layout.error or figures}")
    if verdict.coverage:
        shown.append(f"  default LoRA: on {verdict.coverage}")
    if verdict.vision:
        shown.append(f"  vision: {verdict.vision}")
    if verdict.layout:
        shown.append(f"  one training step: {'ran' if verdict.stepped else 'did not run'}")
    return shown


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
    unknown = [f"- `{v.name}`: {v.why}" for v in others if not v.known]
    refused = [f"- `{v.name}`: {v.why}" for v in others if v.known]
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
        " them.\n\n" + "\n".join(unknown) + "\n"
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
