"""RLAIF-V: question pairs with the dataset and the split that each image came from."""

from silkie.data.question_pairs import is_question_pair, question_pair
from silkie.data.registry import register_source
from silkie.data.row import Row
from silkie.data.schema import Group

MARKS = {"origin_dataset", "ds_name"}


@register_source(
    "rlaif-v",
    hub_names=("openbmb/RLAIF-V-Dataset",),
    detect=lambda record: is_question_pair(record) and bool(record.keys() & MARKS),
)
def rlaif_v(row: Row) -> Group:
    return question_pair(row)
