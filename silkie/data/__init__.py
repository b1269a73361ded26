"""Preference data: any supported source to preference groups. See `load_preferences`, `build_pairs` and
`register_source`."""

from silkie.data.images import ImageError, image_digest, open_image, read_bytes, to_rgb
from silkie.data.loading import load_preferences, load_with_report
from silkie.data.mixing import mix
from silkie.data.pairs import PairOptions, Pairs, build_pairs, parse_rating
from silkie.data.rebuild import rebuild_pairs, repair_pairs
from silkie.data.registry import SOURCES, Source, register_source
from silkie.data.regroup import regroup, regroup_with_report
from silkie.data.reports import LoadReport, Problem, RegroupReport, ValidationReport
from silkie.data.resolver import ImageResolver
from silkie.data.row import Row
from silkie.data.schema import (
    VLFEEDBACK_ASPECTS,
    DataError,
    Group,
    RowError,
    SkipRow,
    aspects_of,
    group_features,
    is_group_features,
    mean_rating,
    text_turn,
    to_messages,
    user_turn,
)
from silkie.data.splits import Leak, LeakError, check_leak, split_groups
from silkie.data.validation import validate, validate_with_report

__all__ = [
    "SOURCES",
    "VLFEEDBACK_ASPECTS",
    "DataError",
    "Group",
    "ImageError",
    "ImageResolver",
    "Leak",
    "LeakError",
    "LoadReport",
    "PairOptions",
    "Pairs",
    "Problem",
    "RegroupReport",
    "Row",
    "RowError",
    "SkipRow",
    "Source",
    "ValidationReport",
    "aspects_of",
    "build_pairs",
    "check_leak",
    "group_features",
    "image_digest",
    "is_group_features",
    "load_preferences",
    "load_with_report",
    "mean_rating",
    "mix",
    "open_image",
    "parse_rating",
    "read_bytes",
    "rebuild_pairs",
    "register_source",
    "regroup",
    "regroup_with_report",
    "repair_pairs",
    "split_groups",
    "text_turn",
    "to_messages",
    "to_rgb",
    "user_turn",
    "validate",
    "validate_with_report",
]
