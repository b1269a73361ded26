"""MMPR: JSON lines of {image: path or list of paths, question, chosen, rejected}, listed in a meta.json that names the
image root of each file.

Question pairs without the marks of another dataset are read by this source too, text-only rows included.
"""

from silkie.data.question_pairs import is_question_pair, question_pair
from silkie.data.registry import register_source
from silkie.data.row import Record, Row
from silkie.data.schema import Group
from silkie.data.sources.rlaif_v import MARKS


def detect(record: Record) -> bool:
    return is_question_pair(record) and not record.keys() & {*MARKS, "image_name"}


@register_source("mmpr", hub_names=("OpenGVLab/MMPR", "OpenGVLab/MMPR-v1.1", "OpenGVLab/MMPR-v1.2"), detect=detect)
def mmpr(row: Row) -> Group:
    return question_pair(row, identifier="id", text_only=True)
