"""TRL's unpaired preference rows (thumbs up and down, for KTO): prompt, completion and label, `image` or `images`."""

from __future__ import annotations

from typing import Any

from silkie.data.columns import reading
from silkie.data.conversations import as_list
from silkie.data.registry import Row, register_source
from silkie.data.schema import Group
from silkie.data.sources.trl_pairs import prompt_and_responses, refuse_videos


@register_source("trl-unpaired", detect=lambda record: reading(record).kind == "label")
def trl_unpaired(row: Row) -> Group:
    refuse_videos(row)
    kinds = (str, list, dict)
    prompt = as_list(row.require("prompt", kinds, "a string or a conversation"))
    completion = as_list(row.require("completion", kinds, "a non-empty response: a string or a conversation"))
    columns = prompt_and_responses(row, prompt, {"completion": completion})
    return Group(**columns, pairs=[], labels=[_label(row)])


def _label(row: Row) -> bool:
    value: Any = row.require("label", object, "true (desirable) or false")
    if value not in (True, False):  # 1 and 0 are equal to these
        raise row.error("label", value, "true (desirable) or false")
    return bool(value)
