"""The sizes of VLMs that memory and FLOPs depend on, from a config alone. `tests/unit/test_plan.py` checks parameters
exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What the weightless model of a config reports, exact for every family.

    Attributes:
        parameters, vision, head: of the whole model, of its vision tower with projector, of the output head.
        largest_layer: of the largest layer of the language model.
        active: matrix weights that a token passes in all layers; of a mixture's experts those that it is sent to.
        kept: numbers per token that the backward pass of all layers needs, besides the norms'.
        lora: adapter weights per rank.
        attending: layers that compare every token with every other; the others keep a state.
    """

    parameters: int
    vision: int
    head: int
    largest_layer: int
    active: int
    kept: int
    lora: int
    attending: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a VLM that memory and FLOPs depend on. `vision_*` describe the vision tower, patch = pixels of a
    patch's side, merge = patches merged along a side into one image token. With `counts`, those replace the formulas,
    which are of the Qwen-VL kind. `unpackable`: why the responses of a group cannot share a row; None: they can."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    vision_gated: bool
    vision_window: int | None
    patch: int = 14
    merge: int = 2
    attention_bias: bool = True
    counts: Counts | None = None
    unpackable: str | None = None

    @property
    def attending(self) -> int:
        """Layers of the language model with attention over all tokens."""
        return self.counts.attending if self.counts else self.layers

    @property
    def matrices(self) -> int:
        """Weights of the language model's layers that multiply a token."""
        if self.counts:
            return self.counts.active
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim if self.attention_bias else 0
        return self.layers * (self.layer_parameters - 2 * self.hidden - biases)

    @property
    def kept(self) -> float:
        """Numbers per token and layer that the backward pass needs, besides the norms': q, k, v, attention's output,
        gate, its activation, up, and their product. A mean over the layers."""
        if self.counts:
            return self.counts.kept / self.layers
        return 2 * self.heads * self.head_dim + 2 * self.kv_heads * self.head_dim + 4 * self.intermediate

    @property
    def layer_parameters(self) -> int:
        """Parameters of one language-model layer, the largest where they differ."""
        if self.counts:
            return self.counts.largest_layer
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (2 * q + 2 * kv) + (q + 2 * kv if self.attention_bias else 0)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def head_parameters(self) -> int:
        return self.counts.head if self.counts else self.vocab * self.hidden

    @property
    def language_parameters(self) -> int:
        """Language model with embedding and head."""
        if self.counts:
            return self.counts.parameters - self.counts.vision
        return self.layers * self.layer_parameters + self.hidden + self.head_parameters * (1 if self.tied else 2)

    @property
    def vision_parameters(self) -> int:
        """Vision tower and merger."""
        if self.counts:
            return self.counts.vision
        d, f, m = self.vision_hidden, self.vision_intermediate, self.vision_hidden * self.merge**2
        attention = 4 * d * d + 4 * d
        mlp = 3 * d * f + 2 * f + d if self.vision_gated else 2 * d * f + f + d
        norms = 2 * d if self.vision_gated else 4 * d
        merger = m * m + m + m * self.hidden + self.hidden + (d if self.vision_gated else 2 * d)
        return self.vision_layers * (attention + mlp + norms) + merger + 3 * 2 * self.patch**2 * d

    @property
    def parameters(self) -> int:
        return self.language_parameters + self.vision_parameters

    def lora_parameters(self, rank: int) -> int:
        """LoRA on the language model's linear layers and experts."""
        if self.counts:
            return self.counts.lora * rank
        q, kv, d, f = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden, self.intermediate
        return self.layers * rank * ((d + q) * 2 + (d + kv) * 2 + 3 * (d + f))


SHAPES = {
    "qwen2-vl-2b": ModelShape(
        name="Qwen2-VL-2B",
        hidden=1536,
        intermediate=8960,
        layers=28,
        heads=12,
        kv_heads=2,
        head_dim=128,
        vocab=151936,
        tied=True,
        vision_hidden=1280,
        vision_intermediate=5120,
        vision_layers=32,
        vision_gated=False,
        vision_window=None,
    ),
    "qwen2.5-vl-3b": ModelShape(
        name="Qwen2.5-VL-3B",
        hidden=2048,
        intermediate=11008,
        layers=36,
        heads=16,
        kv_heads=2,
        head_dim=128,
        vocab=151936,
        tied=True,
        vision_hidden=1280,
        vision_intermediate=3420,
        vision_layers=32,
        vision_gated=True,
        vision_window=112,
    ),
    "qwen2.5-vl-7b": ModelShape(
        name="Qwen2.5-VL-7B",
        hidden=3584,
        intermediate=18944,
        layers=28,
        heads=28,
        kv_heads=4,
        head_dim=128,
        vocab=152064,
        tied=False,
        vision_hidden=1280,
        vision_intermediate=3420,
        vision_layers=32,
        vision_gated=True,
        vision_window=112,
    ),
}


def shape_of(config: Any, *, remedy: str = "") -> ModelShape:
    """The shape of a transformers config of any image-text model, counted on its weightless model.

    Args:
        remedy: said with the error of a config that builds no model.

    Raises:
        ValueError: silkie cannot train the model, or its config does not build one.
    """
    from silkie.plan.counting import counted_shape  # loads torch, which a known name does without

    return counted_shape(config, remedy)
