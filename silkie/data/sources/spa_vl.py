"""SPA-VL: question pairs on safety, each with an `image_name`."""

from silkie.data.question_pairs import is_question_pair, question_pair
from silkie.data.registry import register_source
from silkie.data.row import Row
from silkie.data.schema import Group
from silkie.data.sources.rlaif_v import MARKS


@register_source(
    "spa-vl",
    hub_names=("sqrti/SPA-VL",),
    detect=lambda record: is_question_pair(record) and "image_name" in record and not record.keys() & MARKS,
)
def spa_vl(row: Row) -> Group:
    return question_pair(row)
