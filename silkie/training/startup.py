"""What is settled before TRL's `DPOTrainer.__init__` runs: arguments, processor, adapter, reference."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from trl import DPOConfig, KTOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference, DataCollatorForVisionPreference

from silkie.config import SilkieDPOConfig
from silkie.model.adapters import names_no_targets, peft_targets, with_default_targets
from silkie.model.families import causal_lm, loaded_from, reads_images
from silkie.model.processor import load_processor, looks_local
from silkie.model.vision import freeze_vision
from silkie.model.weights import refuse_pickled
from silkie.training import guards
from silkie.training.output_dir import check_free

logger = logging.getLogger(__name__)

TRL_COLLATORS = (DataCollatorForPreference, DataCollatorForVisionPreference)  # not what is derived from them


def settle_arguments(args: Any, model: Any, data_collator: Any, train_dataset: Any) -> SilkieDPOConfig:
    """The options of the run: those given, TRL's converted, or, without any, the defaults with TRL's output directory.

    Raises:
        TypeError: `args` is no config of silkie or TRL.
        ValueError: there is no training data, or a collator is given.
        silkie.training.checkpoints.CheckpointError: `output_dir` cannot be written, or another run holds it.
    """
    if data_collator is not None and type(data_collator) not in TRL_COLLATORS:
        raise ValueError(
            "`data_collator` is not supported: silkie packs preference groups with its own, silkie.batch.collator."
            "GroupCollator. Shape the rows with `Dataset.map` or `with_transform` instead; `max_length`,"
            " `chat_template_kwargs` and `pad_token` are options."
        )
    if args is None:
        name = model if isinstance(model, str) else loaded_from(causal_lm(model).config)
        args = SilkieDPOConfig(output_dir=f"{(name or type(causal_lm(model)).__name__).split('/')[-1]}-DPO")
    if not isinstance(args, SilkieDPOConfig):
        if not isinstance(args, (DPOConfig, KTOConfig)):
            raise TypeError(
                f"args must be a SilkieDPOConfig or TRL's DPOConfig, not {type(args).__name__}: `from silkie import"
                " SilkieDPOConfig`."
            )
        given, args = type(args).__name__, SilkieDPOConfig.from_trl(args)
        logger.info(
            "args is TRL's %s: taken over with all its values (max_length=%s: response tails are cut, prompts"
            " never; full fine-tuning trains the vision tower); silkie's own options have their defaults, and a"
            " non-finite loss stops the run",
            given,
            args.max_length,
        )
    if data_collator is not None:
        args = with_collator_options(args, data_collator)
    if not args.log_token_stats:
        logger.info("log_token_stats=True also logs entropy, mean_token_accuracy and logits/*, as TRL does")
    if train_dataset is None:
        raise ValueError(
            "`train_dataset` is required: preference groups from silkie.data.load_preferences, or TRL pair rows."
        )
    if isinstance(train_dataset, IterableDataset) and args.workers_by_machine and args.dataloader_num_workers:
        args = replaced(args, dataloader_num_workers=0)
        logger.info("dataloader_num_workers=0 for a stream: each worker would read all of it")
    if args.process_index == 0:
        check_free(str(args.output_dir))
    return args


def with_collator_options(args: SilkieDPOConfig, collator: Any) -> SilkieDPOConfig:
    """The options of a run to which one of TRL's own collators is given: what it says of lengths. silkie's own
    collator does the rest.

    Raises:
        ValueError: it cuts the beginning of rows.
    """
    if getattr(collator, "truncation_mode", "keep_start") != "keep_start" and collator.max_length is not None:
        raise ValueError(
            f"`data_collator` has truncation_mode={collator.truncation_mode!r}: response tails are cut, prompts never."
        )
    logger.info(
        "data_collator is TRL's %s: its max_length=%s and pad_to_multiple_of=%s are taken over; silkie's own collator"
        " makes the batches",
        type(collator).__name__,
        collator.max_length,
        collator.pad_to_multiple_of,
    )
    return replaced(args, max_length=collator.max_length, pad_to_multiple_of=collator.pad_to_multiple_of)


def replaced(args: SilkieDPOConfig, **options: Any) -> SilkieDPOConfig:
    """A copy of the options with other values; the given ones stay as they are. Not `dataclasses.replace`, which would
    derive the device and the like anew."""
    other = copy.copy(args)
    for name, value in options.items():
        setattr(other, name, value)
    return other


def config_and_processor(model: Any, processor: Any, args: SilkieDPOConfig) -> tuple[Any, Any]:
    """The model's config, and its processor: the given one, or the one of its directory or hub name.

    Raises:
        silkie.model.weights.PickledWeights: the directory's weights are pickled.
        FileNotFoundError: `model` looks like a directory and is none.
        ValueError: there is no processor, and no name to load one from.
        TypeError: `processor` is neither a processor nor a tokenizer.
    """
    if isinstance(model, str):
        if looks_local(model) and not Path(model).is_dir():
            raise FileNotFoundError(
                f"{model} is not a directory. Expected a model directory, or a hub name like 'org/name'."
            )
        revision = _revision(args)
        # Before the config and the processor are read: nothing of an unsafe directory is loaded.
        refuse_pickled(model)
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=args.trust_remote_code)
        name = model
    else:
        config, revision = causal_lm(model).config, None
        name = loaded_from(config)
    if processor is None:
        if not name:
            raise ValueError(
                "The model was not loaded from a directory or hub name; pass its processor as `processing_class`."
            )
        load = load_processor if reads_images(config) else AutoTokenizer.from_pretrained
        processor = load(name, trust_remote_code=args.trust_remote_code, **({"revision": revision} if revision else {}))
    if not isinstance(processor, (ProcessorMixin, PreTrainedTokenizerBase)):
        raise TypeError(
            "processing_class must be the model's processor (image processor + tokenizer), or the tokenizer of a"
            f" language model, not {type(processor).__name__}."
        )
    set_pad_token(getattr(processor, "tokenizer", processor), args.pad_token)
    return config, processor


def _revision(args: SilkieDPOConfig) -> str | None:
    """Of the model that is loaded by name; None: the main one."""
    return args.model_init_kwargs.get("revision") if isinstance(args.model_init_kwargs, dict) else None


def set_pad_token(tokenizer: Any, token: str | None) -> None:
    """Sets the padding token: `token`, or where that is None the tokenizer's own, or its end token.

    Raises:
        ValueError: the vocabulary has no such token.
    """
    token = token or tokenizer.pad_token or tokenizer.eos_token
    if token not in tokenizer.get_vocab():
        raise ValueError(
            f"`pad_token` {token!r} is not found in the vocabulary of {type(tokenizer).__name__}: choose a token that"
            " exists there, or leave it out."
        )
    tokenizer.pad_token = token


def choose_trained_parts(
    model: Any, peft_config: PeftConfig | None, config: PretrainedConfig, args: SilkieDPOConfig
) -> PeftConfig | None:
    """The adapter config with its targets and the base model's revision filled in. A model that is trained in full has
    its vision tower frozen here, if the options say so; which parameters of a given PeftModel train is the caller's
    choice."""
    if peft_config is not None:
        guards.check_adapter_kind(peft_config)
        chosen: Any = with_default_targets(peft_config, config if isinstance(model, str) else model)
        if chosen is not peft_config:
            experts = " and experts" if chosen.target_parameters else ""
            logger.info("LoRA targets: the linear layers%s of the language model", experts)
        elif names_no_targets(peft_config):
            logger.info("LoRA targets: peft's own, as in TRL: %s", ", ".join(peft_targets(config.model_type)))
        revision = _revision(args) if isinstance(model, str) else None
        if revision in (None, "main"):
            return chosen
        chosen = copy.copy(chosen)
        chosen.revision = revision  # peft writes the name only, at which another revision may be found
        return chosen
    if isinstance(model, PeftModel):
        guards.check_adapter_name(model)
        guards.check_adapter_kind(model.active_peft_config)
    elif args.freeze_vision and not isinstance(model, str):
        freeze_vision(model)
    return None


def check_own_reference(model: Any, peft_config: PeftConfig | None, config: PretrainedConfig) -> None:
    """Where no reference model is given: can there be a reference?

    Raises:
        silkie.training.guards.LaunchError: the adapter's initialisation changes the base weights.
        silkie.model.weights.PickledWeights: that directory has pickled weights only.
        ValueError: full fine-tuning of a model that no directory holds a copy of.
    """
    guards.check_adapter_init(peft_config)
    if not (peft_config or isinstance(model, PeftModel) or loaded_from(config)):
        raise ValueError(
            "Full fine-tuning needs a reference, and this model names no directory to load one from: pass"
            " `ref_model`, or train a LoRA adapter with `peft_config`."
        )
    if not (peft_config or isinstance(model, PeftModel)):
        refuse_pickled(loaded_from(config))  # TRL loads the reference from there


@contextmanager
def trl_init(args: SilkieDPOConfig, model: Any) -> Iterator[None]:
    """Within the context, TRL's `__init__` accepts what silkie does by itself (precomputing reference log-probs with
    images, an adapter on the output head), and loads a model that is named from safetensors only."""
    # TRL refuses it with images, and would run its own pass; silkie's runs in `SilkieDPOTrainer.begin`.
    precompute, args.precompute_ref_log_probs = args.precompute_ref_log_probs, False
    options = args.model_init_kwargs
    if isinstance(model, str):
        assert not isinstance(options, str)  # TRL has parsed it
        args.model_init_kwargs = {**(options or {}), "use_safetensors": True}
    try:
        with _head_without_adapter():
            yield
    finally:
        args.precompute_ref_log_probs, args.model_init_kwargs = precompute, options


@contextmanager
def _head_without_adapter() -> Iterator[None]:
    """Within the context a PeftModel shows its head without the adapter: TRL refuses an adapter there because its own
    log-probs would ignore it; silkie's do not."""

    def plain_head(model: PeftModel) -> Any:
        head = causal_lm(model).get_output_embeddings()
        return head.get_base_layer() if hasattr(head, "get_base_layer") else head

    PeftModel.get_output_embeddings = plain_head  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del PeftModel.get_output_embeddings  # type: ignore[attr-defined]


def a_micro_batch(dataset: Dataset, args: SilkieDPOConfig) -> list[tuple[int, list[int]]]:
    """Prompt length and response lengths of the first groups of a prepared dataset, as many as a micro-batch has."""
    room = args.max_tokens_per_batch
    groups: list[tuple[int, list[int]]] = []
    few = dataset.select(range(min(len(dataset), 64 if room else args.per_device_train_batch_size)))
    for prompt, responses in zip(few["prompt_length"], few["response_lengths"], strict=True):
        if groups and room is not None and prompt + sum(responses) > room:
            break
        groups.append((prompt, responses))
        room = None if room is None else room - prompt - sum(responses)
    return groups


def refuse_collation(rows: Any) -> Any:
    """Placeholder until the model is loaded; the real collator needs its position rule."""
    raise RuntimeError("the collator is not set up yet")
