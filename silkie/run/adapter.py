"""Training on from an adapter: the next round of an on-policy loop, or more data for a policy that was trained before.

The adapter is loaded once more as a frozen copy (TRL's adapter "ref"), which is the reference: at the first step policy
and reference are equal, and a pair's sigmoid loss is log 2. Why not fold the adapter into the weights and train a new
one over them? Quantized weights (QLoRA) cannot take it without a change, every round would need a model directory of
its own, and the result would be an adapter of that directory. A copy costs the memory of one adapter, and what is saved
stays one adapter of the original model, which a server that holds the model can load.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from trl import ModelConfig

from silkie.config import SilkieDPOConfig
from silkie.model.families import reads_images
from silkie.model.weights import refuse_pickled, refuse_pickled_adapter

__all__ = ["check_adapter", "load_adapted"]


def check_adapter(adapter: str | None, model_args: ModelConfig) -> None:
    """Before anything is loaded: do the options of a run and its adapter go together?

    Raises:
        ValueError: a new adapter is asked for as well, the model's directory holds an adapter, or the adapter was
            trained on another revision of the model.
        silkie.model.weights.PickledWeights: the adapter's weights are pickled.
    """
    name = str(model_args.model_name_or_path)
    if Path(name, "adapter_config.json").is_file():
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
        raise ValueError(
            f"{name} is an adapter, not a model. To train on from it: --model_name_or_path {base or 'ITS_MODEL'}"
            f" --adapter_name_or_path {name}."
        )
    if adapter is None:
        return
    if model_args.use_peft:
        raise ValueError(
            f"`use_peft` asks for a new adapter, and `adapter_name_or_path` names one to train on from ({adapter}):"
            " pass one of them. An adapter keeps its rank, alpha and targets."
        )
    if Path(adapter).exists() and not Path(adapter, "adapter_config.json").is_file():
        raise ValueError(f"`adapter_name_or_path`: {adapter} holds no adapter_config.json, so it is no adapter.")
    refuse_pickled_adapter(adapter)
    config = PeftConfig.from_pretrained(adapter)
    revision = config.revision if config.base_model_name_or_path == name else None
    if revision not in (None, model_args.model_revision):
        raise ValueError(
            f"`adapter_name_or_path`: {adapter} was trained on revision {revision} of {name}, and this run loads"
            f" {model_args.model_revision}: set model_revision={revision}."
        )


def load_adapted(name: str, adapter: str, args: SilkieDPOConfig, quantization: Any) -> PeftModel:
    """The model of `name` with a trainable adapter; `SilkieDPOTrainer` adds the frozen copy.

    Args:
        name, adapter: directories or hub names.
        args: `model_init_kwargs` are what the model is loaded with.
        quantization: config of bitsandbytes, or None.
    """
    refuse_pickled(name)
    options = dict(args.model_init_kwargs) if isinstance(args.model_init_kwargs, dict) else {}
    config = AutoConfig.from_pretrained(
        name, trust_remote_code=args.trust_remote_code, revision=options.get("revision")
    )
    kind: Any = AutoModelForImageTextToText if reads_images(config) else AutoModelForCausalLM
    if quantization is not None:
        options["quantization_config"] = quantization
    model = kind.from_pretrained(name, trust_remote_code=args.trust_remote_code, **options)
    plugin = args.deepspeed_plugin
    # ZeRO-3 gathers parameters into one buffer, which takes one dtype
    cast = not (plugin is not None and plugin.zero_stage == 3 and quantization is None)
    return PeftModel.from_pretrained(
        model, adapter, is_trainable=True, use_safetensors=True, autocast_adapter_dtype=cast
    )
