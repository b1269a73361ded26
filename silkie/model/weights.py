"""Safetensors only: a pickled weight file can run code when it is loaded, so silkie reads none, wherever it loads from.

`silkie convert DIRECTORY` makes safetensors of the pickled files of a directory. Only that command
opens them, and reads nothing but tensors (`torch.load(weights_only=True)`)."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

logger = logging.getLogger(__name__)

_SAFE = {"model": "model.safetensors", "adapter": "adapter_model.safetensors"}
_PICKLED = {"model": "pytorch_model.bin", "adapter": "adapter_model.bin"}
_INDEX = ".index.json"


class PickledWeights(ValueError):
    """A directory has its weights in pickled files only."""


def refuse_pickled(name: str | Path) -> None:
    """Refuses a model directory whose weights are pickled. Hub names pass: `use_safetensors=True` is for them.

    Raises:
        PickledWeights: it has no safetensors but a `pytorch_model.bin`.
    """
    _refuse(Path(name), "model")


def refuse_pickled_adapter(directory: str | Path) -> None:
    """Refuses an adapter directory whose weights are pickled, or those of an adapter in a folder of it: peft loads them
    where it finds no safetensors.

    Raises:
        PickledWeights: there is such a file without its safetensors twin.
    """
    place = Path(directory)
    for folder in (place, *(file.parent for file in sorted(place.glob(f"*/{_PICKLED['adapter']}")))):
        _refuse(folder, "adapter")


def _refuse(folder: Path, kind: str) -> None:
    if not folder.is_dir():
        return
    safe, pickled = _SAFE[kind], _PICKLED[kind]
    if any((folder / file).exists() for file in (safe, safe + _INDEX)):
        return  # both transformers and peft prefer it
    if found := next((f for f in (pickled, pickled + _INDEX) if (folder / f).exists()), None):
        raise PickledWeights(
            f"{folder} has its weights in {found}, a pickle, which can run code when it is loaded; silkie reads"
            f" safetensors only. If you trust its source: silkie convert {folder}"
        )


def convert(directory: str | Path) -> list[Path]:
    """Writes a safetensors file beside every pickled weight file of a model or adapter directory and its folders, save
    those that have one: silkie reads that one, and it may be newer.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: there is nothing to convert, or a file that an index names is missing.
        ValueError: a file holds something else than tensors, or an index is none.
        OSError: a file cannot be written; none is left in parts.
    """
    place = Path(directory)
    twins: dict[Path, Path] = {}
    for kind, pickled in _PICKLED.items():
        stem, safe = pickled.removesuffix(".bin"), _SAFE[kind].removesuffix(".safetensors")
        for file in sorted((*place.glob(f"**/{pickled}"), *place.glob(f"**/{stem}-*.bin"))):
            twins[file] = file.with_name(file.name.replace(stem, safe)).with_suffix(".safetensors")
        # behind its files: a directory with an index counts as whole
        twins |= {index: index.with_name(_SAFE[kind] + _INDEX) for index in place.glob(f"**/{pickled}{_INDEX}")}
    if not twins:
        raise FileNotFoundError(f"{place} holds no {' or '.join(_PICKLED.values())}.")
    written = []
    for file, target in twins.items():
        if target.exists():
            logger.info("%s stays as it is: it is not made again from %s", target, file.name)
            continue
        part = target.with_name(f"{target.name}.part")
        try:
            (_convert_index if file.name.endswith(_INDEX) else _convert_file)(file, part)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        logger.info("wrote %s from %s", target, file.name)
        written.append(target)
    return written


def _convert_file(file: Path, target: Path) -> None:
    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{file} holds more than tensors, or is damaged: {error}") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{file} holds something else than named tensors.")
    try:
        # copies: tied tensors share their memory, which safetensors cannot store
        copies = {name: value.contiguous().clone() for name, value in state.items()}
        save_file(copies, target, metadata={"format": "pt"})
    except (RuntimeError, KeyError) as error:  # sparse, without data; a dtype that it does not know
        raise ValueError(f"{file} holds a tensor that safetensors cannot store: {error}") from error
    except SafetensorError as error:
        raise OSError(f"{target} cannot be written: {error}") from error


def _convert_index(index: Path, target: Path) -> None:
    """The index of a model in several files, with the names of the new ones."""
    kind = next(kind for kind, pickled in _PICKLED.items() if index.name == pickled + _INDEX)
    old, new = _PICKLED[kind].removesuffix(".bin"), _SAFE[kind].removesuffix(".safetensors")
    try:
        content = json.loads(index.read_text())
        places = content["weight_map"]
        twins = {file: file.replace(old, new).replace(".bin", ".safetensors") for file in places.values()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of weights: {type(error).__name__}: {error}") from error
    beside = {file.name for file in index.parent.iterdir()}
    # with an index the directory counts as whole
    if missing := sorted(file for file, twin in twins.items() if twin not in beside):
        raise FileNotFoundError(f"{index} names {missing[0]}, which is not beside it.")
    content["weight_map"] = {weight: twins[file] for weight, file in places.items()}
    target.write_text(json.dumps(content, indent=1))
