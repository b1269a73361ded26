"""What a model's forward does to the output head's logits before it returns them: found by handing it some.

Some families scale their logits, some cap them, and some have a cap in their config that their forward ignores. So the
forward itself is asked: its backbone and head are replaced by ones that return given numbers, and what it makes of
those is compared with what its config could mean. No weights are read, sharded ones need not be gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from silkie.logprob.head import HeadOptions, head_options
from silkie.model.families import backbone, causal_lm, language_model

_HANDED = torch.tensor([-300.0, -20.0, -1.0, 0.5, 3.0, 40.0, 900.0], dtype=torch.float64)
_OUT_OF_REACH = 2.0**100
_KNOWN: WeakKeyDictionary[nn.Module, tuple[Any, HeadOptions]] = WeakKeyDictionary()


def applied_options(model: Any) -> HeadOptions:
    """The scale and the soft-cap that a model's own forward applies to the logits of its head. Asked once per model.

    Raises:
        ValueError: the forward does something else to them, or caps them in a way that cannot be switched off.
    """
    base = causal_lm(model)
    wanted = head_options(base.config)
    key = (type(base), wanted)
    if (known := _KNOWN.get(base)) is not None and known[0] == key:
        return known[1]
    options = _options(base, wanted)
    _KNOWN[base] = key, options
    return options


def _options(base: nn.Module, wanted: HeadOptions) -> HeadOptions:
    returned = _returned(base)
    scales = dict.fromkeys((1.0, wanted.logit_scale, 1.0 / wanted.logit_scale))
    for scale, cap in product(scales, dict.fromkeys((None, wanted.softcap))):
        options = HeadOptions(softcap=cap, logit_scale=scale)
        if _same(returned, _transformed(options)):
            with without_softcap(base, options):
                uncapped = _returned(base)
            if _same(uncapped, _transformed(HeadOptions(None, scale))):
                return options
            break
    raise ValueError(
        f"{type(base).__name__} changes its logits in a way that silkie cannot account for (from"
        f" {_HANDED.tolist()} it makes {[round(x, 3) for x in returned.tolist()]}): use TRL's DPOTrainer for it."
    )


def _transformed(options: HeadOptions) -> Tensor:
    logits = _HANDED * options.logit_scale
    return logits if options.softcap is None else options.softcap * torch.tanh(logits / options.softcap)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b, rtol=1e-5, atol=1e-6)


@contextmanager
def without_softcap(base: Any, options: HeadOptions) -> Iterator[None]:
    """Within the context, the forward of `base` does not cap what its head returns: its cap is out of reach, a power of
    two, which divides and multiplies without rounding (some configs take no None)."""
    places = [] if options.softcap is None else list(_caps(base, options.softcap))
    for owner, name in places:
        setattr(owner, name, _OUT_OF_REACH)
    try:
        yield
    finally:
        for owner, name in places:
            setattr(owner, name, options.softcap)


def _caps(base: Any, cap: float) -> Iterator[tuple[Any, str]]:
    """Where a model keeps its cap: in its config, some in an attribute or a small module as well."""
    yield base.config.get_text_config(), "final_logit_softcapping"
    for module in (base, *base.children()):
        yield from ((module, name) for name, value in list(vars(module).items()) if "softcap" in name and value == cap)


class _Given(BaseModelOutputWithPast):
    """A backbone's output that has nothing but hidden states."""

    def __getattr__(self, name: str) -> None:
        return None


class _Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(1, 1)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    @property
    def decoder(self) -> nn.Module:
        """Some forwards reach through the backbone for its decoder (OPT)."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> _Given:
        return _Given(last_hidden_state=torch.zeros(1, 1, 1, dtype=torch.float64))


class _Head(nn.Module):
    weight = torch.zeros(1, 1, dtype=torch.float64)

    def forward(self, hidden: Tensor) -> Tensor:
        return _HANDED.expand(*hidden.shape[:-1], -1).clone()


def gives_router_loss(model: Any) -> bool:
    """Whether a model's forward returns a load balancing loss of its routers when asked for it. Some mixtures of
    experts have the option in their config and no such loss in their forward."""
    return getattr(_output(causal_lm(model), output_router_logits=True), "aux_loss", None) is not None


def _returned(base: Any) -> Tensor:
    """What the forward returns for a head that says `_HANDED`. Raises what `_output` raises."""
    return _output(base).logits[0, -1]


def _output(base: Any, **more: Any) -> Any:
    """The output of the forward on a backbone and a head that return given numbers.

    Raises:
        ValueError: the forward does not run so.
    """
    inner = backbone(base)
    replaced = language_model(base) if inner is base else inner
    twin = _twin(base, {id(replaced): _Backbone(), id(base.get_output_embeddings()): _Head()})
    ids = torch.zeros(1, 1, dtype=torch.long, device=next(base.parameters()).device)
    try:
        with torch.no_grad():
            return type(base).forward(twin, input_ids=ids, use_cache=False, **more)
    except Exception as error:
        name = type(base).__name__
        raise ValueError(
            f"What {name} does to its logits cannot be found out ({type(error).__name__}: {error}): use TRL's"
            " DPOTrainer for it."
        ) from error


def _twin(module: Any, stand_ins: dict[int, nn.Module]) -> Any:
    """A module with the same state that holds stand-ins in the place of some of its parts."""
    # not `copy`: FSDP2's classes make a new model on copying
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_modules"] = {
        name: stand_ins.get(id(child))
        or (_twin(child, stand_ins) if child is not None and _holds(child, stand_ins) else child)
        for name, child in module._modules.items()
    }
    return twin


def _holds(module: nn.Module | None, parts: dict[int, nn.Module]) -> bool:
    return module is not None and any(id(m) in parts for m in module.modules())
