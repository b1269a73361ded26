"""Groups of the training data that can share the beginning of their prompts, found before training, so that the sampler
can bring them into one step.

What is found here is counted without processing an image: tokens up to a special token, where a tokenizer splits a text
before it does anything else, and the equal ones behind it. The collator has the last word.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from silkie.batch.encoding import GroupEncoder
from silkie.batch.stems import SHORTEST_STEM, join
from silkie.batch.template import common_prefix
from silkie.data.registry import code_digest
from silkie.data.stamps import image_fingerprint

Shape = tuple[int, int]  # rows, tokens of the longest row


@dataclass(frozen=True, slots=True)
class Company:
    """Groups that share a stem.

    Attributes:
        groups: their indices in the dataset.
        stem: tokens that they share, at least.
    """

    groups: tuple[int, ...]
    stem: int

    def tokens(self, lengths: Sequence[int]) -> int:
        """Tokens of the tree, of which groups alone have `lengths` [G of the dataset]."""
        return sum(lengths[g] for g in self.groups) - self.saved

    @property
    def saved(self) -> int:
        return self.stem * (len(self.groups) - 1)


def find_companies(
    dataset: Dataset, encoder: GroupEncoder, lengths: Sequence[int], *, most: int, max_tokens: int | None
) -> list[Company]:
    """Companies of two groups and more. Groups with images need the same images, byte for byte, wherever they are
    stored; groups of text share at least half of a prompt.

    Args:
        dataset: prepared groups, see `silkie.batch.preparation`.
        lengths: tokens of each group in a row of its own.
        most: groups of a company at most.
        max_tokens: of a company at most; None: any number.
    """
    facts = dataset.map(
        _facts,
        fn_kwargs={"encoder": encoder},
        remove_columns=dataset.column_names,
        desc="Looking for shared images",
        new_fingerprint=image_fingerprint(
            dataset,
            "images" if "images" in dataset.column_names else None,
            "companies",
            encoder.fingerprint(),
            code_digest(folders=[Path(__file__).parent]),
        ),
    )
    texts, prompts, n_images = facts["text"][:], dataset["prompt_length"][:], facts["n_images"][:]
    alike: dict[str, list[int]] = defaultdict(list)
    for index, key in enumerate(facts["key"][:]):
        alike[key].append(index)

    def shared(a: int, b: int) -> int:
        images = n_images[a]
        common = len(common_prefix([texts[a], texts[b]]))
        rests = [encoder.tokens_after(texts[g], common, images) for g in (a, b)]
        if rests[0] is None or rests[1] is None:
            return 0
        before = min(prompts[g] - len(rest) for g, rest in zip((a, b), rests, strict=True) if rest is not None)
        # each keeps a token of its own
        stem = min(before + len(common_prefix(rests)), prompts[a] - 1, prompts[b] - 1)
        return stem if stem >= (SHORTEST_STEM if images else max(SHORTEST_STEM, min(prompts[a], prompts[b]) / 2)) else 0

    found = []
    for members in alike.values():
        members.sort(key=lambda g: (texts[g], g))
        for groups, stem in join(members, shared, most):
            found += _within(Company(tuple(groups), stem), lengths, max_tokens)
    return sorted(found, key=lambda company: company.groups)


def _within(company: Company, lengths: Sequence[int], max_tokens: int | None) -> list[Company]:
    """A company cut into such that hold the token budget."""
    parts: list[tuple[int, ...]] = []
    for g in company.groups:
        longer = Company((*parts[-1], g), company.stem) if parts else None
        if longer and (max_tokens is None or longer.tokens(lengths) <= max_tokens):
            parts[-1] = longer.groups
        else:
            parts.append((g,))
    return [Company(groups, company.stem) for groups in parts if len(groups) > 1]


def among(companies: Sequence[Company], indices: Sequence[int]) -> list[Company]:
    """The companies of a part of the dataset, in the numbers of the part."""
    place = {index: n for n, index in enumerate(indices)}
    parts = [Company(tuple(place[g] for g in c.groups if g in place), c.stem) for c in companies]
    return [part for part in parts if len(part.groups) > 1]


def describe_companies(companies: Sequence[Company], lengths: Sequence[int]) -> str:
    """For the log: how many groups share the beginning of their prompt, and what that saves."""
    members, total = sum(len(c.groups) for c in companies), sum(lengths)
    saved = sum(c.saved for c in companies)
    return (
        f"{members} of {len(lengths)} groups ({members / len(lengths):.0%}) share the beginning of their prompt with"
        f" others, which saves at least {saved:,} of {total:,} tokens of a pass over the data ({saved / total:.0%})"
    )


def _facts(row: Mapping[str, Any], encoder: GroupEncoder) -> dict[str, Any]:
    images = row.get("image_digests") or []
    return {"key": json.dumps(images), "n_images": len(images), "text": encoder.render(row)}
