"""Which modules an adapter is attached to by default, and how much of the language model that is.

Found by what a model is made of: linear layers and stacked expert weights of the text decoder. Not adapted: routers (an
adapter on a router moves tokens between experts for small changes), embeddings, the output head, and convolutions,
whose weights models read directly.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from silkie.model.families import causal_lm, language_model, reads_images, shell
from silkie.model.vision import vision_parts

logger = logging.getLogger(__name__)

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
ENOUGH = 0.9  # share of the text weights below which a default adapter is worth a warning


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Which weights of the language model an adapter changes. Embeddings and the output head are not among them.

    Attributes:
        covered: numbers in weight matrices with an adapter.
        total: numbers in all weight matrices.
        uncovered: matrices without one, layer numbers as "*", the largest share first.
    """

    covered: int
    total: int
    uncovered: tuple[str, ...]

    @property
    def share(self) -> float:
        return self.covered / max(self.total, 1)

    def __str__(self) -> str:
        names = "" if self.share >= ENOUGH or not self.uncovered else f"; without: {', '.join(self.uncovered[:8])}"
        return f"{100 * self.share:.1f} % of the text weights ({self.total:,} numbers, embeddings apart){names}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Modules and parameters of a model that an adapter is attached to, by their full names, and a regular expression
    of what it is not attached to: the parts that make features."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    outside: str

    @property
    def pattern(self) -> str:
        """Regular expression of the modules' names, for peft; the same for every layer."""
        names = sorted({_NUMBER.sub("#", name) for name in self.modules})
        return rf"^(?:{'|'.join(re.escape(name).replace(re.escape('#'), r'[0-9]+') for name in names)})$"


def structure(source: Any) -> PreTrainedModel:
    """The model itself, or the weightless one of its config."""
    return shell(source) if isinstance(source, PretrainedConfig) else causal_lm(source)


def lora_targets(source: Any) -> Targets:
    """Linear layers and stacked expert weights of the language model of a model or config."""
    base = structure(source)
    decoder, head = language_model(base), base.get_output_embeddings()
    routers = {id(m) for m in _routers(decoder, base.config)}
    modules, parameters = [], []
    prefix = next(name for name, module in base.named_modules() if module is decoder)
    for name, module in decoder.named_modules(prefix=prefix):
        if isinstance(module, nn.Linear):
            if module is not head and id(module) not in routers:
                modules.append(name)
        elif not isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd)):
            own = module.named_parameters(recurse=False)
            parameters += [f"{name}.{key}" for key, p in own if p.dim() == 3 and min(p.shape) > 1]
    parts = "|".join(re.escape(name) for name, _ in vision_parts(base))
    return Targets(modules=tuple(modules), parameters=tuple(parameters), outside=rf"^(?:{parts})(?:\..*)?$")


def default_lora_targets(source: Any) -> str:
    """Regular expression of the language model's linear layers. See `lora_targets`."""
    return lora_targets(source).pattern


def names_no_targets(peft_config: PeftConfig) -> bool:
    """Whether a LoRA config leaves the choice of modules to silkie."""
    return isinstance(peft_config, LoraConfig) and not (peft_config.target_modules or peft_config.target_parameters)


def with_default_targets(peft_config: PeftConfig, source: Any) -> PeftConfig:
    """`peft_config` with the language model's linear layers and experts as targets where it names none, and peft has
    none of its own for a model of text.

    Args:
        source: the model or its config.
    """
    if not names_no_targets(peft_config):
        return peft_config
    known = getattr(source, "config", source)
    if not reads_images(known) and peft_targets(known.model_type):
        return peft_config
    targets = lora_targets(source)
    # the caller's own stays as it is: on a model of another family these targets would hit the vision tower
    config: Any = copy.copy(peft_config)
    config.target_modules = targets.pattern
    experts = sorted({_suffix(name) for name in targets.parameters})
    experts += [name for name in _taken_away(config, structure(source), targets.modules) if experts]
    if experts and config.lora_dropout:
        logger.warning(
            "lora_dropout=%g: peft has no dropout for weights of experts, so %s get no adapter. Set lora_dropout=0 to"
            " train them.",
            config.lora_dropout,
            ", ".join(experts),
        )
    elif experts:
        config.target_parameters = experts
        # peft rewrites the targets of some mixtures of experts to bare names, which towers of features share
        config.exclude_modules = config.exclude_modules or targets.outside
    return config


def peft_targets(model_type: str) -> list[str]:
    """The modules that peft adapts in models of a type where a config names none; empty where it knows none."""
    return sorted(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type, ()))


def _taken_away(config: LoraConfig, base: PreTrainedModel, modules: Sequence[str]) -> list[str]:
    """Weights of the linear layers that peft takes from the targets of some mixtures of experts, as parameters that it
    can target: it reads a name that experts had in an older transformers (`down_proj`) as theirs alone, and shared
    experts and dense layers have it too."""
    converted: Any = copy.deepcopy(config)
    convert_peft_config_for_transformers(converted, base, None)
    if isinstance(converted.target_modules, str):
        return []
    kept = tuple(converted.target_modules)
    gone = [name for name in modules if not any(name == k or name.endswith(f".{k}") for k in kept)]
    return [f"{name}.weight" for name in gone]  # in full: what a suffix hits in a tower, exclude_modules does not undo


def coverage(model: Any) -> Coverage:
    """How much of the language model the adapter of `model` changes."""
    base = causal_lm(model)
    decoder: Any = language_model(base)
    embeddings = {id(p) for m in decoder.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    if (head := base.get_output_embeddings()) is not None:
        embeddings |= {id(p) for p in head.parameters()}
    adapted = _adapted(decoder)
    covered = total = 0
    uncovered: dict[str, int] = {}
    for name, parameter in decoder.named_parameters():
        if parameter.dim() < 2 or id(parameter) in embeddings or _of_adapter(name):
            continue
        size = _numel(parameter)
        total += size
        if id(parameter) in adapted:
            covered += size
        else:
            key = _NUMBER.sub("*", name.replace(".base_layer", ""))
            uncovered[key] = uncovered.get(key, 0) + size
    names = sorted(uncovered, key=lambda n: -uncovered[n])
    return Coverage(covered=covered, total=total, uncovered=tuple(n.removesuffix(".weight") for n in names))


def untie_adapted(model: Any) -> None:
    """Gives a head that shares its weight with the embeddings one of its own, where either has an adapter: folded into
    the shared one, it would change both. peft then notes in the config that they are two."""
    base = model.get_base_model()
    layers = [base.get_input_embeddings(), base.get_output_embeddings()]
    if any(isinstance(layer, BaseTunerLayer) for layer in layers):
        embeddings, head = (getattr(layer, "base_layer", layer) for layer in layers)
        if isinstance(head, nn.Linear) and head.weight is embeddings.weight:
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def _adapted(decoder: nn.Module) -> set[int]:
    """ids of the weights that an adapter layer changes."""
    out = set()
    for module in decoder.modules():
        if isinstance(module, BaseTunerLayer):
            name = getattr(module, "parameter_name", "weight")
            base: Any = module.get_base_layer()
            original = getattr(base, "parametrizations", {})
            weight = original[name].original if name in original else getattr(base, name, None)
            if weight is not None:
                out.add(id(weight))
    return out


def _numel(parameter: nn.Parameter) -> int:
    """Numbers in a weight, also where ZeRO-3 has taken it apart or bitsandbytes stores several in one."""
    if (state := getattr(parameter, "quant_state", None)) is not None:
        return math.prod(state.shape)
    return getattr(parameter, "ds_numel", parameter.numel())


def _of_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _suffix(name: str) -> str:
    """A parameter's name within its layer, as peft matches it."""
    return _NUMBER.split(name)[-1].lstrip(".")


def _routers(decoder: nn.Module, config: PretrainedConfig) -> list[nn.Module]:
    """Linear layers that choose or weigh experts: beside a module of experts, one output per expert or one in all."""
    text = config.get_text_config()
    keys = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    counts = {n for key in keys for n in _numbers(getattr(text, key, None))} | {1}
    out: list[nn.Module] = []
    for module in decoder.modules():
        children = dict(module.named_children())
        if any("expert" in name for name in children):
            linear = [m for m in children.values() if isinstance(m, nn.Linear)]
            out += [m for m in linear if m.out_features in counts]
    return out


def _numbers(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value) if isinstance(value, (list, tuple)) else []
