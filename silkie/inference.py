"""Load a trained policy (base model + LoRA adapter, or a full checkpoint) and generate with it.

Weights are read from safetensors only. `silkie convert DIRECTORY` makes them of pickled files."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    ProcessorMixin,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
    set_seed,
)

from silkie.data import open_image
from silkie.io.console import guarded
from silkie.io.options import argument, option, options_parser, parse_options
from silkie.model.adapters import untie_adapted
from silkie.model.families import reads_images
from silkie.model.processor import load_processor, looks_local
from silkie.model.weights import convert, refuse_pickled, refuse_pickled_adapter

__all__ = ["generate", "infer", "load_policy", "load_processor", "merge"]

logger = logging.getLogger(__name__)


def load_policy(
    path: str | Path,
    *,
    base_model: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    merge: bool = False,
    trust_remote_code: bool = False,
    **model_kwargs: Any,
) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin]:
    """Load a policy ready to generate, and its processor.

    Args:
        path: a directory or hub name: a LoRA adapter (has `adapter_config.json`), or a full model.
        base_model: where the adapter's base model is now. Default: the place recorded in the adapter; there, its
            revision holds too.
        dtype: dtype of the weights; "auto" keeps the checkpoint's.
        device: where to put the model. Default: CUDA when there is one, else CPU.
        merge: fold the adapter into the weights (faster generation; the adapter can no longer be switched off).
        trust_remote_code: run model code that ships with the checkpoint. Off by default.
        **model_kwargs: passed to `from_pretrained` (`attn_implementation`, `quantization_config`, `revision`, ...).

    Returns:
        (model in eval mode, processor).

    Raises:
        FileNotFoundError: the adapter's base model is not at its recorded place, and `base_model` is not given.
        ValueError: the adapter names no base model (it was trained on one built in memory), and `base_model` is not
            given; or the model is a language model, which transformers loads by itself; or an adapter is to be folded
            into quantized weights.
        silkie.model.weights.PickledWeights: a directory has pickled weights only.
    """
    path = str(path)
    adapter = _adapter_config(path)
    base = str(base_model or adapter.get("base_model_name_or_path") or "") if adapter else path
    if not base:
        raise ValueError(
            f"The adapter in {path} does not say which model it was trained on. Pass base_model=<directory or hub name"
            " of it>."
        )
    if adapter and base_model is None and looks_local(base) and not Path(base).is_dir():
        raise FileNotFoundError(
            f"The adapter in {path} was trained on {base}, which does not exist. Pass base_model=<directory or hub name"
            " of the base model>."
        )
    refuse_pickled(base)
    if adapter:
        refuse_pickled_adapter(path)
    if adapter and adapter.get("revision") and base == adapter["base_model_name_or_path"]:
        model_kwargs.setdefault("revision", adapter["revision"])
    hub = {name: model_kwargs[name] for name in ("revision", "token", "cache_dir") if name in model_kwargs}
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code, **hub)
    if not reads_images(config) and not trust_remote_code:
        raise ValueError(
            f"{base} is a language model ({config.model_type}), which reads no images: load it, or its adapter, with"
            " transformers.AutoModelForCausalLM.from_pretrained."
        )
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    # safetensors only: a pickle checkpoint can run code when loaded
    placement = {} if "device_map" in model_kwargs else {"device_map": {"": target}}
    model: Any = AutoModelForImageTextToText.from_pretrained(
        base, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, **placement, **model_kwargs
    )
    if adapter and merge and getattr(model, "is_quantized", False):
        raise ValueError(
            f"{base} is loaded in quantized form: an adapter that is folded in would be rounded with its weights, and"
            " the answers would be others. Pass base_model=<its unquantized directory or hub name>, or do not merge."
        )
    if adapter:
        model = PeftModel.from_pretrained(model, path, use_safetensors=True)
        if merge:
            untie_adapted(model)
            model = model.merge_and_unload()
    place, options = (path, {}) if adapter and Path(path, "tokenizer_config.json").exists() else (base, hub)
    processor = load_processor(place, trust_remote_code=trust_remote_code, **options)
    return model.eval(), processor


def _adapter_config(path: str) -> dict[str, Any] | None:
    """The adapter's config, from a directory or the hub; None where `path` is a full model."""
    local = Path(path)
    if local.is_dir():
        file = local / "adapter_config.json"
        return json.loads(file.read_text()) if file.exists() else None
    if looks_local(path):
        raise FileNotFoundError(
            f"{path} is not a directory. Expected a LoRA adapter or a model directory, or a hub name like 'org/name'."
        )
    from transformers.utils import cached_file

    found = cached_file(path, "adapter_config.json", _raise_exceptions_for_missing_entries=False)
    # An unreachable hub is told by nothing but a file that every model has
    if found is None and cached_file(path, "config.json", _raise_exceptions_for_missing_entries=False) is None:
        raise FileNotFoundError(
            f"{path} is no directory here, and the hub gave no model of that name (it has none, or was not reached)."
        )
    return json.loads(Path(found).read_text()) if found else None


@torch.inference_mode()
def generate(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    prompts: Sequence[list[dict[str, Any]]],
    images: Sequence[Sequence[Any]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_return_sequences: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[list[str]]:
    """Answer prompts about images, in batches.

    Args:
        model, processor: from `load_policy`.
        prompts: conversations ending with a user turn; content parts `{"type": "image"}` and `{"type": "text", "text":
            ...}`.
        images: per prompt its PIL images, in the order of the prompt's image parts; empty for a text-only prompt.
        temperature: 0 decodes greedily; above 0 samples, reproducibly for the same seed, order and batch size.
        num_return_sequences: answers per prompt (needs temperature > 0 when above 1).
        progress: called with the number of prompts finished after every batch.

    Returns:
        Per prompt, `num_return_sequences` answers without special tokens.

    Raises:
        TypeError: a prompt is a string and no conversation.
        ValueError: a prompt's image parts and its images differ in number, or several greedy answers are asked for.
    """
    if len(prompts) != len(images):
        raise ValueError(f"{len(prompts)} prompts but {len(images)} lists of images.")
    if num_return_sequences > 1 and temperature <= 0:
        raise ValueError("num_return_sequences > 1 needs temperature > 0: greedy answers are all equal.")
    for i, (prompt, own) in enumerate(zip(prompts, images, strict=True)):
        if isinstance(prompt, str):
            raise TypeError(
                f"prompt {i} is a string; expected a conversation: "
                '[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ...}]}].'
            )
        parts = sum(p["type"] == "image" for m in prompt if not isinstance(m["content"], str) for p in m["content"])
        if parts != len(own):
            raise ValueError(f"prompt {i} has {parts} image parts but {len(own)} images.")
    was_training = model.training
    model.eval()
    answers: list[list[str]] = [[] for _ in prompts]
    # Text-only and image prompts go in separate batches: image processors take no empty lists.
    for chunk_number, chunk in enumerate(_batches([bool(own) for own in images], batch_size)):
        set_seed(seed + chunk_number)
        texts = _generate_batch(
            model,
            processor,
            [prompts[i] for i in chunk],
            [list(images[i]) for i in chunk],
            max_new_tokens,
            temperature,
            top_p,
            num_return_sequences,
        )
        for row, i in enumerate(chunk):
            answers[i] = texts[row * num_return_sequences : (row + 1) * num_return_sequences]
        if progress:
            progress(len(chunk))
    model.train(was_training)
    return answers


def _batches(has_image: list[bool], batch_size: int) -> list[list[int]]:
    order = [i for i, h in enumerate(has_image) if h], [i for i, h in enumerate(has_image) if not h]
    return [ids[i : i + batch_size] for ids in order for i in range(0, len(ids), batch_size)]


def _generate_batch(
    model: Any,
    processor: Any,
    prompts: list[Any],
    images: list[list[Any]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    n: int,
) -> list[str]:
    texts = [processor.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    tokenizer = processor.tokenizer
    processor_args: dict[str, Any] = {"images": images} if images[0] else {}
    batch = processor(
        text=texts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False, **processor_args
    ).to(model.device)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    eos = model.generation_config.eos_token_id
    stop = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)] if temperature != 1 else [])
        warpers += [Nucleus(top_p)] if top_p < 1 else []
        sampling = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "logits_processor": warpers}
    ids = model.generate(
        **batch,
        max_new_tokens=max_new_tokens,
        num_return_sequences=n,
        eos_token_id=sorted(stop),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **sampling,
    )
    return [t.strip() for t in tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)]


class Nucleus(LogitsProcessor):
    """transformers' top-p without sorting the vocabulary, which on a CPU takes a quarter of the sampling: the nucleus
    is nearly always among the likeliest few. A row where it is not is left to `TopPLogitsWarper`, with its batch.

    Args:
        top_p: mass to keep, in (0, 1).
        likeliest: how many tokens are looked at first.
    """

    def __init__(self, top_p: float, likeliest: int = 256) -> None:
        self.top_p, self.likeliest = top_p, likeliest
        self.sorting = TopPLogitsWarper(top_p)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] with -inf outside the nucleus."""
        values, index = scores.topk(min(self.likeliest, scores.shape[-1]), dim=-1)
        probs = (values - scores.logsumexp(-1, keepdim=True)).exp()
        cumulative = probs.cumsum(-1)
        if bool((cumulative[:, -1] < self.top_p).any()):
            return self.sorting(input_ids, scores)
        kept = values.masked_fill(cumulative - probs >= self.top_p, -torch.inf)  # without the mass that is likelier
        return torch.full_like(scores, -torch.inf).scatter(-1, index, kept)


@dataclass(frozen=True, kw_only=True)
class InferOptions:
    """Options of `silkie infer`."""

    policy: str = argument("directory (or hub name) of a LoRA adapter or of a full model", metavar="POLICY")
    image: str = argument("an image file", metavar="IMAGE")
    question: str = argument("the question about it", metavar="QUESTION")
    base_model: str | None = option(None, "where the adapter's base model is, if it has moved", metavar="DIR")
    max_new_tokens: Annotated[int, Ge(1)] = option(256, "longest answer, in tokens", metavar="N")
    temperature: Annotated[float, Ge(0)] = option(0.0, "0 decodes greedily, above 0 samples", metavar="T")
    compare: bool = option(False, "also print the base model's answer: the same weights with the adapter off")


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Options of `silkie merge`."""

    adapter: str = argument("directory (or hub name) of a LoRA adapter", metavar="ADAPTER")
    out: str = argument("directory of the merged model; empty or new", metavar="OUT")
    base_model: str | None = option(None, "where the adapter's base model is, if it has moved", metavar="DIR")


def infer_parser(prog: str) -> argparse.ArgumentParser:
    return options_parser(prog, "Ask a trained policy about an image.", InferOptions)


def merge_parser(prog: str) -> argparse.ArgumentParser:
    about = (
        "Fold a LoRA adapter into its base model: one directory that transformers, vLLM and others serve without peft."
    )
    return options_parser(prog, about, MergeOptions)


def infer(argv: Sequence[str] | None = None, prog: str = "silkie infer") -> int:
    """The command `silkie infer`; the return value is its exit status."""
    options = parse_options(infer_parser(prog), InferOptions, argv)
    return guarded(lambda: _infer(options))


def merge(argv: Sequence[str] | None = None, prog: str = "silkie merge") -> int:
    """The command `silkie merge`; the return value is its exit status."""
    options = parse_options(merge_parser(prog), MergeOptions, argv)
    return guarded(lambda: _merge(options))


def _infer(options: InferOptions) -> int:
    image = open_image(options.image, where=options.image)  # before the model is loaded, which takes longer
    model, processor = load_policy(options.policy, base_model=options.base_model)
    if options.compare and not hasattr(model, "disable_adapter"):
        raise ValueError(f"{options.policy} is a full model: --compare has no adapter to switch off.")
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": options.question}]}]

    def answer() -> str:
        settings: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
        return generate(model, processor, [prompt], [[image]], **settings)[0][0]

    print("answer:", answer())
    if options.compare:
        with model.disable_adapter():  # type: ignore[operator]
            print("base:  ", answer())
    return 0


def _merge(options: MergeOptions) -> int:
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty directory; name another one.")
    if _adapter_config(options.adapter) is None:
        raise ValueError(f"{options.adapter} is a full model: there is no adapter in it to fold in.")
    model, processor = load_policy(options.adapter, base_model=options.base_model, merge=True)
    model.save_pretrained(str(out))
    processor.save_pretrained(str(out))
    print(f"merged model and processor are in {out}")
    return 0


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Options of `silkie convert`."""

    directory: str = argument("model or adapter directory, or a checkpoint, with .bin files that you trust")


def convert_parser(prog: str) -> argparse.ArgumentParser:
    about = (
        "Write safetensors beside the pickled weights of a directory that you trust: tensors are read, no code is run."
    )
    return options_parser(prog, about, ConvertOptions)


def convert_weights(argv: Sequence[str] | None = None, prog: str = "silkie convert") -> int:
    """The command `silkie convert`; the return value is its exit status."""
    options = parse_options(convert_parser(prog), ConvertOptions, argv)

    def run() -> int:
        written = convert(options.directory)
        for file in written:
            print(f"wrote {file}")
        if not written:
            print(f"nothing to do: every pickle in {options.directory} has its safetensors beside it")
        return 0

    return guarded(run)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m silkie.inference infer | merge | convert`, as `silkie infer` and so on."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands = {"infer": infer, "merge": merge, "convert": convert_weights}
    if not words or words[0] not in commands:
        print(f"usage: python -m silkie.inference {{{','.join(commands)}}} ...", file=sys.stderr)
        return 0 if words[:1] in (["-h"], ["--help"]) else 2
    return commands[words[0]](words[1:], f"python -m silkie.inference {words[0]}")


if __name__ == "__main__":
    sys.exit(main())
