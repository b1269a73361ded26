"""The sizes of VLMs that memory and FLOPs depend on, from a config alone. `tests/unit/test_plan.py` checks parameters
exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a VLM that memory and FLOPs depend on. `vision_*` describe the vision tower, patch = pixels of a
    patch's side, merge = patches merged along a side into one image token."""

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

    @property
    def layer_parameters(self) -> int:
        """Parameters of one language-model layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (2 * q + 2 * kv) + (q + 2 * kv if self.attention_bias else 0)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def head_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def language_parameters(self) -> int:
        """Language model with embedding and head."""
        return self.layers * self.layer_parameters + self.hidden + self.head_parameters * (1 if self.tied else 2)

    @property
    def vision_parameters(self) -> int:
        """Vision tower and merger of the Qwen-VL kind."""
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
        """LoRA on the language model's attention and MLP projections."""
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


def shape_of(config: Any) -> ModelShape:
    """The shape of a transformers config of the Qwen-VL kind; other families' vision towers are approximate.

    Raises:
        ValueError: the model has no vision tower, or its config does not say its sizes.
    """
    name = config._name_or_path or config.model_type
    if getattr(config, "vision_config", None) is None:
        raise ValueError(f"{name} has no vision tower (no vision_config): not a vision-language model.")
    try:
        return _shape(name, config, config.get_text_config(), config.vision_config)
    except AttributeError as error:
        raise ValueError(f"The planner cannot tell the sizes of {name}: {error}.") from error


def _shape(name: str, config: Any, text: Any, vision: Any) -> ModelShape:
    gated = config.model_type in ("qwen2_5_vl",)
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    inner = getattr(vision, "intermediate_size", None) or int(width * getattr(vision, "mlp_ratio", 4))
    heads, patch = text.num_attention_heads, vision.patch_size
    return ModelShape(
        name=name,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        layers=text.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=text.vocab_size,
        tied=bool((config if hasattr(config, "tie_word_embeddings") else text).tie_word_embeddings),
        vision_hidden=width,
        vision_intermediate=inner,
        vision_layers=getattr(vision, "depth", None) or vision.num_hidden_layers,
        vision_gated=gated,
        vision_window=getattr(vision, "window_size", None) if gated else None,
        patch=patch if isinstance(patch, int) else patch[0],  # InternVL gives height and width
        merge=getattr(vision, "spatial_merge_size", 2),
        attention_bias=config.model_type in ("qwen2_vl", "qwen2_5_vl"),
    )
