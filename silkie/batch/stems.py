"""Which groups of a micro-batch can share the first tokens of their prompts, and how many.

A shared token must be the same in everything that the model computes from: its id, its position in every channel, its
other inputs, and the features of its image. So groups with images share a stem only where their processed images are
equal, number for number, and the stem holds all of them: it never ends inside an image or between two.
Legend: L prompt tokens, C position channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from silkie.batch.encoding import EncodedGroup
from silkie.batch.packing import PromptAndResponses, Tree, length

SHORTEST_STEM = 16  # tokens; a shorter one saves less than a segment costs

Item = TypeVar("Item")


def find_trees(
    encoded: Sequence[EncodedGroup],
    groups: Sequence[PromptAndResponses],
    image_token_id: int | None,
    *,
    padded: bool,
) -> list[Tree]:
    """The groups as trees, in the order of their first groups; every group is in one.

    Args:
        encoded: tokens and image tensors of the groups.
        groups: the same with their positions.
        image_token_id: id of the placeholder that an image feature replaces.
        padded: each tree is a row, and rows are padded to the longest: trees are made as large as that pays.
    """
    facts = [_facts(group) for group in groups]
    ends = [_image_end(group, image_token_id) for group in encoded]

    def shared(a: int, b: int) -> int:
        length = _common(facts[a], facts[b])
        return length if length >= max(SHORTEST_STEM, ends[a], ends[b]) else 0

    alike = _alike(encoded, groups)
    for members in alike:
        # In this order neighbours share the longest beginnings, so that joining neighbours is enough.
        members.sort(key=lambda g: (groups[g].prompt_ids.tolist(), g))

    def trees(most: int | None) -> list[Tree]:
        runs = [run for members in alike for run in join(members, shared, most)]
        return sorted((Tree(tuple(sorted(run)), stem) for run, stem in runs), key=lambda tree: tree.groups)

    if not padded:
        return trees(None)
    # from the largest down: of two that cost as much, the one that shares more
    candidates = [trees(most) for most in range(max(map(len, alike)), 0, -1)]
    return min(candidates, key=lambda found: len(found) * max(length(groups, tree) for tree in found))


def join(items: Sequence[Item], shared: Any, most: int | None = None) -> list[tuple[list[Item], int]]:
    """Runs of items, sorted by their text, that share a beginning: each with its length, 0 for an item alone.

    An item joins the run before it where all together save more than the run did without it.

    Args:
        shared: (item, item) -> length of the beginning that they share.
        most: items of a run at most.
    """
    runs: list[tuple[list[Item], int]] = []
    for item in items:
        if runs and (most is None or len(runs[-1][0]) < most):
            run, stem = runs[-1]
            common = shared(run[-1], item)
            common = min(stem, common) if len(run) > 1 else common
            if len(run) * common > (len(run) - 1) * stem:
                runs[-1] = ([*run, item], common)
                continue
        runs.append(([item], 0))
    return runs


def _alike(encoded: Sequence[EncodedGroup], groups: Sequence[PromptAndResponses]) -> list[list[int]]:
    """Groups with equal image tensors and inputs of equal names."""
    found: list[list[int]] = []
    for g in range(len(groups)):
        for members in found:
            first = members[0]
            if groups[first].token_inputs.keys() == groups[g].token_inputs.keys() and same_vision(
                encoded[first].vision, encoded[g].vision
            ):
                members.append(g)
                break
        else:
            found.append([g])
    return found


def same_vision(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two groups have equal image tensors."""
    return a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def _facts(group: PromptAndResponses) -> Tensor:
    """[1 + C + inputs, L] what must be equal in a token that groups share."""
    inputs = [group.token_inputs[name] for name in sorted(group.token_inputs)]
    return torch.stack([group.prompt_ids, *group.prompt_positions, *inputs])


def _common(a: Tensor, b: Tensor) -> int:
    """Leading tokens that two prompts have in common; each keeps one of its own, which predicts its responses."""
    length = min(a.shape[1], b.shape[1]) - 1
    differs = (a[:, :length] != b[:, :length]).any(0).nonzero()
    return int(differs[0]) if len(differs) else length


def _image_end(group: EncodedGroup, image_token_id: int | None) -> int:
    """One past the last image token of a prompt, so that a stem holds all or none; past its end where image tokens
    cannot be told from others."""
    if not group.vision:
        return 0
    if image_token_id is None:
        return len(group.prompt_ids) + 1
    places = (group.prompt_ids == image_token_id).nonzero()
    return int(places[-1]) + 1 if len(places) else len(group.prompt_ids) + 1
