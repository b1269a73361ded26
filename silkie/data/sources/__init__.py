"""The built-in sources. Importing this package registers all of them."""

from silkie.data.sources import (
    groups,
    llava_rlhf,
    mm_rlhf,
    mmpr,
    rlaif_v,
    rlhf_v,
    sharegpt,
    spa_vl,
    trl_pairs,
    vlfeedback,
)

__all__ = [
    "groups",
    "llava_rlhf",
    "mm_rlhf",
    "mmpr",
    "rlaif_v",
    "rlhf_v",
    "sharegpt",
    "spa_vl",
    "trl_pairs",
    "vlfeedback",
]
