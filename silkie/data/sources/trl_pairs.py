"""TRL's preference rows: prompt, chosen and rejected as strings or conversations, `image` or `images`.

The prompt may be implicit (the shared beginning of chosen and rejected); TRL's own function extracts it.
"""

from __future__ import annotations

from silkie.data.conversations import answer, answer_text, as_list, conversation, question
from silkie.data.registry import Record, Row, register_source
from silkie.data.schema import Group
from silkie.data.sources.mm_rlhf import skip_tie


def detect(record: Record) -> bool:
    if not {"chosen", "rejected"} <= record.keys() or record.keys() & {
        "question",
        "conversations",
        "messages",
        "instruction",
        "is_tie",
        "video",
    }:
        return False
    return "prompt" in record or isinstance(as_list(record["chosen"]), list)


@register_source("trl", hub_names=("HuggingFaceH4/rlaif-v_formatted",), detect=detect)
def trl_pairs(row: Row) -> Group:
    for column in ("videos", "video"):
        if row.get(column):
            raise row.error(
                column,
                row.get(column),
                "no videos",
                "silkie trains on images and text; drop these rows or sample frames into `images`. MM-RLHF:"
                " format='mm-rlhf' counts them.",
            )
    skip_tie(row)
    for column in ("tools", "chat_template_kwargs"):
        value = row.get(column)
        # `datasets` fills a struct's absent fields with None
        if value and (not isinstance(value, dict) or any(option is not None for option in value.values())):
            raise row.error(
                column,
                value,
                "no template options per row",
                "silkie writes every row with the processor's chat template alone: set the option in"
                " `processor.chat_template`, or remove the column.",
            )
    images = row.images("images", "image")
    prompt = row.get("prompt")
    if "prompt" not in row.record:
        implicit = implicit_prompt(row)
        prompt, chosen, rejected = implicit["prompt"], implicit["chosen"], implicit["rejected"]
        responses = [answer_text(row, chosen, "chosen"), answer_text(row, rejected, "rejected")]
    else:
        row.require("prompt", (str, list, dict), "a string or a conversation")
        responses = [answer(row, "chosen"), answer(row, "rejected")]
    return Group(
        id=row.get("id"),
        images=images,
        prompt=(
            question(row, prompt, images, "prompt")
            if isinstance(prompt, str)
            else conversation(row, prompt, images, "prompt")
        ),
        responses=responses,
        pairs=[(0, 1)],
    )


def implicit_prompt(row: Row) -> dict:
    """Split chosen and rejected conversations into their shared beginning and the two answers."""
    from trl.data_utils import extract_prompt  # imported here: it takes seconds, and few datasets need it

    expected, talks = "a conversation, as there is no prompt column", {}
    for column in ("chosen", "rejected"):
        talks[column] = as_list(row.require(column, (list, dict), expected))
        if not talks[column] or not isinstance(talks[column], list):
            raise row.error(column, talks[column], expected)
    return extract_prompt(talks)
