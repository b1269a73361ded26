"""The YAML file of a loop.

    model: Qwen/Qwen2.5-VL-3B-Instruct
    prompts: prompts.jsonl             # {"image", "prompt"} a line, as `silkie feedback sample` reads it
    output_dir: outputs/loop
    rounds: 3
    prompts_per_round: 2000            # default: all of them in every round
    sample: {k: 4, temperatures: [1.0], max_answer_tokens: 256}
    rate: {base_url: "http://localhost:9000/v1", model: JUDGE}
    train: {learning_rate: 1.0e-5, dtype: bfloat16, max_tokens_per_batch: 8192}
    evaluate:
      - {benchmark: pope, data: pope/}

The sections take the options of the commands that they are for, by their names on the command line with underscores:
`sample` those of `silkie feedback sample`, `rate` of `silkie feedback rate`, `train` of `silkie train`, launcher
included, and every entry of `evaluate` of `silkie eval run`, with a section `judge` for `silkie eval judge` where the
benchmark needs one. What the loop itself decides (models, files, seeds of sampling) stands in no section.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from annotated_types import Ge
from pydantic import Field, Strict
from pydantic.dataclasses import dataclass

from silkie.io.checked import CHECKED, FieldError, check, parse_yaml
from silkie.io.files import MAX_SETTINGS_BYTES, read_file

__all__ = ["LoopFile", "Serve", "read_loop_file"]

# May differ between two starts of one loop: they change no answer and no weight.
FREE = {"rounds", "base_url", "key_variable", "concurrency", "timeout", "quiet", "workers", "overwrite", "max_cost"}
FREE |= {"max_budget_tokens", "output_dir"}

# Section -> what the loop sets in it.
OWN = {
    "sample": {"prompts", "out", "pool", "local", "base_url", "model", "key_variable", "image_root", "seed"},
    "rate": {"responses", "journal", "image_root"},
    "train": {"model_name_or_path", "adapter_name_or_path", "use_peft", "dataset_name", "output_dir", "image_root"},
    "evaluate": {"out", "model", "adapter", "base_out", "base_url", "key_variable"},
    "judge": {"results", "out"},
}

Count = Annotated[int, Strict(), Ge(1)]


@dataclass(frozen=True, slots=True, kw_only=True, config=CHECKED)
class Serve:
    """A server that answers for the policy and can load an adapter while it runs, instead of this process.

    base_url: of its OpenAI-compatible interface.
    model: the name that it knows the model by; default the loop's `model`.
    output_dir: where the server finds the loop's `output_dir`, if it sees other paths.
    key_variable: environment variable that holds its key.
    """

    base_url: str = Field(description="an address such as http://localhost:8000/v1")
    model: str | None = Field(default=None, description="the name the server knows")
    output_dir: str | None = Field(default=None, description="a directory")
    key_variable: str | None = Field(default=None, description="the name of an environment variable")


@dataclass(frozen=True, slots=True, kw_only=True, config=CHECKED)
class LoopFile:
    """A loop, as its YAML file says it. Paths are taken from the working directory."""

    model: str = Field(description="a model directory or hub name")
    prompts: str = Field(description="a JSONL file of prompts")
    rate: dict[str, Any] = Field(description="options of `silkie feedback rate`")
    image_root: str | None = Field(default=None, description="a directory or zip of images")
    output_dir: str = Field(default="outputs/loop", description="a directory")
    rounds: Count = Field(default=3, description="a whole number of 1 or more")
    prompts_per_round: Count | None = Field(default=None, description="a whole number of 1 or more")
    seed: int = Field(default=0, description="a whole number")
    serve: Serve | None = Field(default=None, description="a mapping with `base_url`")
    sample: dict[str, Any] = Field(default_factory=dict, description="options of `silkie feedback sample`")
    train: dict[str, Any] = Field(default_factory=dict, description="options of `silkie train`")
    evaluate: list[dict[str, Any]] = Field(default_factory=list, description="a list of mappings with `benchmark`")

    def __post_init__(self) -> None:
        sections = {"sample": self.sample, "rate": self.rate, "train": self.train}
        for name, section in sections.items():
            _refuse(section, OWN[name], f"`{name}`")
        for number, entry in enumerate(self.evaluate, 1):
            if not isinstance(entry.get("benchmark"), str):
                raise ValueError(f"`evaluate`, entry {number}: missing `benchmark`, the name or YAML file of one")
            _refuse(entry, OWN["evaluate"], f"`evaluate`, entry {number}")
            judge = entry.get("judge")
            if not isinstance(judge, Mapping | None):
                raise ValueError(f"`evaluate`, entry {number}: `judge` is a mapping of options, found {judge!r:.80}")
            _refuse(judge or {}, OWN["judge"], f"`judge` of `evaluate`, entry {number}")
        names = [benchmark_name(entry) for entry in self.evaluate]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"`evaluate` names {', '.join(twice)} twice: their answers would have one file")

    @property
    def images(self) -> str:
        """Where the images of the prompts are."""
        return self.image_root or str(Path(self.prompts).parent)

    def shaping(self) -> dict[str, Any]:
        """All that shapes the results, for two starts to be compared."""
        prompts = hashlib.sha256(read_file(self.prompts)).hexdigest()[:16]
        return {**_without_free(dataclasses.asdict(self)), "prompts": f"{self.prompts} (sha256 {prompts})"}


def benchmark_name(entry: Mapping[str, Any]) -> str:
    """The name of an entry of `evaluate`, for files and tables."""
    return Path(entry["benchmark"]).stem


def read_loop_file(path: str | Path, **changed: Any) -> LoopFile:
    """The loop of a YAML file. `changed`: fields that the command line sets; None is none.

    Raises:
        ValueError: the file cannot be read, or a field is unknown or wrong.
    """
    try:
        data = parse_yaml(read_file(path, limit=MAX_SETTINGS_BYTES).decode())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(data, Mapping):
        raise ValueError(f"{path}: expected `option: value` lines; `silkie loop --help` names them")
    try:
        return check(LoopFile, {**data, **{name: value for name, value in changed.items() if value is not None}})
    except FieldError as error:
        raise ValueError(f"{path}: {error}") from None


def _refuse(section: Mapping[str, Any], own: set[str], where: str) -> None:
    if found := sorted(own & {name.replace("-", "_") for name in section}):
        raise ValueError(f"{where}: the loop sets {', '.join(f'`{name}`' for name in found)} itself; remove it there")


def _without_free(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_free(entry) for key, entry in value.items() if key not in FREE}
    return [_without_free(entry) for entry in value] if isinstance(value, list | tuple) else value
