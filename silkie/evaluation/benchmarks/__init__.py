"""The benchmarks, one module each: a new file here that ends with `BENCHMARK = Benchmark(...)` is known by its name, on
the command line and in its help. Modules whose name starts with an underscore are parts of another."""

from __future__ import annotations

import importlib
import pkgutil

from silkie.evaluation.benchmark import Benchmark

__all__ = ["BENCHMARKS", "get_benchmark"]


def _found() -> dict[str, Benchmark]:
    """The `BENCHMARK` of every module, in the order of the modules' names: the same on every machine."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    found = [importlib.import_module(f"{__name__}.{name}").BENCHMARK for name in names]
    return {benchmark.name: benchmark for benchmark in found}


BENCHMARKS: dict[str, Benchmark] = _found()


def get_benchmark(name: str) -> Benchmark:
    """A benchmark by name (any case), or a custom one by the path of its YAML definition.

    Raises:
        ValueError: neither; the message lists what there is.
    """
    if name.endswith((".yaml", ".yml")):
        from silkie.evaluation.yaml_benchmark import load_definition

        return load_definition(name)
    known = BENCHMARKS.get(name.lower().replace("-", "").replace("_", "").replace("bench", ""))
    if known is None:
        raise ValueError(
            f"Unknown benchmark {name!r}. Expected one of {', '.join(BENCHMARKS)}, or the path of a YAML definition."
        )
    return known
