"""What a loop does, stage by stage: the files of a round and the command that makes each of them.

OUTPUT/base/pope.jsonl                       answers of the model itself
OUTPUT/round-1/prompts.jsonl  responses.jsonl  ratings.jsonl  dataset/  train.yaml  adapter/  pope.jsonl
OUTPUT/round-2/...
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from silkie.endpoint.adapters import load_adapter
from silkie.feedback.inputs import read_items
from silkie.feedback.items import JudgeItem
from silkie.io.console import say
from silkie.run.rounds.settings import LoopFile, benchmark_name

__all__ = ["Policy", "Stage", "Stages"]

# Of `sample`: what describes the policy as the one member of the pool, and its name there.
MEMBER = {
    "temperatures": "temperatures",
    "top_p": "top_p",
    "max_answer_tokens": "max_tokens",
    "batch_size": "batch_size",
    "price_prompt": "price_prompt",
    "price_completion": "price_completion",
}


@dataclass(frozen=True, slots=True)
class Policy:
    """The model, or what a round has made of it."""

    title: str
    folder: Path
    adapter: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A command of silkie.

    Attributes:
        key: its name in the file of finished stages.
        title: for people.
        words: of the command line, without `silkie`.
        prepare: what has to be there before; may be repeated.
        finish: what makes its result final.
    """

    key: str
    title: str
    words: Callable[[], list[str]]
    prepare: Callable[[], None] = field(default=lambda: None)
    finish: Callable[[], None] = field(default=lambda: None)


class Stages:
    """The stages of a loop, in order."""

    def __init__(self, loop: LoopFile) -> None:
        self.loop, self.out = loop, Path(loop.output_dir)
        self.prompts = [_with_id(item) for item in read_items(loop.prompts, need_responses=False)]
        if not self.prompts:
            raise ValueError(f"{loop.prompts} holds no prompts")

    def policies(self) -> list[Policy]:
        """The model, and the policy that each round makes."""
        rounds = [self.out / f"round-{number}" for number in range(1, self.loop.rounds + 1)]
        made = [Policy(f"Round {n}", folder, folder / "adapter") for n, folder in enumerate(rounds, 1)]
        return [Policy("Base", self.out / "base"), *made]

    def of_round(self, number: int) -> Iterator[Stage]:
        """The stages of a round; round 0 is the evaluation of the model itself."""
        policies = self.policies()
        if number:
            yield from self._training(number, policies[number - 1], policies[number])
        for entry in self.loop.evaluate:
            yield from self._evaluation(entry, policies[number])

    def prompts_of(self, number: int) -> list[dict[str, Any]]:
        """The prompts of a round: the next ones of the file, which starts again from the top where it ends."""
        count = min(self.loop.prompts_per_round or len(self.prompts), len(self.prompts))
        first = (number - 1) * count
        return [self.prompts[(first + k) % len(self.prompts)] for k in range(count)]

    def _training(self, number: int, before: Policy, after: Policy) -> Iterator[Stage]:
        loop, folder = self.loop, after.folder
        responses, ratings, partial = folder / "responses.jsonl", folder / "ratings.jsonl", folder / "dataset.partial"
        of_images = ["--image-root", loop.images]

        def prepare_sampling() -> None:
            _write(folder / "prompts.jsonl", "".join(json.dumps(row) + "\n" for row in self.prompts_of(number)))
            _write(folder / "pool.yaml", yaml.safe_dump({"members": [self._member(before)]}, sort_keys=False))
            self._load(before)

        def sampling() -> list[str]:
            files = [str(folder / "prompts.jsonl"), "--pool", str(folder / "pool.yaml"), "--out", str(responses)]
            seed = ["--seed", str(loop.seed + number)]
            rest = {name: value for name, value in loop.sample.items() if name not in MEMBER}
            return ["feedback", "sample", *files, *of_images, *seed, *flags(rest)]

        def rating() -> list[str]:
            files = [str(responses), "--journal", str(ratings)]
            return ["feedback", "rate", *files, *of_images, *flags(loop.rate)]

        def building() -> list[str]:
            files = [str(responses), "--journal", str(ratings), "--out", str(partial)]
            return ["feedback", "build", *files, *of_images, "--pairs", str(loop.train.get("pairs", "all"))]

        def clear() -> None:
            shutil.rmtree(partial, ignore_errors=True)

        def rename() -> None:
            shutil.rmtree(folder / "dataset", ignore_errors=True)
            partial.rename(folder / "dataset")

        def training() -> list[str]:
            return ["train", "--config", str(folder / "train.yaml")]

        def stage(name: str, title: str, words: Callable[[], list[str]], **more: Any) -> Stage:
            return Stage(key=f"{folder.name}/{name}", title=f"{after.title}: {title}", words=words, **more)

        yield stage("sample", f"sample from {before.title}", sampling, prepare=prepare_sampling)
        yield stage("rate", "have the responses rated", rating)
        yield stage("build", "build the preferences", building, prepare=clear, finish=rename)
        yield stage("train", f"train on from {before.title}", training, prepare=lambda: self.write_train(number))

    def write_train(self, number: int) -> Path:
        """The YAML file of a round's training run, which `silkie train --config` can also run by itself."""
        before, after = self.policies()[number - 1 : number + 1]
        start = {"adapter_name_or_path": str(before.adapter)} if before.adapter else {"use_peft": True}
        options = {
            "model_name_or_path": self.loop.model,
            **start,
            "dataset_name": str(after.folder / "dataset"),
            "output_dir": str(after.adapter),
            "seed": self.loop.seed,
            **self.loop.train,
        }
        return _write(after.folder / "train.yaml", yaml.safe_dump(options, sort_keys=False))

    def _evaluation(self, entry: Mapping[str, Any], policy: Policy) -> Iterator[Stage]:
        name, benchmark = benchmark_name(entry), str(entry["benchmark"])
        answers, judged = policy.folder / f"{name}.answers.jsonl", self.results(entry, policy)
        options = {key: value for key, value in entry.items() if key not in ("benchmark", "judge")}

        def answering() -> list[str]:
            who = ["--model", self._served(policy), "--base-url", self.loop.serve.base_url] if self.loop.serve else []
            if self.loop.serve and self.loop.serve.key_variable:
                who += ["--key-variable", self.loop.serve.key_variable]
            local = ["--model", self.loop.model, *(["--adapter", str(policy.adapter)] if policy.adapter else [])]
            return ["eval", "run", benchmark, "--out", str(answers), *(who or local), *flags(options)]

        def judging() -> list[str]:
            return ["eval", "judge", benchmark, str(answers), "--out", str(judged), *flags(entry["judge"])]

        key, title = f"{policy.folder.name}/evaluate-{name}", f"{policy.title}: answer {name}"
        yield Stage(key=key, title=title, words=answering, prepare=lambda: self._load(policy))
        if "judge" in entry:
            yield Stage(key=f"{key}-judge", title=f"{policy.title}: have {name} judged", words=judging)

    def results(self, entry: Mapping[str, Any], policy: Policy) -> Path:
        """The file of a benchmark's results."""
        kind = "judged" if "judge" in entry else "answers"
        return policy.folder / f"{benchmark_name(entry)}.{kind}.jsonl"

    def _member(self, policy: Policy) -> dict[str, Any]:
        """The policy as a pool's member."""
        options = {MEMBER[name]: value for name, value in self.loop.sample.items() if name in MEMBER}
        serve = self.loop.serve
        if serve is not None:
            key = {"key_variable": serve.key_variable} if serve.key_variable else {}
            return {"name": "policy", "base_url": serve.base_url, "model": self._served(policy), **key, **options}
        if policy.adapter is None:
            return {"name": "policy", "local": self.loop.model, **options}
        return {"name": "policy", "local": str(policy.adapter), "base_model": self.loop.model, **options}

    def _served(self, policy: Policy) -> str:
        """The name of a policy at the server. An adapter's holds a hash of its weights: one name, one adapter."""
        assert self.loop.serve is not None
        if policy.adapter is None:
            return self.loop.serve.model or self.loop.model
        weights = policy.adapter / "adapter_model.safetensors"
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:12] if weights.is_file() else "untrained"
        return f"silkie-{policy.folder.name}-{digest}"

    def _load(self, policy: Policy) -> None:
        """Raises silkie.endpoint.adapters.AdapterNotLoaded."""
        serve = self.loop.serve
        if serve is None or policy.adapter is None:
            return
        root = Path(serve.output_dir) if serve.output_dir else self.out.absolute()
        name, path = self._served(policy), str(root / policy.adapter.relative_to(self.out))
        if load_adapter(serve.base_url, name, path, key_variable=serve.key_variable):
            say(f"{serve.base_url} has loaded {path} as {name}")


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options of a section as words of a command line."""
    words: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is None or value is False:
            continue
        values: Sequence[Any] = value if isinstance(value, list | tuple) else () if value is True else (value,)
        words += [flag, *map(str, values)]
    return words


def _with_id(item: JudgeItem) -> dict[str, Any]:
    images = list(item.images)
    image = images[0] if len(images) == 1 else images or None
    return {**item.meta, "id": item.written_id, "image": image, "prompt": item.prompt}


def _write(path: Path, text: str) -> Path:
    """A file that is whole when it has its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path
