"""What is settled before TRL's `DPOTrainer.__init__` runs: arguments, processor, adapter, reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoConfig, PretrainedConfig, ProcessorMixin

from silkie.config import SilkieDPOConfig
from silkie.model.adapters import with_default_targets
from silkie.model.families import causal_lm
from silkie.model.processor import load_processor, looks_local
from silkie.model.vision import freeze_vision
from silkie.model.weights import refuse_pickled
from silkie.training import guards
from silkie.training.output_dir import check_free


def check_arguments(args: Any, train_dataset: Any) -> None:
    """The arguments that silkie cannot do without, and a directory that the run can write to.

    Raises:
        TypeError: `args` is not a `SilkieDPOConfig`.
        ValueError: there is no training data.
        silkie.training.checkpoints.CheckpointError: `output_dir` cannot be written, or another run holds it.
    """
    if not isinstance(args, SilkieDPOConfig):
        raise TypeError(
            f"args must be a SilkieDPOConfig, not {type(args).__name__}: `from silkie import SilkieDPOConfig`."
        )
    if train_dataset is None:
        raise ValueError(
            "`train_dataset` is required: preference groups from silkie.data.load_preferences, or TRL pair rows."
        )
    if args.process_index == 0:
        check_free(str(args.output_dir))


def config_and_processor(model: Any, processor: Any, args: SilkieDPOConfig) -> tuple[Any, Any]:
    """The model's config, and its processor: the given one, or the one of its directory or hub name.

    Raises:
        silkie.model.weights.PickledWeights: the directory's weights are pickled.
        FileNotFoundError: `model` looks like a directory and is none.
        ValueError: there is no processor, and no name to load one from.
        TypeError: `processor` is a tokenizer or something else.
    """
    if isinstance(model, str):
        if looks_local(model) and not Path(model).is_dir():
            raise FileNotFoundError(
                f"{model} is not a directory. Expected a model directory, or a hub name like 'org/name'."
            )
        revision = (args.model_init_kwargs or {}).get("revision") if isinstance(args.model_init_kwargs, dict) else None
        refuse_pickled(model)
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=args.trust_remote_code)
        name = model
    else:
        config, revision = causal_lm(model).config, None
        name = config._name_or_path
    if processor is None:
        if not name:
            raise ValueError(
                "The model was not loaded from a directory or hub name; pass its processor as `processing_class`."
            )
        processor = load_processor(
            name, trust_remote_code=args.trust_remote_code, **({"revision": revision} if revision else {})
        )
    if not isinstance(processor, ProcessorMixin):
        raise TypeError(
            "processing_class must be the model's processor (image processor + tokenizer), not"
            f" {type(processor).__name__}."
        )
    return config, processor


def choose_trained_parts(
    model: Any, peft_config: PeftConfig | None, config: PretrainedConfig, args: SilkieDPOConfig
) -> PeftConfig | None:
    """The adapter config with its targets filled in. A model that is trained in full has its vision tower frozen here,
    if the options say so; which parameters of a given PeftModel train is the caller's choice."""
    if peft_config is not None:
        guards.check_adapter_kind(peft_config)
        return with_default_targets(peft_config, config if isinstance(model, str) else model)
    if isinstance(model, PeftModel):
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
    if not (peft_config or isinstance(model, PeftModel) or config._name_or_path):
        raise ValueError(
            "Full fine-tuning needs a reference, and this model names no directory to load one from: pass"
            " `ref_model`, or train a LoRA adapter with `peft_config`."
        )
    if not (peft_config or isinstance(model, PeftModel)):
        refuse_pickled(config._name_or_path)  # TRL loads the reference from there


@contextmanager
def trl_init(args: SilkieDPOConfig, model: Any) -> Iterator[None]:
    """Within the context, TRL's `__init__` accepts what silkie does by itself (precomputing reference log-probs with
    images, an adapter on the output head), and loads a model that is named from safetensors only."""
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


def refuse_collation(rows: Any) -> Any:
    """Placeholder until the model is loaded; the real collator needs its position rule."""
    raise RuntimeError("the collator is not set up yet")
