"""The one table of losses, collected from the modules that declare them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from . import listwise, multimodal, pairwise, reference_free, unpaired
from .spec import DECLARED, LossSpec

# In the order in which messages and documents list them
_MODULES = (pairwise, reference_free, multimodal, listwise, unpaired)

SPECS: dict[str, LossSpec] = {
    name: spec for module in _MODULES for name, spec in DECLARED.items() if spec.fn.__module__ == module.__name__
}
LOSSES: dict[str, Callable[..., Tensor]] = {name: spec.fn for name, spec in SPECS.items()}
DIFFERENCE = frozenset(name for name, spec in SPECS.items() if spec.difference)
