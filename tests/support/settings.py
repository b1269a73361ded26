"""Options that many tests train with."""

from __future__ import annotations

from typing import Any

# On the CPU, in float32, logging every step and writing no checkpoint
QUIET: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
}

# Two epochs of plain SGD: the trained adapter is a sum of gradients, so its equality is theirs
SGD: dict[str, Any] = {
    **QUIET,
    "num_train_epochs": 2,
    "learning_rate": 0.02,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1e6,
    "seed": 0,
    "gradient_checkpointing": False,
    "use_fused_logprob": False,
}
