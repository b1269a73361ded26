"""Image features on disk: a frozen vision tower encodes each image once per run, not once per epoch and pass.

A group's images are always encoded by themselves, whether their features are kept or not yet: so a step has the same
bits with a full, a partial or an empty cache, and a resumed run equals one that never stopped.

One safetensors file per group of images, written under another name and then renamed: a killed run leaves whole files
only, and ranks may write at the same time. Files are memory-mapped when they are read.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

import silkie
from silkie.batch.batch import Batch
from silkie.model.families import backbone, causal_lm
from silkie.model.vision import vision_parameters, vision_parts

logger = logging.getLogger(__name__)

Form = str | list[Any]  # of a field: "tensor", "images" (a sequence with an entry per image), or its levels' forms
_UNREAD = ("hidden_states", "attentions")


class NotCacheable(Exception):
    """Why the features of a model are encoded anew in every pass."""


@dataclass(slots=True, frozen=True)
class Images:
    """What a batch says of its images, in the order of the pixel inputs.

    Attributes:
        keys: of each tree, hashes of its encoded images.
        tokens: of each tree, its image tokens.
        sizes: image tensor of the processor -> its part of each tree, along the dimension where trees are joined.
    """

    keys: Sequence[Sequence[str]]
    tokens: Sequence[int]
    sizes: Mapping[str, Sequence[int]]

    @classmethod
    def of(cls, batch: Batch) -> Images:
        """Those of a batch on any device."""
        return cls(batch["image_keys"], batch["image_tokens"], batch["vision_sizes"])


@dataclass(slots=True, kw_only=True)
class VisionCache:
    """Features of images, by image bytes and pixel shape.

    Attributes:
        directory: of this tower, processor and precision (`run_key`).
        output: class of the encoder's output.
        form: the fields that hold a feature per image token, and their forms.
        joins: see `GroupCollator.joins`.
        room: bytes that this rank may still write.
        encoded, read: trees of images, for the log and for tests.
    """

    directory: Path
    output: type
    form: dict[str, Form]
    joins: Mapping[str, int]
    room: int
    encoded: int = 0
    read: int = 0

    def features(
        self, compute: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], images: Images
    ) -> Any:
        """What `compute(*args, **kwargs)` returns for a batch, with the fields of `form` only.

        Args:
            compute: the model's `get_image_features`, in its forward.
        """
        calls = split_call(compute, args, kwargs, images, self.joins)
        parts = [
            self._tree(compute, call, keys, tokens)
            for call, keys, tokens in zip(calls, images.keys, images.tokens, strict=True)
            if tokens
        ]
        return self.output(**{name: _join([part[name] for part in parts], form) for name, form in self.form.items()})

    def _tree(
        self, compute: Callable[..., Any], call: Mapping[str, Any], keys: Sequence[str], tokens: int
    ) -> dict[str, Any]:
        pixels = [(name, list(v.shape), str(v.dtype)) for name, v in call.items() if isinstance(v, Tensor)]
        key = _digest([*keys, *pixels])
        device = next(v.device for v in call.values() if isinstance(v, Tensor))
        if (kept := self._load(key, tokens, device)) is not None:
            self.read += 1
            return kept
        with torch.no_grad():
            found = take(compute(**call), tokens, self.form)
        self.encoded += 1
        self._save(key, found)
        return found

    def _file(self, key: str) -> Path:
        return self.directory / key[:2] / f"{key}.safetensors"

    def _load(self, key: str, tokens: int, device: torch.device) -> dict[str, Any] | None:
        file = self._file(key)
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
                checked = opened.metadata()["crc32"]
            if checked != _checksum(tensors):
                raise ValueError("its checksum is another")
            return {name: _built(name, form, tensors, tokens, device) for name, form in self.form.items()}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s: damaged (%s); its images are encoded again", file, error)
            return None

    def _save(self, key: str, found: Mapping[str, Any]) -> None:
        tensors: dict[str, Tensor] = {}
        for name, value in found.items():
            _flatten(name, value, tensors)
        size = sum(t.nbytes for t in tensors.values())
        if size > self.room:
            if self.room:
                logger.warning("%s: full; images that it lacks are encoded in every pass", self.directory)
            self.room = 0
            return
        file = self._file(key)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".part")
            os.close(handle)
            try:
                save_file(tensors, temporary, metadata={"crc32": _checksum(tensors)})
                os.replace(temporary, file)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except (OSError, SafetensorError) as error:  # training needs no cache
            logger.warning("%s cannot be written (%s); images that it lacks are encoded in every pass", file, error)
            self.room = 0
            return
        self.room -= size


def open_cache(
    model: Any,
    batch: Batch,
    *,
    directory: Path,
    facts: Mapping[str, Any],
    joins: Mapping[str, int],
    most: int,
    ranks: int,
    inputs: Mapping[str, Any],
) -> VisionCache:
    """The cache of a model's frozen tower, once the model has shown that its features depend on the image alone.

    Args:
        model: the policy, wrapped or not.
        batch: at least two groups with images, on the model's device.
        directory: where caches lie, one folder for each tower.
        facts: what features depend on besides image and weights: settings of the processor, precision.
        joins: see `GroupCollator.joins`.
        most: bytes that all ranks of this machine may keep there.
        ranks: of this machine.
        inputs: the image tensors of the batch, as the model is given them.

    Raises:
        NotCacheable: with the reason.
    """
    if any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in vision_parameters(model)):
        raise NotCacheable("its weights are sharded: every rank must run it in every step")
    images = Images.of(batch)
    if sum(n > 0 for n in images.tokens) < 2:
        raise NotCacheable("fewer than two groups with images to try it on")
    compute = backbone(model).get_image_features
    wanted = inspect.signature(compute).parameters
    given = {name: value for name, value in inputs.items() if name in wanted}
    form, output = probe(compute, given, images, joins)
    place = directory / run_key(model, facts)
    free = shutil.disk_usage(_existing(directory)).free
    held = sum(f.stat().st_size for f in place.glob("*/*.safetensors"))
    room = max(0, min(most - held, free // 2)) // ranks
    return VisionCache(directory=place, output=output, form=form, joins=joins, room=room)


def probe(
    compute: Callable[..., Any], given: Mapping[str, Any], images: Images, joins: Mapping[str, int]
) -> tuple[dict[str, Form], type]:
    """The fields that hold a feature per image token, found by encoding groups alone and together.

    Raises:
        NotCacheable: features of an image depend on the others, or change from call to call, or cannot be told apart.
    """
    calls = [call for call, n in zip(split_call(compute, (), given, images, joins), images.tokens, strict=True) if n]
    tokens = [n for n in images.tokens if n]
    with torch.no_grad():
        together = compute(**{**given, "return_dict": True})
        alone = [compute(**{**call, "return_dict": True}) for call in calls]
        again = compute(**{**calls[0], "return_dict": True})
    if not hasattr(together, "keys"):
        raise NotCacheable(f"its encoder returns a {type(together).__name__}, whose parts have no names")
    form = form_of(alone[0], tokens[0])
    if not form or any(form_of(one, n) != form for one, n in zip(alone, tokens, strict=True)):
        raise NotCacheable("which part of its output belongs to which image cannot be told")
    parts = [take(one, n, form) for one, n in zip(alone, tokens, strict=True)]
    joined = {name: _join([part[name] for part in parts], kind) for name, kind in form.items()}
    whole = take(together, sum(tokens), form)
    for name in form:
        if not _same(_leaves(parts[0][name]), _leaves(take(again, tokens[0], form)[name]), exactly=True):
            raise NotCacheable("it encodes the same image differently from call to call")
        if not _same(_leaves(joined[name]), _leaves(whole[name]), exactly=False):
            raise NotCacheable("the features of an image depend on the other images of the batch")
    try:
        type(together)(**joined)
    except TypeError as error:
        raise NotCacheable(f"its encoder's output cannot be built from its fields: {error}") from error
    return form, type(together)


def split_call(
    compute: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    images: Images,
    joins: Mapping[str, int],
) -> list[dict[str, Any]]:
    """The arguments of a call for all trees as those of a call for each.

    Raises:
        NotCacheable: a tensor among them is not one of the processor's image tensors.
    """
    bound = inspect.signature(compute).bind(*args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        variadic = bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        named.update(value if variadic else {name: value})
    calls: list[dict[str, Any]] = [{} for _ in images.tokens]
    for name, value in named.items():
        parts: Iterable[Any] = [value] * len(calls)
        if isinstance(value, Tensor):
            sizes, dim = images.sizes.get(name), joins.get(name, 0)
            if sizes is None or value.shape[dim] != sum(sizes):
                raise NotCacheable(f"its encoder reads {name!r}, which is not of one image")
            parts = value.split(list(sizes), dim)
        for call, part in zip(calls, parts, strict=True):
            call[name] = part
    return calls


def form_of(features: Any, tokens: int) -> dict[str, Form]:
    """The fields of an encoder's output that hold `tokens` features, with their forms."""
    found = {name: _form(features[name], tokens) for name in features.keys() if name not in _UNREAD}  # noqa: SIM118
    return {name: form for name, form in found.items() if form is not None}


def _form(value: Any, tokens: int) -> Form | None:
    if isinstance(value, Tensor):
        return "tensor" if value.dim() > 1 and value.numel() // value.shape[-1] == tokens else None
    if not isinstance(value, (list, tuple)) or not value:
        return None
    if all(isinstance(t, Tensor) for t in value) and sum(t.numel() // t.shape[-1] for t in value) == tokens:
        return "images"
    levels = [_form(level, tokens) for level in value]
    return levels if all(level is not None for level in levels) else None


def take(features: Any, tokens: int, form: Mapping[str, Form]) -> dict[str, Any]:
    """The fields of `form`, entries of images joined.

    Raises:
        ValueError: the output has another form.
    """
    if any(_form(features[name], tokens) != kind for name, kind in form.items()):
        raise ValueError("the encoder's output has another form than at start-up: set vision_cache='off'")
    return {name: _taken(features[name], kind) for name, kind in form.items()}


def _taken(value: Any, form: Form) -> Any:
    if form == "tensor":
        return value
    if form == "images":
        return torch.cat([t.reshape(-1, t.shape[-1]) for t in value])
    return [_taken(level, kind) for level, kind in zip(value, form, strict=True)]


def _join(parts: Sequence[Any], form: Form) -> Any:
    """The field of a batch from those of its trees, in the form in which the encoder returns it."""
    if form == "tensor":
        flat = torch.cat([t.reshape(-1, t.shape[-1]) for t in parts])
        return flat.reshape(-1, *parts[0].shape[1:])
    if form == "images":
        return tuple(parts)
    return [_join([part[i] for part in parts], kind) for i, kind in enumerate(form)]


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.reshape(-1, value.shape[-1])]
    leaves = [leaf for part in value for leaf in _leaves(part)]
    return [torch.cat(leaves)] if leaves and len({leaf.shape[-1] for leaf in leaves}) == 1 else leaves


def _same(a: Sequence[Tensor], b: Sequence[Tensor], *, exactly: bool) -> bool:
    """Equal bits, or equal up to the rounding of products of another shape."""
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return False
    if exactly:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    rounding = 8 * max(torch.finfo(x.dtype).eps for x in a) ** 0.75
    return all(bool((x - y).abs().max() <= rounding * y.abs().max()) for x, y in zip(a, b, strict=True))


def _flatten(name: str, value: Any, out: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        out[name] = value.detach().cpu().contiguous()
    else:
        for i, part in enumerate(value):
            _flatten(f"{name}.{i}", part, out)


def _built(name: str, form: Form, tensors: Mapping[str, Tensor], tokens: int, device: torch.device) -> Any:
    if isinstance(form, str):
        tensor = tensors[name]
        if tensor.numel() // tensor.shape[-1] != tokens:
            raise ValueError(f"{name} is not of {tokens} image tokens")
        return tensor.to(device)
    return [_built(f"{name}.{i}", kind, tensors, tokens, device) for i, kind in enumerate(form)]


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(name.encode(), crc))
    return str(crc)


def run_key(model: Any, facts: Mapping[str, Any]) -> str:
    """Hash of what features depend on besides the image: all weights of the tower, its config, versions, `facts`."""
    base: Any = causal_lm(model)
    digest = hashlib.blake2b(digest_size=12)
    for part_name, part in vision_parts(base):
        named = [("", part)] if isinstance(part, Tensor) else [*part.named_parameters(), *part.named_buffers()]
        for name, tensor in named:
            data = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{part_name}.{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(data.view(torch.uint8).numpy().tobytes())
    text = getattr(base.config, "vision_config", None)
    settings = {
        "class": type(base).__name__,
        "vision": text.to_dict() if text is not None else base.config.to_dict(),
        "versions": [silkie.__version__, torch.__version__, transformers.__version__],
        **facts,
    }
    digest.update(_digest(settings).encode())
    return digest.hexdigest()


def image_bytes_per_token(
    cache: VisionCache, batch: Batch, compute: Callable[..., Any], given: Mapping[str, Any]
) -> float:
    """Bytes that the cache keeps for an image token of `batch`."""
    images = Images.of(batch)
    with torch.no_grad():
        found = take(compute(**{**given, "return_dict": True}), sum(images.tokens), cache.form)
    tensors: dict[str, Tensor] = {}
    for name, value in found.items():
        _flatten(name, value, tensors)
    return sum(t.nbytes for t in tensors.values()) / sum(images.tokens)


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.absolute().parents) if place.exists())
