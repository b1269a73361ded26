"""Corrupted images for image-conditional preferences (mDPO, arXiv 2406.11839, section 3.2): the same answer should be
less likely when the image no longer shows what it says.

A corrupted image keeps its size, so its tokens and positions are those of the original and the corrupted pass is packed
in the same way."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageFilter

Corruption = Literal["crop", "noise", "blur", "other_image"]
CORRUPTIONS: tuple[str, ...] = get_args(Corruption)


def corrupt(
    image: Image.Image,
    kind: Corruption,
    rng: random.Random,
    *,
    strength: float = 1.0,
    others: Sequence[Image.Image] = (),
) -> Image.Image:
    """A corrupted copy of an RGB image, of the same size.

    Args:
        kind: "crop" keeps a random 0 to 20 % of the area, enlarged to the full size (the paper's choice); "noise" mixes
            in Gaussian noise; "blur" is Gaussian, with a radius of an eighth of the shorter side; "other_image" takes
            one of `others`, resized.
        rng: decides; the same state gives the same image.
        strength: in (0, 1]. crop: share of the area that goes at least (1: at least 80 %); noise: its share of the mix;
            blur: factor of the radius.
        others: images of other groups of the batch. Where there are none, "other_image" crops instead.

    Raises:
        ValueError: an unknown kind, or a strength outside (0, 1].
    """
    if not 0 < strength <= 1:
        raise ValueError(f"corruption strength must be in (0, 1], not {strength}")
    if kind == "other_image" and others:
        return others[rng.randrange(len(others))].convert("RGB").resize(image.size, Image.Resampling.BICUBIC)
    if kind in ("crop", "other_image"):
        return _crop(image, rng, largest=1 - 0.8 * strength)
    if kind == "noise":
        pixels = np.asarray(image, dtype=np.float32)
        noise = np.random.default_rng(rng.getrandbits(32)).normal(127.5, 64.0, pixels.shape)
        return Image.fromarray(np.clip((1 - strength) * pixels + strength * noise, 0, 255).astype(np.uint8))
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(strength * min(image.size) / 8))
    raise ValueError(f"unknown corruption {kind!r}; expected one of {', '.join(CORRUPTIONS)}")


def _crop(image: Image.Image, rng: random.Random, *, largest: float) -> Image.Image:
    share = rng.uniform(0, largest)
    width, height = (max(1, round(side * share**0.5)) for side in image.size)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height)).resize(image.size, Image.Resampling.BICUBIC)
