"""Which options of a run can work together. Everything is found before any compute is spent."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from silkie.losses import build_objective
from silkie.losses.options import validate

if TYPE_CHECKING:
    from silkie.config.options import SilkieDPOConfig

logger = logging.getLogger(__name__)


def check_own_options(config: SilkieDPOConfig) -> None:
    """silkie's own options: one of the known words, in their range, and not against each other.

    Raises:
        ValueError: one is not.
    """
    for name, allowed in _choices().items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"`{name}` must be one of {', '.join(map(str, allowed))}, not {getattr(config, name)!r}.")
    for name in _POSITIVE:
        if getattr(config, name) is not None and getattr(config, name) <= 0:
            raise ValueError(f"`{name}` must be positive or None, not {getattr(config, name)}.")
    if (config.corruption != "crop" or config.corruption_strength != 1.0) and "mdpo_image" not in config.loss_type:
        raise ValueError(f"`corruption` is read by the loss mdpo_image only; loss_type is {config.loss_type}.")
    if not 0 < config.corruption_strength <= 1:
        raise ValueError(f"`corruption_strength` must be in (0, 1], not {config.corruption_strength}.")
    if config.layout == "rows" and config.attention_backend not in ("auto", "sdpa"):
        raise ValueError(
            f"`attention_backend={config.attention_backend!r}` is read by layout='packed' only; in rows the model's"
            " own attention runs."
        )
    if config.share_prefix == "image":
        if config.layout == "rows":
            raise ValueError("`share_prefix='image'` needs layout='packed' or 'auto': in rows nothing is shared.")
        if config.max_tokens_per_batch is None and config.per_device_train_batch_size == 1:
            raise ValueError(
                "`share_prefix='image'` brings groups into one micro-batch, and per_device_train_batch_size=1 has"
                " room for one: raise it, or set max_tokens_per_batch."
            )
    if config.self_test_tolerance is not None and not 0 <= config.self_test_tolerance < float("inf"):
        raise ValueError(
            f"`self_test_tolerance` must be a finite number >= 0 or None, not {config.self_test_tolerance}."
        )


def check_trl_options(config: SilkieDPOConfig) -> None:
    """Options of TRL and transformers that silkie does not support or read: an error, or switched off with a warning
    where TRL does the same; never ignored.

    Raises:
        ValueError: one of them is set.
    """
    if config.padding_free:
        logger.warning(
            "padding_free=True is switched off, as TRL does. silkie's packed layout with"
            " attention_backend='varlen' or 'flex' is free of padding."
        )
        config.padding_free = False
    if config.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"`train_sampling_strategy={config.train_sampling_strategy!r}` is not supported: with"
            " `max_tokens_per_batch`, groups of similar length share a batch. 'random' and 'sequential' are."
        )
    if config.dataloader_drop_last and config.max_tokens_per_batch is not None:
        raise ValueError(
            "`dataloader_drop_last` has nothing to drop with `max_tokens_per_batch`, whose batches are all filled."
        )
    accelerate: Any = config.accelerator_config
    if getattr(accelerate, "dispatch_batches", False):
        logger.warning(
            "dispatch_batches=True is switched off: every rank reads its own batches, and the numbers are the same."
        )
        accelerate.dispatch_batches = False
    if getattr(accelerate, "split_batches", False) and config.world_size == 1:
        logger.info("split_batches=True is switched off: there is one process, and nothing to split")
        accelerate.split_batches = False
    if getattr(accelerate, "split_batches", False):
        raise ValueError(
            "`accelerator_config` asks for split_batches, but silkie's sampler makes whole batches for every rank:"
            " leave it off, and divide per_device_train_batch_size by the number of processes."
        )
    if config.neftune_noise_alpha is not None and config.layout != "rows":
        why = "`neftune_noise_alpha` scales its noise by a row's length, and a packed row holds several responses"
        if config.layout == "packed" or config.attention_backend not in ("auto", "sdpa"):
            raise ValueError(f"{why}: set layout='rows'.")
        logger.warning("layout='auto' runs one row per response: %s", why)
        config.layout = "rows"
    if config.include_num_input_tokens_seen not in (False, "no"):
        logger.info("num_input_tokens_seen counts tokens of packed rows; TRL, those of its rows (num_tokens)")
    if not getattr(accelerate, "use_seedable_sampler", True):
        logger.info(
            "use_seedable_sampler=False: the order of the rows depends on the seed and the epoch alone, as with"
            " True; TRL's then depends on all that has drawn random numbers before"
        )
    if config.torch_compile:
        raise ValueError(
            "`torch_compile` is not supported: the output head scores other tokens in every forward pass, which"
            " recompiles."
        )
    if not isinstance(config.chat_template_kwargs, dict | None):
        raise ValueError(
            "`chat_template_kwargs` must be a dict or its JSON text, like '{\"enable_thinking\": false}', not"
            f" {config.chat_template_kwargs!r}."
        )
    for name, (neutral, instead) in NOT_READ.items():
        if (value := getattr(config, name)) not in neutral:
            raise ValueError(f"`{name}={value!r}` has no effect in silkie; leave it at {neutral[0]!r}. {instead}")


def check_losses(config: SilkieDPOConfig) -> None:
    """The losses with their options, and what each of them needs of the run.

    Raises:
        ValueError: they do not go together.
    """
    smoothed = sorted({"sigmoid", "sigmoid_norm"} & set(config.loss_type))
    if config.label_smoothing and smoothed:
        logger.warning(
            "label_smoothing=%g smooths the loss %s here (conservative DPO); TRL ignores it for this loss",
            config.label_smoothing,
            ", ".join(smoothed),
        )
    if config.sync_ref_model and config.precompute_ref_log_probs:
        raise ValueError("`sync_ref_model` changes the reference during training; it cannot be precomputed.")
    if config.gradient_accumulation_steps * config.world_size > 1:
        logger.info(
            "the loss of an optimizer step is the mean over all its pairs%s; TRL takes the mean of the means of"
            " micro-batches, which differs where they are unequal (the last ones of an epoch%s)",
            " (sft: over all its chosen tokens)" if "sft" in config.loss_type else "",
            "; sft: always" if "sft" in config.loss_type else "",
        )
    validate(config.loss_type, config.loss_weights, config.loss_options)
    if "kto" in config.loss_type and config.precompute_ref_log_probs:
        raise ValueError(
            "`loss_type='kto'` scores responses under the prompts of their micro-batch, which are others in every"
            " epoch: its reference cannot be precomputed. apo_zero_unpaired's can."
        )
    if "kto" in config.loss_type and config.max_tokens_per_batch is None:
        check_room_for_others("per_device_train_batch_size", config.per_device_train_batch_size)
    if "kto" in config.loss_type and config.eval_strategy != "no":
        check_room_for_others("per_device_eval_batch_size", config.per_device_eval_batch_size)
    objective = build_objective(config.loss_type, config.loss_weights, config.loss_options)
    if config.sync_ref_model and not objective.needs_reference:
        raise ValueError(f"`sync_ref_model` moves a reference, and the losses {config.loss_type} read none.")


def check_room_for_others(option: str, groups: int) -> None:
    """That a micro-batch of `option` groups has room for two, as kto needs.

    Raises:
        ValueError: it has not.
    """
    if groups < 2:
        or_budget = ", or max_tokens_per_batch" if "train" in option else ""
        raise ValueError(
            "`loss_type='kto'` estimates its KL term on the responses of other prompts in the micro-batch: set"
            f" {option} to 2 or more{or_budget}. apo_zero_unpaired has none."
        )


@cache
def _choices() -> dict[str, tuple[Any, ...]]:
    """silkie's own options that take one of a few words, with the words; the losses check theirs."""
    from silkie.config.options import SilkieDPOConfig  # which imports this module

    hints = get_type_hints(SilkieDPOConfig)
    return {
        name: get_args(hints[name]) for name in SilkieDPOConfig.__annotations__ if get_origin(hints[name]) is Literal
    }


_POSITIVE = (
    "share_prefix_groups",
    "max_tokens_per_batch",
    "stream_window",
    "max_length",
    "max_response_length",
    "eval_benchmark_steps",
    "eval_benchmark_limit",
    "log_answers",
    "vision_cache_gb",
)

# Options of TRL and transformers that nothing in silkie reads -> (values that ask for nothing, what silkie does).
NOT_READ: dict[str, tuple[tuple[Any, ...], str]] = {
    "truncation_mode": (("keep_start",), "Response tails are cut, prompts never."),
    "label_smoothing_factor": ((0.0,), "It smooths the labels of a cross-entropy; `label_smoothing` is DPO's."),
}
