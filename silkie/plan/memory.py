"""How much memory and compute a run needs, by part, before any GPU is rented: `python -m silkie.plan qwen2.5-vl-7b
--gpus 8 --memory 80GB`.

Counts are analytic, from a model's config alone. The constants are those of mixed-precision training;
`tests/unit/test_plan.py` checks parameters exactly, FLOPs against a counter and kept activations against tracked ones.
Legend: G groups, K responses, T tokens of a packed group, N scored tokens, D hidden, V vocabulary, L layers.
"""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from silkie.io.console import say
from silkie.plan.shapes import SHAPES, ModelShape, shape_of

logger = logging.getLogger(__name__)

Engine = Literal["ddp", "zero2", "zero3", "fsdp2", "zero3_offload"]
ENGINES: tuple[Engine, ...] = ("ddp", "zero2", "zero3", "fsdp2", "zero3_offload")
Training = Literal["lora", "qlora", "full"]
GIB = 2**30

# Bytes of a quantised weight. 4-bit: half a byte, and a quantised scale per block of 64 (double quantisation: about a
# quarter of 4 bytes)
_QUANTISED = {4: 0.5 + 4 / 64 / 4, 8: 1.0}
_FLOPS_FORWARD = 2  # per parameter and token
LEAST = {
    "gpus": 1,
    "groups": 1,
    "responses": 2,
    "response_tokens": 1,
    "prompt_tokens": 1,
    "image_tokens": 0,
    "lora_rank": 1,
}
TIGHT = 0.1  # share of the memory
_CONTEXT = 1.0 * GIB  # CUDA context, cuBLAS workspaces, NCCL buffers
_FRAGMENTATION = 1.1  # the caching allocator's peak over what is alive


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One micro-batch of a process and how it is trained. `responses` and `*_tokens` are means over its groups
    (`response_tokens`: over its responses); `half`: weights and activations in bf16 or fp16."""

    groups: int = 1
    responses: float = 4
    image_tokens: float = 1280
    prompt_tokens: float = 60
    response_tokens: float = 120
    layout: Literal["packed", "rows"] = "packed"
    training: Training = "lora"
    quantised_bits: int = 4
    lora_rank: int = 64
    checkpointing: bool = True
    checkpointed: int | None = None  # of the layers, with checkpointing; None: all
    fused: bool = True
    reference_cached: bool = False
    second_model: bool = False  # a reference with weights of its own, in memory all along
    optimizer_8bit: bool = False
    half: bool = True

    @property
    def rows(self) -> float:
        """B: sequences of the micro-batch: one per group, or per response."""
        return self.groups * (self.responses if self.layout == "rows" else 1)

    @property
    def tokens(self) -> float:
        """T: tokens of the micro-batch."""
        return self.rows * (self.image_tokens + self.prompt_tokens) + self.scored

    @property
    def bytes(self) -> float:
        """Bytes of a weight or activation."""
        return 2.0 if self.half else 4.0

    @property
    def scored(self) -> float:
        """N: scored tokens."""
        return self.groups * self.responses * self.response_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Bytes by part on one GPU, and FLOPs of a micro-batch on one GPU."""

    model: str
    engine: Engine
    gpus: int
    memory: float
    workload: Workload
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    features: float
    overhead: float
    host: float
    flops: float

    @property
    def total(self) -> float:
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.features
            + self.overhead
        )

    @property
    def fits(self) -> bool:
        return self.total <= self.memory

    @property
    def spare(self) -> float:
        """Share of the GPU's memory that is left; below 0 where it does not fit."""
        return 1 - self.total / self.memory

    @property
    def tight(self) -> bool:
        """Fits, with less left than an estimate should be trusted with."""
        return 0 <= self.spare < TIGHT

    @property
    def margin(self) -> str:
        """For people: `3 % to spare: tight`."""
        share = f"{abs(self.spare) * 100:.0f} %"
        return f"{share} to spare{': tight' * self.tight}" if self.fits else f"{share} too much"

    def lines(self) -> list[str]:
        """Human-readable summary lines."""
        parts = ("weights", "gradients", "optimizer", "activations", "logits", "features", "overhead")
        by_part = ", ".join(f"{name} {size(getattr(self, name))}" for name in parts)
        verdict = "fits" if self.fits else "does NOT fit"
        host = f"; host memory {size(self.host)}" if self.host else ""
        return [
            (
                f"{self.engine} on {self.gpus} GPU(s): {size(self.total)} per GPU, {verdict} in {size(self.memory)}"
                f" (estimate): {self.margin}"
            ),
            f"  {by_part}{host}",
            f"  {self.flops / 1e12:.3g} TFLOP per GPU and micro-batch of {self.workload.tokens:.0f} tokens",
        ]


def size(number: float) -> str:
    """For people: `1.5 GiB`."""
    return f"{number / GIB:.1f} GiB" if number >= 0.1 * GIB else f"{number / 2**20:.2g} MiB" if number else "0"


def estimate(
    shape: ModelShape,
    workload: Workload | None = None,
    *,
    engine: Engine = "ddp",
    gpus: int = 1,
    memory: float = 80e9,
    per_node: int = 8,
) -> Plan:
    """The plan of one configuration.

    Args:
        memory: bytes of one GPU.
        per_node: GPUs that share a machine's memory, for the offloaded optimizer.
    """
    w = workload or Workload()
    shard_weights = gpus if engine in ("zero3", "fsdp2", "zero3_offload") else 1
    shard_states = gpus if engine != "ddp" else 1
    full = w.training == "full"
    trained = shape.language_parameters if full else shape.lora_parameters(w.lora_rank)
    frozen = shape.parameters - shape.language_parameters if full else shape.parameters
    kept_whole = shape.vision_parameters + shape.head_parameters * (1 if shape.tied else 2)
    bytes_frozen = frozen * w.bytes
    if w.training == "qlora":
        bytes_frozen = kept_whole * w.bytes + (frozen - kept_whole) * _QUANTISED[w.quantised_bits]
    weight, gradient, states = _trained_bytes(w, engine)
    second = (shape.parameters if full else frozen) * w.bytes if w.second_model else 0.0
    weights = (bytes_frozen + trained * weight + second) / shard_weights
    # Sharded weights are gathered layer by layer; the head is the largest single piece.
    gathered = max(shape.layer_parameters * 2, shape.head_parameters) * w.bytes if shard_weights > 1 else 0.0
    optimizer = trained * states
    offloaded = engine == "zero3_offload"
    return Plan(
        model=shape.name,
        engine=engine,
        gpus=gpus,
        memory=memory,
        workload=w,
        weights=weights + gathered,
        gradients=trained * gradient / shard_states,
        optimizer=0.0 if offloaded else optimizer / shard_states,
        host=optimizer / shard_states * min(gpus, per_node) if offloaded else 0.0,
        activations=_activations(shape, w),
        logits=_logits(shape, w),
        features=_features(shape, w),
        overhead=_CONTEXT + (_FRAGMENTATION - 1) * (weights + gathered + _activations(shape, w)),
        flops=sum(flops(shape, w).values()),
    )


def _trained_bytes(w: Workload, engine: Engine) -> tuple[float, float, float]:
    """Bytes of a trained weight, its gradient and its optimizer states.

    PyTorch's Adam keeps its two moments in the weight's own type. Adapters are fp32 (those on a quantised base half
    precision, as in the QLoRA paper), and so is what FSDP2 trains under mixed precision; DeepSpeed keeps half-precision
    weights and an fp32 master copy beside the moments.
    """
    deepspeed = engine in ("zero2", "zero3", "zero3_offload")
    fp32 = not w.half or (not deepspeed and (w.training == "lora" or engine == "fsdp2"))
    own = 4.0 if fp32 else 2.0
    if w.optimizer_8bit:
        return own, own, 2.0
    return own, own, 4.0 + 8.0 if deepspeed and not fp32 else 2 * own


def _activations(shape: ModelShape, w: Workload) -> float:
    """Bytes kept for the backward pass: of checkpointed layers a hidden state each and one in full, of others all."""
    norms = 2 * (4.0 + 2 * w.bytes) * shape.hidden  # two: input in fp32, normalised, scaled
    layer = w.tokens * (norms + w.bytes * shape.kept)
    first = checkpointed_layers(shape, w)
    boundaries = first * w.tokens * shape.hidden * w.bytes
    # the last of the checkpointed layers is computed again when what the others kept is released
    whole = max(shape.layers - first, min(first, 1))
    mask = w.tokens**2 / w.rows  # the packed layout's boolean mask on sdpa
    return boundaries + whole * layer + mask


def checkpointed_layers(shape: ModelShape, w: Workload) -> int:
    """How many layers are computed twice: the first ones."""
    if not w.checkpointing:
        return 0
    return shape.layers if w.checkpointed is None else min(w.checkpointed, shape.layers)


def _logits(shape: ModelShape, w: Workload) -> float:
    """Workspace of the output head. Fused: a stored [N, D] gradient and one tile; plain: [N, V] in the model's type and
    twice in fp32."""
    if w.fused:
        return w.scored * shape.hidden * 2 * w.bytes + min(2.0**28, w.scored * shape.vocab * 4.0)
    return w.scored * shape.vocab * (w.bytes + 4.0 + 4.0)


def _features(shape: ModelShape, w: Workload) -> float:
    """Image features, kept for the step, and the largest layer of a tower that runs without gradient."""
    patches = w.groups * w.image_tokens * shape.merge**2
    return w.groups * w.image_tokens * shape.hidden * w.bytes + patches * w.bytes * (
        6 * shape.vision_hidden + 2 * shape.vision_intermediate
    )


def flops(shape: ModelShape, w: Workload) -> dict[str, float]:
    """FLOPs of a micro-batch by part: vision (once), language forward, its backward with recomputation, the head, the
    reference pass.

    A product [a, b] @ [b, c] counts 2abc. Attention counts what sdpa with a mask computes (all T x T scores).
    """
    q = shape.heads * shape.head_dim
    attention = shape.attending * 4 * w.tokens**2 / w.rows * q
    forward = _FLOPS_FORWARD * shape.matrices * w.tokens + attention
    rank = w.lora_rank if w.training != "full" else 0
    adapters = _FLOPS_FORWARD * shape.lora_parameters(rank) * w.tokens if rank else 0.0
    # backward: gradients of activations (as forward; attention twice) and of the weights that train
    weights = _FLOPS_FORWARD * shape.matrices * w.tokens if w.training == "full" else adapters
    backward = forward + attention + adapters + weights
    recompute = (forward + adapters) * checkpointed_layers(shape, w) / shape.layers
    head = _FLOPS_FORWARD * shape.head_parameters * w.scored
    head_backward = head * (2 if w.training == "full" else 1)
    reference = 0.0 if w.reference_cached else forward + head
    return {
        "vision": _vision_flops(shape, w),
        "forward": forward + adapters,
        "backward": backward,
        "recompute": recompute,
        "head": head + head_backward,
        "reference": reference,
    }


def _vision_flops(shape: ModelShape, w: Workload) -> float:
    patches = w.groups * w.image_tokens * shape.merge**2
    if not patches:
        return 0.0
    d, f, m = shape.vision_hidden, shape.vision_intermediate, shape.vision_hidden * shape.merge**2
    layer = 4 * d * d + (3 if shape.vision_gated else 2) * d * f
    per_image = patches / w.groups
    # Windowed towers attend to everything in four layers only
    seen = per_image if shape.vision_window is None else (shape.vision_window / shape.patch) ** 2
    dense_layers = shape.vision_layers if shape.vision_window is None else min(4, shape.vision_layers)
    scores = dense_layers * per_image + (shape.vision_layers - dense_layers) * min(seen, per_image)
    merger = (m * m + m * shape.hidden) * patches / shape.merge**2
    return (
        2.0 * (shape.vision_layers * layer * patches + merger + 3 * 2 * shape.patch**2 * d * patches)
        + 4.0 * d * patches * scores
    )


def choose(shape: ModelShape, workload: Workload, *, gpus: int, memory: float) -> tuple[Plan | None, list[Plan]]:
    """The first engine that fits with a margin, from the fastest to the most frugal, or where none does the one that
    fits with the largest; and the plans of all engines for that number of GPUs."""
    engines: list[Engine] = ["ddp"] if gpus == 1 else list(ENGINES)
    if gpus == 1 and workload.training == "full":
        engines.append("zero3_offload")
    plans = [estimate(shape, workload, engine=engine, gpus=gpus, memory=memory) for engine in engines]
    fitting = [p for p in plans if p.fits]
    easy = next((p for p in fitting if not p.tight), None)
    return easy or max(fitting, key=lambda p: p.spare, default=None), plans


def parse_memory(text: str) -> float:
    """Bytes of `80GB`, `24GiB` or `16000MB`.

    Raises:
        ValueError: not a positive number with a unit.
    """
    units = {"GIB": 2**30, "GB": 1e9, "MIB": 2**20, "MB": 1e6}
    upper = text.strip().upper()
    for unit, size in units.items():
        if upper.endswith(unit):
            try:
                number = float(upper[: -len(unit)])
            except ValueError:
                break
            if 0 < number < float("inf"):
                return number * size
            break
    raise ValueError(f"memory must look like 80GB or 24GiB, not {text!r}.")


def load_shape(model: str) -> ModelShape:
    """The shape of a known name, a model type of transformers (its default config), or a directory or hub name with a
    config.json. The hub is asked only where the cache lacks the config and the network answers.

    Raises:
        ValueError: the config builds no image-text model that silkie can train.
        OSError: no such model.
    """
    key = Path(model).name.lower().removesuffix("-instruct")
    if not Path(model).exists() and key in SHAPES:
        return SHAPES[key]
    say(f"building {model} without weights ...")
    from transformers import CONFIG_MAPPING, AutoConfig

    if not Path(model).exists() and model in CONFIG_MAPPING:
        return _default_shape(model)
    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True)
    except OSError:
        if Path(model).exists() or not _hub_answers():
            raise
        config = AutoConfig.from_pretrained(model)
    return shape_of(config)


def _default_shape(model_type: str) -> ModelShape:
    """The shape of a type's default config, which is that of a published model, or of none.

    Raises:
        ValueError: the default builds no model that silkie can train.
    """
    from silkie.model.tiny import whole_config

    remedy = (
        f" That is transformers' default config of the type {model_type!r}: name a directory or a hub name instead."
    )
    return shape_of(whole_config(model_type), remedy=remedy)


def _hub_answers(seconds: float = 2.0) -> bool:
    """Whether the hub can be reached at all; its own client would try for a minute. A proxy is left to the client."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=seconds).close()
    except OSError:
        return False
    return True
