"""Turns and content parts in the two ways that `datasets` stores them."""

from __future__ import annotations

from typing import Any


def as_list(value: Any) -> Any:
    """Turns or content parts as a list: `datasets` stores a sequence of objects as one object of lists, {"role": [...],
    ...}."""
    lists = (
        isinstance(value, dict)
        and value.keys() & {"role", "from", "type"}
        and all(isinstance(items, list) for items in value.values())
    )
    if lists and len(set(map(len, value.values()))) == 1:
        return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    return value


def without_nulls(value: Any) -> Any:
    """A value without the null fields that Arrow adds to objects which differ from row to row."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(item) for item in value]
    return value
