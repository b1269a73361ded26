"""Checks that turn silent failures of a run into clear errors: launch, adapters, mixed precision."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Any

from accelerate.utils import DistributedType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.parallel import DistributedDataParallel

from silkie.model.families import causal_lm
from silkie.model.logits import gives_router_loss
from silkie.model.vision import vision_parts

logger = logging.getLogger(__name__)


class LaunchError(RuntimeError):
    """The launcher and the training process disagree."""


def check_launch(args: Any) -> None:
    """Checks, before anything is loaded, that this process will train together with the others.

    Raises:
        LaunchError: several processes were launched but this one would train alone.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    # WORLD_SIZE is the launcher's word, args.world_size accelerate's: where they differ every process believes that it
    # is the only one.
    if launched > 1 and args.world_size == 1:
        raise LaunchError(
            f"The launcher started {launched} processes, but accelerate reports one: each would train alone on all the"
            " data. On a machine without GPUs pass `--use_cpu` to the script and launch with `--multi_gpu`."
        )


def check_process_count(args: Any, accelerator: Any) -> None:
    """Checks, once accelerate has chosen its backend, that it runs what the launcher asked for.

    Raises:
        LaunchError: accelerate runs fewer processes than the launcher started, or ignores the DeepSpeed or FSDP config.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise LaunchError(f"The launcher started {launched} processes, accelerate reports {accelerator.num_processes}.")
    runs = accelerator.distributed_type
    for variable, wanted in (
        ("ACCELERATE_USE_DEEPSPEED", DistributedType.DEEPSPEED),
        ("ACCELERATE_USE_FSDP", DistributedType.FSDP),
    ):
        if os.environ.get(variable, "false").lower() == "true" and runs != wanted:
            raise LaunchError(
                f"The launcher asked for {wanted.value}, but accelerate runs {runs.value}: the config would be ignored"
                " in silence. FSDP needs GPUs. DeepSpeed on CPU needs the script's `--use_cpu`, not the variable"
                " ACCELERATE_USE_CPU."
            )


def check_optimizer(args: Any, accelerator: Any) -> None:
    """Refuses bitsandbytes' optimizers under FSDP: they cannot update sharded tensors.

    Raises:
        LaunchError: FSDP, and an 8-bit or paged optimizer.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if accelerator.distributed_type == DistributedType.FSDP and ("8bit" in name or "paged" in name):
        raise LaunchError(
            f"optim={name!r} does not run under FSDP2. Use adamw_torch_fused (its states are sharded), or ZeRO-2/3 or"
            " DDP."
        )


def check_adapter_dtypes(model: Any, deepspeed: bool) -> None:
    """Refuses parameters of several dtypes under ZeRO-3, which gathers them into one buffer.

    Raises:
        LaunchError: there are several.
    """
    partitioned = [p for p in model.parameters() if hasattr(p, "ds_id")] if deepspeed else []
    dtypes = {p.dtype for p in partitioned if p.dtype.is_floating_point}
    if len(dtypes) > 1:
        raise LaunchError(
            f"ZeRO-3 with parameters of several dtypes ({', '.join(sorted(map(str, dtypes)))}) fails at the first step."
            " Load the model in one dtype and add the adapter with `autocast_adapter_dtype=False` (passing"
            " `peft_config` to the trainer does both)."
        )


def check_adapter_kind(config: Any) -> None:
    """Refuses prompt tuning and similar adapters: their virtual tokens in front of a row would shift every position and
    mask that silkie makes.

    Raises:
        ValueError: the adapter is one of them.
    """
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(
            f"{type(config).__name__} puts virtual tokens in front of the prompt, which silkie does not support: use"
            " LoRA."
        )


def check_adapter_init(config: Any) -> None:
    """Refuses initialisations that change the base weights: the reference is the policy with its adapter off, so the
    base must be unchanged and the adapter must start without effect.

    Raises:
        LaunchError: an initialisation that moves part of the base weights into the adapter.
    """
    init = str(getattr(config, "init_lora_weights", "")).lower()
    if init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise LaunchError(
            f"init_lora_weights={config.init_lora_weights!r} changes the base weights: the model with its adapter off"
            " is not the one that training starts from, and cannot be its reference. Pass that model as `ref_model`,"
            " or use the default initialisation."
        )


def check_something_trains(model: Any) -> None:
    """Refuses a model without a parameter that trains: its loss would be logged, and nothing would change.

    Raises:
        LaunchError: there is none.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise LaunchError(
            "No parameter of the model trains: all have requires_grad=False. An adapter config with"
            " inference_mode=True, or PeftModel.from_pretrained without is_trainable=True, freezes the adapter."
        )


def check_adapter_name(model: Any) -> None:
    """TRL copies the adapter named "default" as the reference of a PeftModel.

    Raises:
        LaunchError: it has none of that name.
    """
    if "default" not in model.peft_config:
        raise LaunchError(
            f"The PeftModel has the adapter(s) {', '.join(model.peft_config)}, and the one that is trained must be"
            " named 'default': leave adapter_name out where it is made or loaded."
        )


def needs_dummy_image(accelerator: Any, frozen_vision: bool) -> bool:
    """Whether a micro-batch without images must still run the vision tower: with sharded or synchronised vision
    weights, a rank that skips it makes the others wait forever."""
    if accelerator.num_processes == 1:
        return False
    sharded = accelerator.distributed_type == DistributedType.FSDP or (
        accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.deepspeed_plugin.zero_stage == 3
    )
    return sharded or not frozen_vision


def keep_trainable_4bit(model: Any) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights for inference. On a CPU with AVX512-BF16 it does so the first
    time a weight is used in eval mode (by the self-test or the reference) and never undoes it: later training steps
    would get no gradient through that weight."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def keep_fp32_outputs(accelerator: Any) -> None:
    """Keeps log-probs in fp32 under FSDP2: accelerate makes it cast the output of every module to bf16, and here the
    output head returns log-probs."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def keep_passes_alone(wrapped: Any, args: Any) -> None:
    """Keeps DDP from broadcasting buffers at the start of a forward pass, unless that is asked for: a rank that runs
    out of memory could not repeat the pass, since no other rank would join its second broadcast. The ranks' buffers are
    equal without it: DDP has made them so when it wrapped the model."""
    if isinstance(wrapped, DistributedDataParallel) and args.ddp_broadcast_buffers is None:
        wrapped.broadcast_buffers = False


def has_router_loss(model: Any, args: Any) -> bool:
    """Whether the model's forward returns the load balancing loss that TRL's rule asks of it: `router_aux_loss_coef`,
    or the model's own coefficient where that is None.

    Raises:
        LaunchError: it does not, and the option asks for it.
    """
    if gives_router_loss(model):
        return True
    name = type(causal_lm(model)).__name__
    if args.router_aux_loss_coef:
        raise LaunchError(
            f"router_aux_loss_coef={args.router_aux_loss_coef:g}, but {name} returns no load balancing loss for its"
            " routers: set router_aux_loss_coef=0."
        )
    logger.warning(
        "%s has a coefficient for a load balancing loss of its routers, but its forward returns none: training without"
        " it. router_aux_loss_coef=0 turns this warning off",
        name,
    )
    return False


def check_adapter_on_vision(model: Any) -> None:
    """An adapter on the parts that make features must train: a run with a frozen tower shares the tower's features
    between policy and reference, and no gradient reaches it.

    Raises:
        LaunchError: the active adapter is on such a part and frozen there.
    """
    dead = []
    for part, module in vision_parts(model):
        layers: list[Any] = [m for m in getattr(module, "modules", list)() if isinstance(m, BaseTunerLayer)]
        for layer in layers:
            own = [p for n, p in layer.named_parameters() if any(f".{a}." in f".{n}." for a in layer.active_adapters)]
            if own and not any(p.requires_grad for p in own):
                dead.append(part)
    if dead:
        raise LaunchError(
            f"{len(dead)} layers of {', '.join(sorted(set(dead)))} have an adapter that does not train: leave them"
            " out of the adapter with exclude_modules, or let its parameters there require gradients."
        )


def warn_of_untrained_vision(model: Any, args: Any, *, default_targets: bool) -> None:
    """`freeze_vision=False` with silkie's default adapter, which is on the language model only."""
    if default_targets and not args.freeze_vision:
        parts = ", ".join(name for name, _ in vision_parts(model))
        logger.warning(
            "freeze_vision=False, but the default LoRA adapter is on the language model only: %s stay as they are. Name"
            " their layers in the adapter's target_modules, or the parts in its modules_to_save, to train them",
            parts,
        )
