"""The parts of a model that make features (vision towers, audio towers, projectors), and image features once per step:
computed for each image once, repeated for the rows that need them, shared by the policy and the reference pass."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from silkie.model.families import backbone, causal_lm, language_model


def vision_parts(model: Any) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    """Everything under a model that is neither its text decoder nor its embeddings and head: what turns pixels (or
    sound) into features. Names are those of the transformers model."""
    base: Any = causal_lm(model)
    text = {id(m) for m in (base.get_input_embeddings(), base.get_output_embeddings()) if m is not None}
    yield from _parts(base, "", language_model(base), text)


def _parts(
    module: nn.Module, prefix: str, decoder: nn.Module, text: set[int]
) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, parameter
    for name, child in module.named_children():
        if child is decoder or id(child) in text:
            continue
        if any(m is decoder for m in child.modules()):
            yield from _parts(child, f"{prefix}{name}.", decoder, text)
        elif any(True for _ in child.parameters()):
            yield prefix + name, child


def vision_parameters(model: Any) -> list[nn.Parameter]:
    """All parameters of the vision tower and its projector, adapters included."""
    return [
        p for _, part in vision_parts(model) for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())
    ]


def vision_is_frozen(model: Any) -> bool:
    """Whether no parameter of the vision tower or its projector trains."""
    return not any(p.requires_grad for p in vision_parameters(model))


def describe_vision(model: Any) -> str:
    """For the log: which parts make features, how many numbers they hold, how many of them train."""
    if not any(True for _ in vision_parts(model)):
        return "none (a language model)"
    names = ", ".join(name.removeprefix("model.") for name, _ in vision_parts(model))
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in vision_parameters(model)]
    trained, total = sum(n for n, on in sizes if on), sum(n for n, _ in sizes)
    if not trained:
        return f"frozen ({total:,} parameters of {names}), encoded once per step and shared"
    return f"trained ({trained:,} of {total:,} parameters of {names})"


def freeze_vision(model: Any) -> None:
    """Takes the vision tower and its projector out of training."""
    for parameter in vision_parameters(model):
        parameter.requires_grad_(False)


def unhook_vision(base: PreTrainedModel) -> None:
    """Removes the hooks that gradient checkpointing puts on the input embeddings of a frozen vision tower, which would
    back-propagate it for nothing."""
    for _, part in vision_parts(base):
        for module in part.modules() if isinstance(part, nn.Module) else ():
            for key, hook in list(module._forward_hooks.items()):
                if "make_inputs_require_grad" in getattr(hook, "__qualname__", ""):
                    del module._forward_hooks[key]


def unquantized_modules(base: PreTrainedModel) -> list[str]:
    """Modules that bitsandbytes must leave alone, by their full names: the vision tower (it is small, and its features
    feed every token) and the output head."""
    head = base.get_output_embeddings()
    names = [name for name, module in base.named_modules() if module is head]
    return [*(name for name, part in vision_parts(base) if isinstance(part, nn.Module)), *names]


@dataclass(slots=True)
class FeatureCache:
    """Features of one micro-batch, shared by its passes.

    Attributes:
        features: once they are known.
        computed: encoder runs, for tests and the log.
        store: features on disk (`silkie.model.vision_cache.VisionCache`), for the whole run. None: there is none.
        images: what the batch says of its images (`silkie.model.vision_cache.Images`), with `store` only.
    """

    features: Any = None
    computed: int = field(default=0)
    store: Any = None
    images: Any = None


@contextmanager
def image_features_once(
    model: Any,
    *,
    frozen: bool,
    cache: FeatureCache | None,
    tokens_per_tree: Sequence[int],
    row_trees: Sequence[Sequence[int]],
) -> Iterator[None]:
    """Within the context, the model's forward encodes each image of the batch once.

    The model's own `get_image_features` is called inside its forward, where FSDP2 and ZeRO-3 have gathered the weights;
    only its result is kept and laid out for the rows.

    Args:
        model: policy or reference, wrapped or not.
        frozen: run the encoder under `no_grad`: no activations are kept and checkpointing has nothing to recompute.
        cache: features are taken from here, or put here. None: compute them and keep nothing (a trainable vision
            tower).
        tokens_per_tree: image tokens of each tree of groups, in the order of the pixel inputs; groups that share a stem
            share its images.
        row_trees: the trees that each row of the forward holds.
    """
    inner = backbone(model)
    if not hasattr(inner, "get_image_features"):  # a language model: rows of text only
        yield
        return
    compute = inner.get_image_features
    order = [g for row in row_trees for g in row]
    once_in_order = order == list(range(len(tokens_per_tree)))

    def once(*args: Any, **kwargs: Any) -> Any:
        if cache is not None and cache.features is not None:
            features = cache.features
        elif cache is not None and cache.store is not None and any(tokens_per_tree):
            features = cache.features = cache.store.features(compute, args, kwargs, cache.images)
        else:
            with torch.no_grad() if frozen else nullcontext():
                features = compute(*args, **kwargs)
            if cache is not None:
                cache.features, cache.computed = features, cache.computed + 1
        if not sum(tokens_per_tree):
            return _select(features, None, [])
        if once_in_order:
            return features
        repeated = _select(features, list(tokens_per_tree), order)
        if repeated is features:
            raise ValueError(
                f"{type(model).__name__}: its image features do not come to the {sum(tokens_per_tree)} image tokens of"
                " the batch, so that silkie cannot repeat them for the rows. Use per_device_train_batch_size=1 with"
                " layout='packed', or TRL's DPOTrainer."
            )
        return repeated

    inner.get_image_features = once  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del inner.get_image_features  # the class's method shows again


def _select(features: Any, sizes: list[int] | None, order: Sequence[int]) -> Any:
    """A copy of the encoder's output with the image tokens of the groups in `order`.

    Args:
        features: the encoder's output. Whichever of its fields holds one feature per image token is repeated: models
            read `pooler_output`, some `last_hidden_state`, some further levels for their layers.
        sizes: image tokens of each group. None: there is none, and the encoder ran on a dummy image, whose tokens are
            dropped while the output stays attached to its graph.
    """
    out, changed = copy.copy(features), False
    total = sum(sizes) if sizes is not None else None
    for name in list(features.keys()):
        if name in ("hidden_states", "attentions"):
            continue
        selected = _select_tokens(features[name], total, sizes, order)
        if selected is not features[name]:
            out[name], changed = selected, True
    return out if changed else features


def _select_tokens(tokens: Any, total: int | None, sizes: list[int] | None, order: Sequence[int]) -> Any:
    """`tokens` with those of the groups in `order`, in the form they had: one tensor [..., D], or a list of tensors, of
    images or of levels. What does not hold `total` tokens stays as it is (None: any number, all are dropped)."""
    if isinstance(tokens, Tensor):
        flat = tokens.reshape(-1, tokens.shape[-1])
        if total is not None and len(flat) != total:
            return tokens
        rows = _rows(flat, sizes, order)
        return (torch.cat(rows) if rows else flat[:0]).reshape(-1, *tokens.shape[1:])
    if not isinstance(tokens, (list, tuple)) or not tokens:
        return tokens
    if all(isinstance(t, Tensor) for t in tokens) and (total is None or _count(tokens) == total):
        flat = torch.cat([t.reshape(-1, t.shape[-1]) for t in tokens])
        return type(tokens)(_rows(flat, sizes, order) or [flat[:0]])
    levels = [_select_tokens(level, total, sizes, order) for level in tokens]
    return type(tokens)(levels) if any(a is not b for a, b in zip(levels, tokens, strict=True)) else tokens


def _rows(flat: Tensor, sizes: list[int] | None, order: Sequence[int]) -> list[Tensor]:
    groups = flat.split(sizes) if sizes is not None else []
    return [groups[g] for g in order]


def _count(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() // t.shape[-1] for t in tensors)
