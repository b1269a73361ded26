"""Metric names for readers."""

from __future__ import annotations

__all__ = ["metric_name"]

METRIC_NAMES = {
    "chair_s": "CHAIR-s",
    "chair_i": "CHAIR-i",
    "chair": "CHAIR",
    "hal": "Hal",
    "cog": "Cog",
    "cover": "Cover",
    "amber": "AMBER score",
    "f1": "F1",
    "acc": "accuracy",
    "acc_plus": "accuracy+",
    "yes_rate": "yes-rate",
}


def metric_name(metric: str) -> str:
    """As the field writes it; others with spaces for underscores."""
    return METRIC_NAMES.get(metric, metric.replace("_", " "))
