"""`gradient_checkpointing="auto"`: how many layers a run has to checkpoint, by the planner's memory model.

Checkpointing computes a layer's forward pass twice, a quarter to a third of a step. Where the activations of the
largest micro-batch fit, that is paid for nothing."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import psutil  # comes with accelerate
import torch

from silkie.io.control_groups import memory_left
from silkie.model.checkpointing import checkpoint_first, checkpointable_layers
from silkie.model.families import attention_implementation, causal_lm
from silkie.plan.memory import estimate, size
from silkie.plan.shapes import ModelShape, shape_of
from silkie.plan.workload import engine_of, largest_workload

if TYPE_CHECKING:
    from silkie.trainer import SilkieDPOTrainer

logger = logging.getLogger(__name__)

# Share of the free memory that a run may plan with: estimates are within a quarter of what was measured, and processes
# that share a machine's memory grow.
_SHARE = {"cuda": 0.85, "cpu": 0.5}


@dataclass(slots=True)
class Checkpointing:
    """The checkpointed layers of a run.

    Attributes:
        layers, of: the first `layers` of the language model's `of` layers.
        reason: why so many.
        fixed: they cannot be changed during the run: other processes take part in its forward passes.
    """

    layers: int
    of: int
    reason: str
    fixed: bool = False

    def __str__(self) -> str:
        which = {0: "no layer", self.of: "every layer"}.get(self.layers, f"the first {self.layers} of {self.of} layers")
        return f"gradient checkpointing: {which} (auto): {self.reason}"

    def add(self, model: Any) -> bool:
        """Checkpoints half of the layers that are not yet. After the device ran out of memory in a forward pass, which
        has changed nothing: the pass can then be run again. Returns whether there was a layer left."""
        if self.fixed or self.layers == self.of:
            return False
        self.layers += -(-(self.of - self.layers) // 2)
        checkpoint_first(model, self.layers)
        logger.warning(
            "out of memory: now the first %d of %d layers are checkpointed, and the micro-batch runs again",
            self.layers,
            self.of,
        )
        return True


def choose_checkpointing(trainer: SilkieDPOTrainer) -> Checkpointing:
    """The fewest layers whose checkpointing lets the largest micro-batch of a run fit in the memory that is free now,
    with the weights loaded; every rank calls it. All of them where the planner cannot tell."""
    layers = len(checkpointable_layers(trainer.model))
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    obstacle, shape = _obstacle(trainer, layers)
    if obstacle or shape is None:
        return Checkpointing(layers, layers, obstacle, fixed=True)
    memory = free_memory(trainer.accelerator.device) * _SHARE[trainer.accelerator.device.type]
    on_gpu = trainer.accelerator.device.type == "cuda"
    work = largest_workload(trainer)
    gpus, engine = trainer.accelerator.num_processes, engine_of(trainer.accelerator)

    def needed(count: int) -> float:
        plan = estimate(shape, replace(work, checkpointed=count), engine=engine, gpus=gpus)
        outside = plan.weights + (0.0 if on_gpu else plan.overhead)  # a GPU's context and fragments
        again = plan.activations + plan.logits if trainer.passes.corrupted else 0.0  # a second pass with gradient
        return plan.total - outside + again

    count = next((m for m in range(layers + 1) if needed(m) <= memory), layers)
    if sharded:  # a recomputed layer is gathered again: all ranks have to do the same
        found = torch.tensor([count], device=trainer.accelerator.device)
        count = int(trainer.accelerator.gather(found).max())
    reason = (
        f"the largest micro-batch ({work.tokens:,.0f} tokens) needs {size(needed(count))} besides the weights, of"
        f" {size(memory)} that may be used"
    )
    if count:
        reason += f"; without checkpointing {size(needed(0))}"
    # of DDP, where ddp_broadcast_buffers asks for it
    broadcasts = getattr(trainer.model_wrapped, "broadcast_buffers", False)
    return Checkpointing(count, layers, f"{reason} (estimate)", fixed=sharded or broadcasts)


def _obstacle(trainer: SilkieDPOTrainer, layers: int) -> tuple[str, ModelShape | None]:
    """Why the memory of a run cannot be told, or its model's shape."""
    text = causal_lm(trainer.model).config.get_text_config()
    if not layers:
        return "the model does not tell its layers apart", None
    if trainer.accelerator.device.type not in _SHARE:
        return f"the free memory of {trainer.accelerator.device} is not known", None
    if not trainer.frozen_vision:
        return "the vision tower trains, and its activations are not planned", None
    if attention_implementation(text) == "eager":
        return "eager attention keeps its scores, which are not planned", None
    try:
        return "", shape_of(causal_lm(trainer.model).config)
    except ValueError as error:
        return str(error), None


def free_memory(device: torch.device) -> float:
    """Bytes that this process can still take: of a GPU, what is free and what PyTorch holds unused; of a machine, its
    available memory, or what its container or job has left, divided by the processes on it."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    from accelerate.state import PartialState

    processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", PartialState().num_processes)))
    return min(psutil.virtual_memory().available, memory_left()) / processes
