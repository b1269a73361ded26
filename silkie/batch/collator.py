"""Rows of a preference-group dataset -> the tensors of one micro-batch. No model weights: runs in data workers."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from PIL import Image
from torch import Tensor

from silkie.batch.batch import Batch
from silkie.batch.corruption import Corruption, corrupt
from silkie.batch.encoding import EncodedGroup, GroupEncoder, row_name
from silkie.batch.labels import Labels
from silkie.batch.packing import Layout, PackedBatch, PromptAndResponses, Tree, pack, token_uses
from silkie.batch.stems import find_trees
from silkie.data.images import image_digest, open_image
from silkie.data.pairs import mean_ratings

logger = logging.getLogger(__name__)


class PositionRule(Protocol):
    """Rotary positions of a prompt, by the model's own rule; `silkie.model` provides it.

    Attributes:
        response_types: token input -> its value within a response, where that differs from other text.
    """

    response_types: dict[str, int]

    def __call__(self, prompt_ids: Tensor, token_inputs: Mapping[str, Tensor], vision: Mapping[str, Any]) -> Tensor:
        """[C, L] positions of a prompt of ids [L] with its per-token inputs [L] and the image tensors of its group."""
        ...


@dataclass(slots=True, kw_only=True)
class GroupCollator:
    """Encodes and packs groups.

    Attributes:
        encoder: tokens and pixels of a group.
        positions: rotary positions of a prompt.
        layout, groups_per_row, pad_to_multiple_of: see `silkie.batch.packing.pack`.
        pad_id: token id of padding.
        image_token_id: id of the placeholder that an image feature replaces.
        aspects: rating aspects, the columns of `aspect_ratings`.
        dummy_vision: image tensors for a micro-batch without images; their features are not used. None: such a
            micro-batch does not run the vision tower.
        corruption: makes the images of mDPO's second pass. None: there is no such pass.
        joins: image tensors that are joined in another way than one below the other, see `image_joins`.
        labels: labelled responses, for losses that take no pairs. None: the losses take pairs.
        image_keys: also hash the encoded images (`silkie.model.vision_cache`).
        count_uses: also count how often TRL's rows would hold each token (`token_uses`).
        share_prefix: groups whose prompts begin with the same tokens share these, see `silkie.batch.stems`.
    """

    encoder: GroupEncoder
    positions: PositionRule
    layout: Layout
    pad_id: int
    image_token_id: int | None
    groups_per_row: int | None = 1
    aspects: tuple[str, ...] = ()
    dummy_vision: dict[str, Tensor] | None = None
    corruption: ImageCorruption | None = None
    joins: Mapping[str, Join] = field(default_factory=dict)
    share_prefix: bool = False
    labels: Labels | None = None
    image_keys: bool = False
    count_uses: bool = False
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """The micro-batch of preference groups `rows`."""
        data = rows
        added: list[list[float]] = [[] for _ in rows]  # weights of the responses that are added to each row
        if self.labels is not None and self.labels.mismatched:
            rows, added = self.labels.with_mismatched(rows)
        encoded = [self.encoder.encode(row) for row in rows]
        groups = [
            PromptAndResponses(
                prompt_ids=e.prompt_ids,
                prompt_positions=self.positions(e.prompt_ids, e.token_inputs, e.vision),
                responses=e.responses,
                token_inputs=e.token_inputs,
            )
            for e in encoded
        ]
        alone = [Tree((g,)) for g in range(len(groups))]
        trees = alone
        if self.share_prefix and self.layout == "packed":
            trees = find_trees(encoded, groups, self.image_token_id, padded=self.groups_per_row == 1)
        counts = [len(e.responses) for e in encoded]
        lengths = torch.tensor([len(r) for e in encoded for r in e.responses])
        pairs, weights = _flat_pairs(rows, counts)
        own = self._packed(groups, trees)
        fields: dict[str, Any] = {
            **self._rows(own, encoded, trees),
            **({"image_keys": [_image_keys(rows[tree.groups[0]]) for tree in trees]} if self.image_keys else {}),
            "lengths": lengths,
            "prompt_lengths": torch.tensor([len(e.prompt_ids) for e in encoded]),
            "group": torch.tensor([g for g, n in enumerate(counts) for _ in range(n)]),
            "pairs": pairs,
            "pair_weights": weights,
            "longest": int(lengths.max()),
            "names": [row_name(row) for row in rows],
            "rows": [row.get("row") for row in rows],
        }
        if "window" in data[0]:
            fields["window"] = list(data[0]["window"])
        if self.labels is not None:
            fields |= self.labels.tensors(data, added)
        batch = cast(Batch, fields)
        if self.count_uses:
            batch["token_uses"] = token_uses(own, _response_uses(batch))
        if self.aspects:
            batch["ratings"], batch["aspect_ratings"] = self._ratings(rows, counts)
        if self.corruption is not None:
            # Each row has a corruption of its own, so no two share an image: rows of their own where a stem was shared.
            other = {"vision": batch["vision"]}
            if len(trees) < len(groups):
                other = self._rows(self._packed(groups, alone), encoded, alone)
            if vision := _join_vision(self.corruption(self.encoder, rows), self.joins):
                other["vision"] = vision
            batch["corrupted"] = other
        return batch

    def _packed(self, groups: Sequence[PromptAndResponses], trees: Sequence[Tree]) -> PackedBatch:
        return pack(
            groups,
            self.layout,
            pad_id=self.pad_id,
            trees=trees,
            groups_per_row=self.groups_per_row,
            response_types=self.positions.response_types,
            multiple=self.pad_to_multiple_of or 1,
        )

    def _rows(self, packed: PackedBatch, encoded: Sequence[EncodedGroup], trees: Sequence[Tree]) -> dict[str, Any]:
        """The rows of the forward pass with their images, and the tokens that it scores."""
        first = [encoded[tree.groups[0]] for tree in trees]  # what a tree shares, its images among it
        vision = _join_vision([e.vision for e in first], self.joins) or dict(self.dummy_vision or {})
        return {
            **{name: getattr(packed, name) for name in PackedBatch.__slots__},
            "vision": vision,
            "image_tokens": [self._image_tokens(e) for e in first],
            "vision_sizes": _sizes([e.vision for e in first], self.joins),
        }

    def _ratings(self, rows: Sequence[Mapping[str, Any]], counts: list[int]) -> tuple[Tensor, Tensor]:
        """Mean ratings [R] and ratings by aspect [R, A]."""
        per_group = [row.get("ratings") or [None] * n for row, n in zip(rows, counts, strict=True)]
        means = [mean for ratings in per_group for mean in mean_ratings(ratings)]
        per_response = [rating for ratings in per_group for rating in ratings]
        table = [[_number((r or {}).get(a)) for a in self.aspects] for r in per_response]
        return torch.tensor(means), torch.tensor(table)

    def _image_tokens(self, group: EncodedGroup) -> int:
        if self.image_token_id is None or not group.n_images:
            return 0
        return int((group.prompt_ids == self.image_token_id).sum())


@dataclass(slots=True, frozen=True, kw_only=True)
class CollateWithRows:
    """Batches that also hold their groups as one row per response, the form in which TRL hands logits to
    `compute_metrics` and `predict`."""

    collate: GroupCollator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """The micro-batch of `rows`, with `as_rows`."""
        batch = self.collate(rows)
        plain = replace(self.collate, layout="rows", groups_per_row=1, corruption=None)
        if plain.labels is not None:
            plain = replace(plain, labels=replace(plain.labels, mismatched=False))
        batch["as_rows"] = plain(rows)
        return batch


@dataclass(slots=True, frozen=True, kw_only=True)
class ImageCorruption:
    """Corrupts the images of a batch. The same row is always corrupted in the same way, so that a resumed run sees the
    same images."""

    kind: Corruption
    strength: float
    seed: int

    def __call__(self, encoder: GroupEncoder, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Tensor]]:
        """The processor's image tensors of each row's corrupted images."""
        decoded = [[open_image(i, where=row_name(row)) for i in row.get("images") or []] for row in rows]
        out = []
        for g, (row, images) in enumerate(zip(rows, decoded, strict=True)):
            # By the row and not by its place: the same on every rank, in every worker and after resuming.
            rng = random.Random(f"{self.seed}-{row.get('row')}")
            # groups of one image may come together: it is no other image to any of them
            others = [image for other, own in enumerate(decoded) if other != g for image in own if image not in images]
            corrupted = [corrupt(image, self.kind, rng, strength=self.strength, others=others) for image in images]
            out.append(encoder.encode({**row, "images": corrupted}).vision)
        return out


def blank_vision(encoder: GroupEncoder) -> dict[str, Tensor]:
    """Image tensors of a small grey image."""
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]
    return encoder.encode(
        {"images": [Image.new("RGB", (56, 56), "grey")], "prompt": message, "responses": ["x"]}
    ).vision


def _flat_pairs(rows: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Pairs [P, 2] of response indices within a group -> within the batch, and their weights [P]."""
    first = [sum(counts[:g]) for g in range(len(counts))]
    pairs = [[first[g] + c, first[g] + r] for g, row in enumerate(rows) for c, r in row["pairs"]]
    weights = [w for row in rows for w in (row.get("pair_weights") or [1.0] * len(row["pairs"]))]
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2), torch.tensor(weights, dtype=torch.float32)


def _response_uses(batch: Batch) -> Tensor:
    """fp32 [R] how often each response is in TRL's rows: on both sides of pairs, or among the labelled ones."""
    uses = torch.zeros(len(batch["lengths"]))
    if "examples" in batch:
        return uses.index_add(0, batch["examples"], batch["example_weights"])
    return uses.index_add(0, batch["pairs"].T.reshape(-1), batch["pair_weights"].repeat(2))


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


@dataclass(slots=True, frozen=True, kw_only=True)
class Join:
    """How a processor joins a tensor of several images, where it does not put one below the other.

    Attributes:
        dim: the dimension along which it does.
        counts: the tensor holds numbers of places in another one, which is named here with the number of its leading
            dimensions that are counted through: behind other images, the numbers are higher by what these take.
            Negative numbers are none. None: it holds no such numbers.
    """

    dim: int = 0
    counts: tuple[str, int] | None = None


def image_joins(encoder: GroupEncoder) -> dict[str, Join]:
    """Image tensors of a processor that it does not join by putting one below the other, found by giving it two images
    alone and together, in both orders."""
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]
    images = [Image.new("RGB", size, "grey") for size in ((56, 56), (112, 56))]
    try:
        rows = [{"images": [image], "prompt": message, "responses": ["x"]} for image in images]
        alone = [encoder.encode(row).vision for row in rows]
        text = encoder.render(rows[0])
        orders = []
        for parts, ordered in ((alone, images), (alone[::-1], images[::-1])):
            together = encoder.processor(
                text=[text, text], images=[[image] for image in ordered], padding=True, return_tensors="pt"
            )
            orders.append((parts, together))
    except Exception:  # a processor that takes no two texts: its tensors are joined along the first dimension
        logger.debug("%s takes no batch", type(encoder.processor).__name__, exc_info=True)
        return {}
    found = {key: _how_joined(key, orders) for key in orders[0][1]}
    return {key: join for key, join in found.items() if join}


def _how_joined(key: str, orders: Sequence[tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]]) -> Join | None:
    parts, together = orders[0]
    values: list[Any] = [part.get(key) for part in parts]
    joined: Any = together[key]
    if not all(isinstance(v, Tensor) and v.dim() == joined.dim() for v in (*values, joined)):
        return None
    sums = [sum(v.shape[d] for v in values) == joined.shape[d] for d in range(joined.dim())]
    if not any(sums):
        return None
    if not sums[0]:
        return Join(dim=sums.index(True))
    if joined.is_floating_point() or torch.equal(_join([p[key] for p in parts], 0), joined):
        return None
    for name, other in parts[0].items():
        for leading in range(1, other.dim() + 1 if isinstance(other, Tensor) else 0):
            join = Join(counts=(name, leading))
            if all(torch.equal(_join_vision(parts, {key: join})[key], joined[key]) for parts, joined in orders):
                return join
    return None


def _join_vision(parts: Sequence[Mapping[str, Any]], joins: Mapping[str, Join]) -> dict[str, Any]:
    """Image tensors of all groups, joined along the first dimension, or as `joins` says; further dimensions are padded
    with zeros, as processors pad their batches. What is no tensor is a list with an entry per image."""
    keys = dict.fromkeys(key for part in parts for key in part)
    out = {}
    for key in keys:
        own, join = [part for part in parts if key in part], joins.get(key, Join())
        values = [part[key] for part in own]
        if join.counts is not None:
            values = _shifted(values, [math.prod(p[join.counts[0]].shape[: join.counts[1]]) for p in own])
        out[key] = _join(values, join.dim)
    return out


def _shifted(values: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Numbers of places among those of all parts, from numbers among those of each."""
    return [torch.where(v < 0, v, v + sum(counts[:i])) for i, v in enumerate(values)]


def _sizes(parts: Sequence[Mapping[str, Any]], joins: Mapping[str, Join]) -> dict[str, list[int]]:
    """Image tensor -> its length in each part, along the dimension of `_join_vision`; 0 where a part has none."""
    keys = dict.fromkeys(key for part in parts for key, value in part.items() if isinstance(value, Tensor))
    return {
        key: [part[key].shape[joins[key].dim if key in joins else 0] if key in part else 0 for part in parts]
        for key in keys
    }


def _image_keys(row: Mapping[str, Any]) -> list[str]:
    return [image_digest(image, where=row_name(row)) for image in row.get("images") or []]


def _join(values: Sequence[Any], dim: int) -> Any:
    if not isinstance(values[0], Tensor):
        return [item for value in values for item in value]
    shape = [max(sizes) for sizes in zip(*(t.shape for t in values), strict=True)]
    padded = []
    for t in values:
        wanted = [have if d == dim else want for d, (have, want) in enumerate(zip(t.shape, shape, strict=True))]
        pad = [p for have, want in zip(reversed(t.shape), reversed(wanted), strict=True) for p in (0, want - have)]
        padded.append(torch.nn.functional.pad(t, pad) if any(pad) else t)
    return torch.cat(padded, dim)
