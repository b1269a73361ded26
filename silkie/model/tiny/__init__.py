"""A tiny model of any vision-language type of transformers, with random weights, and its own processor.

The config of a type is shrunk by what its numbers mean (their names), so that the type of next month works without an
entry here; a few types need a number that their names do not tell. Used by `python -m silkie.model` and by tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, ProcessorMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from silkie.model.tiny.config import tiny_config, whole_config
from silkie.model.tiny.processor import needed_packages, tiny_processor

__all__ = [
    "needed_packages",
    "tiny",
    "tiny_config",
    "tiny_groups",
    "tiny_model",
    "tiny_processor",
    "types",
    "whole_config",
]


def types() -> list[str]:
    """Every model type that transformers maps from image and text to text."""
    return list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def tiny(model_type: str, *, seed: int = 0) -> tuple[Any, ProcessorMixin]:
    """A tiny model and its processor.

    Raises:
        KeyError: transformers has no such type.
        Exception: whatever the type's own classes raise where they cannot be built this small, or lack a package.
    """
    processor = tiny_processor(model_type)
    return tiny_model(tiny_config(model_type, processor), seed=seed), processor


def tiny_model(config: PretrainedConfig, *, seed: int = 0) -> Any:
    """The model of a config with random weights, spread so that masks and positions show in its outputs."""
    cls = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[config.model_type])
    torch.manual_seed(seed)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.isfinite().all() or (parameter.dim() > 1 and not parameter.any()):
                nn.init.normal_(parameter, std=0.1)  # made empty, or zero, through which no image would reach the text
            elif parameter.dim() > 1:
                parameter.mul_(4.0)
    return model.eval()


def tiny_groups(images: Sequence[Any]) -> list[dict[str, Any]]:
    """Four preference groups of 4, 2, 3 and 2 responses: one image, two, none, one."""

    def group(pictures: Sequence[Any], question: str, responses: list[str]) -> dict[str, Any]:
        content = [*({"type": "image", "text": None} for _ in pictures), {"type": "text", "text": question}]
        return {
            "images": list(pictures),
            "prompt": [{"role": "user", "content": content}],
            "responses": responses,
            "pairs": [[0, 1]],
        }

    a, b, c, d = images
    return [
        group([a], "what is in image ?", ["a red cat", "yes", "no not a dog on the table", "is it ?"]),
        group([b, c], "how many cat are there in the image ?", ["two cat", "one"]),
        group([], "is there a dog", ["no", "yes yes", "one two three"]),
        group([d], "describe the table on the left", ["red table", "a blue square of one"]),
    ]
