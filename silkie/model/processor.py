"""Load a VLM processor with or without torchvision.

transformers builds `Qwen*VLProcessor` (and most VLM processors) around a video processor, which exists only with
torchvision. silkie trains on images, so a missing or broken torchvision must not stop it: then the same processor class
is built without its video part and with the PIL image processor.
"""

from __future__ import annotations

import inspect
import logging
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, ProcessorMixin

logger = logging.getLogger(__name__)


@cache
def torchvision_works() -> bool:
    """Whether torchvision imports and its compiled operators load (a torchvision built for another torch imports, then
    fails)."""
    try:
        import torch
        import torchvision  # noqa: F401

        torch.ops.torchvision.nms  # noqa: B018  (resolves the operator; raises when it was not registered)
    except Exception:
        return False
    return True


def looks_local(path: str) -> bool:
    """Hub names have at most one slash and never start with a dot, a slash or a tilde."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def load_processor(path: str | Path, *, trust_remote_code: bool = False, **kwargs: Any) -> ProcessorMixin:
    """Load the processor (tokenizer, image processor, chat template) of a model or checkpoint directory, or of a hub
    name.

    Args:
        path: local directory or hub name.
        trust_remote_code: run processor code that ships with the checkpoint. Off by default.
        **kwargs: passed to `from_pretrained` (`revision`, `min_pixels`, `max_pixels`, ...).

    Returns:
        The processor of the checkpoint. Without a working torchvision it has no video processor.

    Raises:
        ValueError: no processor class can be found for the directory.
    """
    kwargs["trust_remote_code"] = trust_remote_code
    if torchvision_works():
        processor = AutoProcessor.from_pretrained(path, **kwargs)
    else:
        processor = image_only_class(_processor_class(path, **kwargs)).from_pretrained(path, backend="pil", **kwargs)
        # Not passed on where `__init__` is replaced: transformers reads its argument names
        if processor.chat_template is None:
            processor.chat_template = ProcessorMixin.get_processor_dict(str(path), **_hub_options(kwargs))[0].get(
                "chat_template"
            )
        _tell_of_images_only(type(processor).__name__)
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"{path} holds {type(processor).__name__}, not a vision-language processor (image processor + tokenizer)."
        )
    return processor


@cache
def _tell_of_images_only(processor: str) -> None:
    """Once per kind of processor: a command may load a dozen."""
    logger.info("torchvision is missing or broken: %s is loaded for images only (PIL backend)", processor)


def _processor_class(path: str | Path, **kwargs: Any) -> type[ProcessorMixin]:
    """The processor class that a checkpoint names, or the one transformers maps to its model type."""
    import transformers
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    hub = _hub_options(kwargs)
    name = None
    processor_dict, _ = ProcessorMixin.get_processor_dict(str(path), **hub)
    if processor_dict:
        name = processor_dict.get("processor_class")
    if name is None:
        try:
            # Older checkpoints name no processor class.
            name = PROCESSOR_MAPPING_NAMES.get(AutoConfig.from_pretrained(path, **hub).model_type)
        except (OSError, ValueError):
            name = None
    if name is None:
        raise ValueError(
            f"No processor found in {path}: expected processor_config.json or preprocessor_config.json with "
            f"`processor_class`, or a config.json "
            "of a known VLM beside them. Pass the directory of the base model."
        )
    return getattr(transformers, name)


def _hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v
        for k, v in kwargs.items()
        if k in ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder")
    }


class NoVideo:
    """Stands where a processor without a video part has none: some copy settings of it on being built."""

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def image_only_class(
    cls: type[ProcessorMixin], without: tuple[str, ...] = ("video_processor",)
) -> type[ProcessorMixin]:
    """A subclass of `cls` that has no video part, or lacks other parts (`without`).

    transformers asks `get_attributes` which parts a processor loads, saves and accepts. The subclass keeps the name, so
    that what it saves is loaded as the full class where torchvision works. Equal arguments give the same class.
    """
    hashable: Any = cls  # mypy takes the hash of instances for that of the class
    return _without(hashable, without)


@cache
def _without(cls: Any, without: tuple[str, ...]) -> type[ProcessorMixin]:
    parts = [name for name in cls.get_attributes() if name not in without]
    if parts == cls.get_attributes():
        return cls

    def input_names(self: Any) -> list[str]:
        # The inherited property would ask the missing video processor.
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names, "mm_token_type_ids"]

    def without_video(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **{**dict.fromkeys(missing), **kwargs})

    members = {
        "get_attributes": classmethod(lambda _: list(parts)),
        "model_input_names": property(input_names),
        "__doc__": cls.__doc__,
        "__module__": __name__,
        # Data workers that are spawned get the processor pickled, and this class has no place of its own in a module.
        "__reduce__": lambda self: (_unpickled, (cls, without), vars(self)),
    }
    if "video_processor" in without:
        members["video_processor"] = NoVideo()
    given = inspect.signature(cls.__init__).parameters
    missing = [name for name in without if name in given and given[name].default is inspect.Parameter.empty]
    if missing:
        members["__init__"] = without_video
    return type(cls.__name__, (cls, _without_parts(cls, parts)), members)


def _unpickled(cls: type[ProcessorMixin], without: tuple[str, ...]) -> ProcessorMixin:
    own = image_only_class(cls, without)
    return own.__new__(own)


def ask_for_token_types(processor: Any, forward: Any) -> None:
    """Makes a processor return the types of its tokens (text, image) where a model's forward takes them: some models
    need them and are shipped with a processor that gives them only when asked."""
    wanted = "mm_token_type_ids" in inspect.signature(forward).parameters
    if wanted and hasattr(processor, "return_mm_token_type_ids"):
        processor.return_mm_token_type_ids = True


def _without_parts(cls: type[ProcessorMixin], parts: list[str]) -> type[ProcessorMixin]:
    """What `cls.__init__` calls as its parent: keeps only `parts` of what the class hands over."""
    full = cls.get_attributes()

    class Kept(ProcessorMixin):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given = {**dict(zip(full, args, strict=False)), **kwargs}
            super().__init__(**{name: value for name, value in given.items() if name in parts or name not in full})

    return Kept
