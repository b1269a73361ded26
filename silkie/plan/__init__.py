"""Memory and compute of a run before any GPU is rented: `python -m silkie.plan MODEL --gpus N --memory 80GB`."""

from silkie.plan.memory import ENGINES, Engine, Plan, Training, Workload, choose, estimate, load_shape, parse_memory
from silkie.plan.shapes import SHAPES, ModelShape, shape_of

__all__ = [
    "ENGINES",
    "SHAPES",
    "Engine",
    "ModelShape",
    "Plan",
    "Training",
    "Workload",
    "choose",
    "estimate",
    "load_shape",
    "parse_memory",
    "shape_of",
]
