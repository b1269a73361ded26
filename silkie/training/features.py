"""Whether a run keeps the features of its vision tower on disk, and where."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from datasets import Dataset

from silkie.batch.collator import GroupCollator
from silkie.batch.workers import ranks_here
from silkie.config import SilkieDPOConfig
from silkie.model.families import attention_implementation, backbone, causal_lm
from silkie.model.vision import vision_is_frozen
from silkie.model.vision_cache import NotCacheable, VisionCache, image_bytes_per_token, open_cache
from silkie.training.forward_context import ForwardContext

logger = logging.getLogger(__name__)

_LOOKED_AT = 64  # groups among which two with different images are looked for


def features_on_disk(
    model: Any, dataset: Dataset, collate: GroupCollator, context: ForwardContext, args: SilkieDPOConfig
) -> VisionCache | None:
    """The cache that `vision_cache` asks for, or None, and a line of the log that says why and how large.

    Args:
        model: the policy; it is run on two groups of `dataset`, prepared groups.

    Raises:
        ValueError: a directory is asked for, and the features cannot be kept.
    """
    if args.vision_cache == "off" or "images" not in dataset.column_names:
        return None
    try:
        return _opened(model, dataset, collate, context, args)
    except NotCacheable as error:
        if args.vision_cache != "auto":
            raise ValueError(
                f"vision_cache={args.vision_cache!r}: features of {type(causal_lm(model)).__name__} cannot be kept on"
                f" disk: {error}. Set vision_cache='off'."
            ) from error
        logger.info("vision cache: none (%s)", error)
        return None


def _opened(
    model: Any, dataset: Dataset, collate: GroupCollator, context: ForwardContext, args: SilkieDPOConfig
) -> VisionCache:
    if not vision_is_frozen(model):
        raise NotCacheable("the vision tower trains")
    if args.vision_cache == "auto" and _times_encoded(len(dataset), args) <= 1:
        raise NotCacheable("each image is encoded once")
    if numbered := [name for name, join in collate.joins.items() if join.counts]:
        raise NotCacheable(f"{', '.join(numbered)} of an image depends on the images before it")
    rows: list[dict[str, Any]] = []
    seen: set[tuple[str, ...]] = set()
    for i in range(min(len(dataset), _LOOKED_AT)):
        row = dataset[i]
        if row["image_digests"] and tuple(row["image_digests"]) not in seen and len(rows) < 2:
            seen.add(tuple(row["image_digests"]))
            rows.append(row)
    if len(rows) < 2:
        raise NotCacheable("fewer than two groups with different images to try it on")
    batch: Any = context.prepare(collate(rows))
    base: Any = causal_lm(model)
    given = {
        k: v.to(base.dtype) if v.is_floating_point() else v for k, v in batch["vision"].items() if hasattr(v, "to")
    }
    with context.autocast():
        cache = open_cache(
            model,
            batch,
            directory=Path(args.vision_cache if args.vision_cache != "auto" else f"{args.output_dir}/vision_cache"),
            facts={
                "processor": collate.encoder.facts()["processor"],
                "precision": [str(base.dtype), args.bf16, args.fp16, args.tf32],
                "device": next(iter(given.values())).device.type,
                "attention": attention_implementation(base.config),
            },
            joins={name: join.dim for name, join in collate.joins.items()},
            most=int(args.vision_cache_gb * 2**30),
            ranks=ranks_here(),
            inputs=given,
        )
        compute = backbone(model).get_image_features
        wanted = {name: value for name, value in given.items() if name in batch["vision_sizes"]}
        each = image_bytes_per_token(cache, batch, compute, wanted)
    most = sum(_tokens_by_images(dataset).values()) * each
    logger.info(
        "vision cache: %s, at most %.2f GiB for %s different images or sets of images (%d bytes per image token), room"
        " for %.2f GiB",
        cache.directory,
        most / 2**30,
        f"{len(_tokens_by_images(dataset)):,}",
        each,
        cache.room * ranks_here() / 2**30,
    )
    return cache


def _times_encoded(groups: int, args: SilkieDPOConfig) -> float:
    """How often a run encodes an image: once per epoch, and once for a precomputed reference."""
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    epochs = args.max_steps * step / groups if args.max_steps > 0 else args.num_train_epochs
    return epochs + args.precompute_ref_log_probs


def _tokens_by_images(dataset: Dataset) -> dict[tuple[str, ...], int]:
    """Images of a group -> tokens of its prompt, which are more than its image tokens."""
    digests, lengths = dataset["image_digests"][:], dataset["prompt_length"][:]
    return {tuple(images): tokens for images, tokens in zip(digests, lengths, strict=True) if images}
