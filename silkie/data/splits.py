"""Train and evaluation splits that share neither an image nor a prompt, and a check that stops a run where they do.

VLFeedback's own split was made after pairing, so that one prompt landed on both sides. Here the unit is a connected
component: groups that share an image or a prompt, directly or through others, stay together.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import datasets

from silkie.data.images import image_digest
from silkie.data.registry import code_digest
from silkie.data.schema import IMAGE_PLACEHOLDER, DataError
from silkie.data.stamps import image_fingerprint

By = Literal["both", "image", "prompt"]
IMAGE_COLUMNS = ("images", "image")
PROMPT_COLUMNS = ("prompt", "question", "conversations", "messages", "instruction", "text")


class Leak(NamedTuple):
    """One row of each side that share an image or a prompt."""

    kind: str
    train_row: int
    eval_row: int


class LeakError(DataError):
    """Training and evaluation data overlap. `leaks` lists every evaluation row concerned."""

    def __init__(self, message: str, leaks: list[Leak]) -> None:
        super().__init__(message)
        self.leaks = leaks

    def __reduce__(self):
        return LeakError, (str(self), self.leaks)


@dataclass(frozen=True, slots=True)
class RowKeys:
    """Hashes of a row's images and of its prompt's text."""

    images: tuple[str, ...]
    prompt: str


def split_groups(
    dataset: datasets.Dataset,
    test_size: float | int = 0.05,
    *,
    seed: int = 0,
    by: By = "both",
    num_proc: int | None = None,
) -> datasets.DatasetDict:
    """Split groups into "train" and "test" so that no image and no prompt is on both sides.

    Args:
        test_size: share of the groups, or their number. Components are never cut, so the result may be a few groups
            smaller, never larger.
        by: what keeps groups together: "both" image and prompt, or one of them. Use "image" for data with a few stock
            prompts ("Describe the image."), which tie most of the data into one component.

    Raises DataError where the components are too large for the test set; the message names the prompt that ties most
    groups together."""
    check_choice("by", by, By)
    wanted = round(test_size * len(dataset)) if isinstance(test_size, float) else test_size
    if not 0 < wanted < len(dataset):
        raise ValueError(
            f"test_size={test_size} asks for {wanted} of {len(dataset)} groups; expected at least 1 and fewer than all"
        )
    keys = row_keys(dataset, num_proc=num_proc)
    components = connected(keys, by)
    random.Random(seed).shuffle(components)
    test: list[int] = []
    for component in components:
        if len(test) + len(component) <= wanted:
            test += component
    if len(test) < max(1, wanted // 2):
        largest = max(map(len, components))
        prompt, count = Counter(key.prompt for key in keys).most_common(1)[0]
        example = next(index for index, key in enumerate(keys) if key.prompt == prompt)
        raise DataError(
            f"cannot split off {wanted} of {len(dataset)} groups: the {len(components)} components (groups that share"
            f" an image or a prompt) are too large, the largest has {largest} groups; one prompt occurs in {count}"
            f" groups, for example in row {example}. Pass by='image' (the recipe: --eval_split_by image) to let prompts"
            " occur on both sides."
        )
    chosen = set(test)
    train = [index for index in range(len(dataset)) if index not in chosen]
    return datasets.DatasetDict({"train": dataset.select(train), "test": dataset.select(sorted(test))})


def check_choice(name: str, value: str, kind: Any) -> None:
    """Raise ValueError for a value that a Literal does not list: a misspelt check would look at something else."""
    if value not in get_args(kind):
        raise ValueError(f"{name}={value!r} is not known; choose from {', '.join(get_args(kind))}")


def check_leak(
    train: datasets.Dataset,
    evaluation: datasets.Dataset,
    *,
    by: By = "both",
    num_proc: int | None = None,
) -> None:
    """Raise LeakError, naming rows, where evaluation data share an image or a prompt with training data.

    Args:
        evaluation: groups, or benchmark rows with an `image` / `images` column and a `prompt` / `question` / `text`
            column.
        by: "both" refuses a shared image as well as a shared prompt text (compared without case and white space).
    """
    check_choice("by", by, By)
    train_keys = row_keys(train, num_proc=num_proc)
    eval_keys = row_keys(evaluation, num_proc=num_proc)
    leaks = list(_leaks(train_keys, eval_keys, by))
    if not leaks:
        return
    kinds = Counter(leak.kind for leak in leaks)
    counts = ", ".join(f"{count} row(s) share their {kind}" for kind, count in kinds.items())
    examples = "; ".join(
        f"evaluation row {leak.eval_row} has the {leak.kind} of training row {leak.train_row}" for leak in leaks[:5]
    )
    more = "; ..." if len(leaks) > 5 else ""
    advice = "Drop these rows from the training data, or split with silkie.data.split_groups."
    if by == "both" and set(kinds) == {"prompt"}:
        advice += (
            " If shared prompts are wanted (a benchmark's stock question), pass by='image' (the recipe: --eval_split_by"
            " image)."
        )
    raise LeakError(f"evaluation data leak into the training data: {counts}. {examples}{more}. {advice}", leaks)


def _leaks(train: Sequence[RowKeys], evaluation: Sequence[RowKeys], by: By) -> Iterable[Leak]:
    """One leak per kind for every evaluation row that has one."""
    prompts: dict[str, int] = {}  # key -> first training row
    images: dict[str, int] = {}
    for index, key in enumerate(train):
        prompts.setdefault(key.prompt, index)
        for image in key.images:
            images.setdefault(image, index)
    for index, key in enumerate(evaluation):
        shared = next((images[image] for image in key.images if image in images), None)
        if by != "prompt" and shared is not None:
            yield Leak("image", shared, index)
        if (by != "image" or not key.images) and key.prompt in prompts:  # a text-only row has nothing but its prompt
            yield Leak("prompt", prompts[key.prompt], index)


def row_keys(dataset: datasets.Dataset, *, num_proc: int | None = None) -> list[RowKeys]:
    """Hashes of every row's images and prompt, cached by `datasets`. Raises ImageError naming the row."""
    image_column = next((name for name in IMAGE_COLUMNS if name in dataset.column_names), None)
    prompt_column = next((name for name in PROMPT_COLUMNS if name in dataset.column_names), None)
    if prompt_column is None:
        raise DataError(
            f"no prompt column: found {', '.join(dataset.column_names)}; expected one of {', '.join(PROMPT_COLUMNS)}"
        )
    columns = [column for column in (image_column, prompt_column) if column]
    features = datasets.Features(
        {"image_keys": datasets.List(datasets.Value("string")), "prompt_key": datasets.Value("string")}
    )
    rows = dataset.select_columns(columns).with_format("arrow")
    hashed = rows.map(
        _hash_batch,
        batched=True,
        batch_size=32,
        with_indices=True,
        remove_columns=columns,
        num_proc=num_proc,
        desc="hashing images and prompts",
        fn_kwargs={"image_column": image_column, "prompt_column": prompt_column},
        features=features,
        new_fingerprint=image_fingerprint(dataset, image_column, "hash", prompt_column, code_digest()),
    )
    return [RowKeys(tuple(row["image_keys"]), row["prompt_key"]) for row in hashed.with_format(None)]


def _hash_batch(batch: Any, indices: list[int], image_column: str | None, prompt_column: str) -> Any:
    import pyarrow as pa

    prompts = [prompt_key(value) for value in batch[prompt_column].to_pylist()]
    images = batch[image_column].to_pylist() if image_column else [None] * len(prompts)
    keys = [
        [image_digest(image, where=f"row {index}, image {i}") for i, image in enumerate(_listed(value))]
        for index, value in zip(indices, images, strict=True)
    ]
    return pa.table({"image_keys": pa.array(keys, pa.list_(pa.string())), "prompt_key": pa.array(prompts, pa.string())})


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def prompt_key(prompt: Any) -> str:
    """Hash of a prompt's text, whatever its shape (string, turns, content parts), without case, white space and image
    marks."""
    text = " ".join(_texts(prompt)).replace(IMAGE_PLACEHOLDER, " ")
    return hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=16).hexdigest()


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts(value.get("content", value.get("value", value.get("text"))))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def connected(keys: Sequence[RowKeys], by: By) -> list[list[int]]:
    """Rows joined by a shared image or prompt, directly or through others; components in order of their first row."""
    parent = list(range(len(keys)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[tuple[str, str], int] = {}
    for index, key in enumerate(keys):
        shared = [("image", image) for image in key.images] if by != "prompt" else []
        if by != "image" or not key.images:  # a text-only row has nothing but its prompt
            shared.append(("prompt", key.prompt))
        for name in shared:
            other = root(first.setdefault(name, index))
            parent[max(root(index), other)] = min(root(index), other)
    components: dict[int, list[int]] = {}
    for index in range(len(keys)):
        components.setdefault(root(index), []).append(index)
    return list(components.values())
