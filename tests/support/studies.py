"""The scripts of recipes/studies as modules, found as Python finds them when they are run: with their own folder on the
path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

STUDIES = Path(__file__).parents[2] / "recipes" / "studies"


def load_study(name: str) -> ModuleType:
    """The module of `recipes/studies/<name>.py`, such as "ablation" or "base_model/pretrain"."""
    file = STUDIES / f"{name}.py"
    module_name = "studies_" + name.replace("/", "_")
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # dataclasses look their module up by name
        sys.path.insert(0, str(file.parent))
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(file.parent))
    return sys.modules[module_name]
