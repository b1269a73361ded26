"""`python -m silkie.plan MODEL --gpus N --memory 80GB`: which launch configuration fits a model, and why."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

from silkie.io.console import Parser, complain
from silkie.plan.memory import LEAST, Engine, Workload, choose, load_shape, parse_memory
from silkie.plan.shapes import SHAPES, ModelShape
from silkie.plan.write import machines_of, write_plan


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        description=(
            "Memory by part and FLOPs of a run, and which config fits: estimates. LoRA unless --full or --qlora; bf16."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "model",
        help=f"one of {', '.join(SHAPES)}, a model directory, a hub name, or a model type of transformers",
    )
    parser.add_argument("--gpus", type=int, default=1, help="of all machines together")
    parser.add_argument("--memory", default="80GB", help="of one GPU: 80GB, 24GiB")
    training = parser.add_mutually_exclusive_group()
    training.add_argument("--full", action="store_true", help="full fine-tuning of the language model")
    training.add_argument("--qlora", action="store_true", help="4-bit base weights")
    parser.add_argument("--groups", type=int, default=1, help="groups in a micro-batch of a GPU")
    parser.add_argument("--responses", type=int, default=4, help="in a group")
    parser.add_argument("--image-tokens", type=int, default=1280, help="in a group; 0: text alone")
    parser.add_argument("--response-tokens", type=int, default=120, help="in a response")
    parser.add_argument("--prompt-tokens", type=int, default=60, help="in a prompt, without the image's")
    parser.add_argument("--lora-rank", type=int, default=64, help="r of LoRA and QLoRA")
    parser.add_argument(
        "--no-checkpointing", action="store_true", help="keep all activations: gradient_checkpointing=False"
    )
    parser.add_argument(
        "--reference-cached", action="store_true", help="no reference pass in the step: precompute_ref_log_probs=True"
    )
    parser.add_argument(
        "--optimizer-8bit", action="store_true", help="optimizer states in 8 bits: optim=adamw_bnb_8bit"
    )
    parser.add_argument(
        "--layout",
        choices=("auto", "packed", "rows"),
        default="auto",
        help="one row per group or per response; auto: what the model's config allows",
    )
    parser.add_argument(
        "--write", metavar="DIR", help="write accelerate's config and the training YAML of the recommendation"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "python -m silkie.plan") -> int:
    """The command line; the return value is the exit status."""
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    try:
        memory, shape = parse_memory(args.memory), load_shape(args.model)
        layout, reason = _layout(args.layout, shape)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(_no_such_model(args.model, error))
    for name, least in LEAST.items():
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    workload = Workload(
        layout=layout,
        groups=args.groups,
        responses=args.responses,
        image_tokens=args.image_tokens,
        prompt_tokens=args.prompt_tokens,
        response_tokens=args.response_tokens,
        training="full" if args.full else "qlora" if args.qlora else "lora",
        lora_rank=args.lora_rank,
        checkpointing=not args.no_checkpointing,
        reference_cached=args.reference_cached,
        second_model=args.full,
        optimizer_8bit=args.optimizer_8bit,
    )
    best, plans = choose(shape, workload, gpus=args.gpus, memory=memory)
    if args.json:
        print(
            json.dumps(
                {
                    "config": best and best.engine,
                    "plans": [{**asdict(p), "total": p.total, "fits": p.fits} for p in plans],
                }
            )
        )
        return 0
    print(
        f"{shape.name}: {shape.parameters / 1e9:.2f} B parameters, {workload.training}, {workload.tokens} tokens in a"
        f" micro-batch\nlayout: {layout} ({reason})"
    )
    for plan in plans:
        print("\n".join(plan.lines()))
    name = (
        "none: more GPUs, --qlora, fewer --groups or smaller images"
        if best is None
        else _config(best.engine, args.gpus)
    )
    print(f"use: {name}")
    if not args.write:
        return 0
    if best is None:
        return complain(ValueError(f"nothing fits, so nothing is written to {args.write}"))
    try:
        print(f"written; name your data in the YAML, then: {write_plan(args.write, args.model, best)}")
    except OSError as error:
        return complain(error)
    return 0


def _no_such_model(model: str, error: OSError) -> str:
    from transformers import CONFIG_MAPPING  # imported by whoever looked the model up

    close = difflib.get_close_matches(model.lower(), [*SHAPES, *CONFIG_MAPPING], n=1)
    why = next(iter(str(error).strip().splitlines()), "").rstrip(".")
    return (
        f"no model {model!r}{f' (did you mean {close[0]!r}?)' if close else ''}: it is none of {', '.join(SHAPES)}, no"
        f" model type, no directory with a config.json, and not to be had from the hub or its cache ({why})"
    )


def _layout(asked: str, shape: ModelShape) -> tuple[Literal["packed", "rows"], str]:
    """The layout and its reason."""
    if asked == "rows":
        return "rows", "asked for"
    if shape.unpackable and asked == "auto":
        return "rows", shape.unpackable
    if shape.unpackable:
        raise ValueError(f"--layout packed: {shape.unpackable}")
    if shape.attending < shape.layers:
        return "packed", "if the recurrent layers fork, which the run tries out at its start"
    return "packed", "attention only"


def _config(engine: Engine, gpus: int) -> str:
    """What to give to `accelerate launch --config_file`, machines having 8 GPUs."""
    if engine == "ddp" and gpus == 1:
        return "recipes/accelerate/single.yaml"
    machines = machines_of(gpus)
    name = "multinode_zero3" if engine == "zero3" and machines > 1 else engine
    return (
        f"recipes/accelerate/{name}.yaml --num_processes {gpus}{f' --num_machines {machines}' if machines > 1 else ''}"
    )


if __name__ == "__main__":
    sys.exit(main())
