"""What a run is: its data, order, base model, processor, trained part, reference, losses and optimizer, in a form that
a checkpoint keeps and a later start compares with.

Cheap by design: all texts are hashed, but images and weights only in samples. So it does not see an image that changed
in a group between the sampled ones (unless its file name changed too), nor weights that differ at no sampled value, nor
the values of quantised weights (their embeddings, norms and vision tower are seen).

Legend: G groups.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from peft import PeftModel
from torch import Tensor

from silkie.batch.encoding import GroupEncoder
from silkie.config import SilkieDPOConfig
from silkie.data.images import read_bytes
from silkie.data.schema import ROW_FORM
from silkie.model.families import causal_lm
from silkie.training.reference import REFERENCE_ADAPTER, Reference

Identity = dict[str, dict[str, Any]]  # part of the run -> what is known of it: JSON values, hashes of long ones

SAMPLED_GROUPS = 256  # whose images are read
SAMPLED_VALUES = 64  # of every weight
LENGTH = "length"  # the one part that may change: a finished run is trained longer by resuming it
_TEXTS = ("prompt", "responses", "pairs", "pair_weights", "labels", "ratings", *ROW_FORM)
_NOT_THE_MODEL = {  # where it lies, how it was saved, how it runs
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
    "_attn_implementation_autoset",
    "attn_implementation",
}
_NOT_THE_ADAPTER = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"}
_OPTIMIZER = (
    "optim",
    "optim_args",
    "optim_target_modules",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",
    "bf16",
    "fp16",
)
_LOSSES = ("loss_type", "loss_weights", "corruption", "corruption_strength", "sync_ref_model")
_USUAL_ORDER = {"train_sampling_strategy": "random", "dataloader_drop_last": False, "share_prefix": "off"}
# options of the loss and of the pass that it is taken from, looked at where they are set: see `_unusual`
_USUAL_PASS = {"router_aux_loss_coef": None, "neftune_noise_alpha": None, "disable_dropout": True}
_MOVING_REFERENCE = ("ref_model_mixup_alpha", "ref_model_sync_steps")


def differences(now: Identity, before: Identity) -> list[str]:
    """What differs between two runs, one line each: "losses: beta is 0.2, was 0.1".

    Parts that one of them lacks are not compared: a checkpoint of another version of silkie may know less or more.
    """
    lines = []
    for part in (part for part in now if part in before and isinstance(before[part], Mapping)):
        for name in sorted({*now[part], *before[part]}):
            new, old = now[part].get(name), before[part].get(name)
            if new != old:
                lines.append(f"{part}: {name} {_change(new, old)}")
    return lines


def _change(new: Any, old: Any) -> str:
    if _is_hash(new) or _is_hash(old):
        return "changed"
    return f"is {_short(new)}, was {_short(old)}"


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("hash:")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(slots=True, frozen=True)
class Start:
    """What a run starts from, looked at before training changes it.

    Attributes:
        model, trained, reference: from `describe_base`, `describe_trained`, `describe_reference`.
        optimizer: of an optimizer that the caller built; empty where the options build it.
        processes: of the run.
    """

    model: Mapping[str, Any]
    trained: Mapping[str, Any]
    reference: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    processes: int

    @classmethod
    def of(cls, model: Any, reference: Reference | None, optimizer: Any, processes: int) -> Start:
        """Looks at a model as it is now."""
        given = {"given": type(optimizer).__name__, **_flat(optimizer.defaults, "given.")} if optimizer else {}
        return cls(
            describe_base(model, processes), describe_trained(model), describe_reference(reference), given, processes
        )


def identify(start: Start, data: Dataset, encoder: GroupEncoder, args: SilkieDPOConfig) -> Identity:
    """The identity of a run that trains on `data`, the prepared groups, with the options `args`."""
    moving = _options(args, _MOVING_REFERENCE) if args.sync_ref_model else {}
    parts = {
        "data": describe_data(data),
        "order": _order(args, start.processes),
        "base model": start.model,
        "processor": {name: _hash(value) for name, value in encoder.facts().items()},
        "trained": start.trained,
        "reference": start.reference,
        "losses": {**asdict(args.loss_options), **_options(args, _LOSSES), **_unusual(args, _USUAL_PASS), **moving},
        "optimizer": {**_options(args, _OPTIMIZER), **start.optimizer},
        LENGTH: _options(args, ("num_train_epochs", "max_steps")),
    }
    return json.loads(json.dumps(parts, default=_json_ready))


def _options(args: SilkieDPOConfig, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _unusual(args: SilkieDPOConfig, usual: Mapping[str, Any]) -> dict[str, Any]:
    """Options whose value is not the usual one: a checkpoint that was written before they were looked at lacks them."""
    return {name: getattr(args, name) for name, value in usual.items() if getattr(args, name) != value}


def _order(args: SilkieDPOConfig, processes: int) -> dict[str, Any]:
    """What decides which groups share an optimizer step: any split of a step over processes is the same run."""
    batches = processes * args.gradient_accumulation_steps
    size = (
        {"batches_per_step": batches, "max_tokens_per_batch": args.max_tokens_per_batch}
        if args.max_tokens_per_batch
        else {"groups_per_step": batches * args.per_device_train_batch_size}
    )
    changed = _unusual(args, _USUAL_ORDER)
    if args.share_prefix != "off":
        changed["share_prefix_groups"] = args.share_prefix_groups
    return {"seed": args.seed, "data_seed": args.data_seed, **size, **changed}


def describe_data(data: Dataset) -> dict[str, Any]:
    """Number of groups, hash of all their texts in order, and hash of the sampled images and of all names of images."""
    texts = data.select_columns([name for name in _TEXTS if name in data.column_names])
    digest = hashlib.blake2b(digest_size=16)
    for batch in texts.iter(1000):
        digest.update(json.dumps(batch, sort_keys=True, default=_json_ready).encode())
    return {"groups": len(data), "content": f"hash:{digest.hexdigest()}", "images": _images(data)}


def _images(data: Dataset) -> str:
    if "images" not in data.column_names:
        return ""
    column = data.select_columns(["images"])
    digest = hashlib.blake2b(digest_size=16)
    embedded = False
    for i in np.unique(np.linspace(0, len(data) - 1, min(len(data), SAMPLED_GROUPS)).astype(int)).tolist():
        for image in column[i]["images"] or []:
            embedded |= not isinstance(image, Mapping) or image.get("bytes") is not None
            digest.update(hashlib.blake2b(_encoded(image), digest_size=16).digest())
    if not embedded:  # reading the column is cheap: it holds no bytes
        for batch in column.iter(1000):
            names = [[posixpath.basename(str(i["path"]).split("::")[0]) for i in own or []] for own in batch["images"]]
            digest.update(json.dumps(names).encode())
    return f"hash:{digest.hexdigest()}"


def _encoded(image: Any) -> bytes:
    if hasattr(image, "tobytes"):  # a decoded PIL image
        return f"{image.mode}{image.size}".encode() + image.tobytes()
    return read_bytes(image)


def describe_base(model: Any, processes: int) -> dict[str, Any]:
    """The base model: its config, its dtype and a sample of its weights, without any adapter.

    Args:
        processes: named with the sample of a ZeRO-3 model, of which a process sees its share only.
    """
    base = causal_lm(model)
    names = _adapter_names(model)
    weights = [(name, p) for name, p in model.named_parameters() if not _of_adapter(name, names)]
    sharded = any(hasattr(p, "ds_tensor") for _, p in weights)
    key = f"weights (share of {processes} processes)" if sharded else "weights"
    config = _flat({k: v for k, v in base.config.to_dict().items() if k not in _NOT_THE_MODEL})
    return {
        "class": type(base).__name__,
        "dtype": str(base.dtype),
        key: sample((_plain_name(name), p) for name, p in weights),
        **{f"config.{name}": value for name, value in config.items()},
    }


def describe_trained(model: Any) -> dict[str, Any]:
    """What is trained: the configs of the adapters, or the whole model; and how many numbers."""
    numbers = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    if not isinstance(model, PeftModel):
        return {"what": "the whole model", "numbers": numbers}
    facts: dict[str, Any] = {"what": "an adapter", "numbers": numbers}
    for name, config in model.peft_config.items():
        kept = {key: value for key, value in config.to_dict().items() if key not in _NOT_THE_ADAPTER}
        facts.update({f"adapter {name}: {key}": value for key, value in _flat(kept).items()})
    return facts


def describe_reference(reference: Reference | None) -> dict[str, Any]:
    """The reference: how it is made, and a sample of the weights that are its own."""
    if reference is None:
        return {"kind": "none"}
    facts: dict[str, Any] = {"kind": reference.kind}
    if reference.model is not None:
        facts["weights"] = sample((_plain_name(name), p) for name, p in reference.model.named_parameters())
    elif reference.peft is not None and REFERENCE_ADAPTER in reference.peft.peft_config:
        own = [(n, p) for n, p in reference.peft.named_parameters() if f".{REFERENCE_ADAPTER}." in n]
        facts["weights"] = sample(_switched_on(own))
    return facts


def _switched_on(weights: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """The adapter's weights without those of layers where it changes nothing: a fresh LoRA holds random numbers times
    zero, and the random ones differ from start to start."""
    silent = {_layer(name) for name, p in weights if not _local(p).any()}
    return [(name, p) for name, p in weights if _layer(name) not in silent]


def _layer(name: str) -> str:
    return name.rsplit(".", 3)[0]  # LAYER.lora_B.ref.weight


def _adapter_names(model: Any) -> list[str]:
    return list(model.peft_config) if isinstance(model, PeftModel) else []


def _of_adapter(name: str, adapters: Iterable[str]) -> bool:
    return any(f".{adapter}." in name for adapter in adapters)


def _plain_name(name: str) -> str:
    """The name that a weight has without an adapter or a wrapper around its module."""
    for part in ("base_model.model.", "base_layer.", "original_module.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name.removeprefix("module.")


def sample(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of names, shapes and up to `SAMPLED_VALUES` evenly spaced values of every floating-point weight."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(weights, key=lambda item: item[0]):
        if weight.is_floating_point():
            flat = _local(weight).flatten()
            step = max(1, flat.numel() // SAMPLED_VALUES)
            digest.update(f"{name}{tuple(getattr(weight, 'ds_shape', weight.shape))}".encode())
            digest.update(flat[::step][:SAMPLED_VALUES].float().cpu().numpy().tobytes())
    return f"hash:{digest.hexdigest()}"


def _local(weight: Tensor) -> Tensor:
    """The values of a weight that this process holds."""
    data = getattr(weight, "ds_tensor", weight).detach()
    return data.to_local() if hasattr(data, "to_local") else data


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat({str(k): v for k, v in value.items() if k not in _NOT_THE_MODEL}, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _hash(value: Any) -> Any:
    """A value as it is where it is short, else its hash."""
    text = json.dumps(value, sort_keys=True, default=_json_ready)
    return (
        json.loads(text) if len(text) <= 200 else f"hash:{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"
    )


def _json_ready(value: Any) -> Any:
    """JSON-ready; sets are sorted, because their order differs between processes."""
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else str(getattr(value, "value", value))
