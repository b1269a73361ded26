import random

import numpy as np
import pytest

from silkie.batch.corruption import CORRUPTIONS, corrupt
from tests.support.tiny import image


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_same_size_another_picture_same_seed_same_picture(kind):
    original = image(0, 70, 42)
    once, twice = (corrupt(original, kind, random.Random(3), others=[image(1)]) for _ in range(2))
    assert once.size == original.size and once.mode == "RGB"
    assert np.array_equal(np.asarray(once), np.asarray(twice))
    assert np.abs(np.asarray(once, float) - np.asarray(original, float)).mean() > 5


def test_the_only_image_of_a_batch_is_cropped():
    a, b = (corrupt(image(0), kind, random.Random(3)) for kind in ("other_image", "crop"))
    assert np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("strength", [0.0, 1.5])
def test_strength_is_checked(strength):
    with pytest.raises(ValueError, match="strength"):
        corrupt(image(0), "blur", random.Random(0), strength=strength)
