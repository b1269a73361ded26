"""Every row of `examples/from_trl.md` that is data or an option, in the installed TRL and in silkie."""

import copy
import logging

import datasets
import pytest

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.training.guards import LaunchError
from tests.conformance.cases import TABLE
from tests.conformance.compare import Case, build, history, stock
from tests.conformance.table import PAGE, page

ALL = [case for cases in TABLE.values() for case in cases]
TOLERANCE = 2e-4  # fp32 sums in another order, over two steps


def is_slow(case: Case) -> bool:
    """The losses are slow ones: `tests/numerics/test_losses_trl.py` compares each with TRL's in every run. So are all
    adapters but one."""
    return case.expected == "same" and ("loss_type" in case.options or case.name.startswith("another adapter"))


def of(kind: str) -> list:
    return [
        pytest.param(case, id=case.name, marks=pytest.mark.slow if is_slow(case) else ())
        for case in ALL
        if case.expected == kind
    ]


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()


def trl(case: Case, tmp_path):
    return history(build(*stock(case), copy.deepcopy(case), tmp_path / "trl"), case.metrics)


def silkie(case: Case, tmp_path):
    return history(build(SilkieDPOTrainer, SilkieDPOConfig, case, tmp_path / "silkie"), case.metrics)


def largest_difference(first, second):
    assert len(first) == len(second) > 0
    return max(abs(a - b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("case", of("same"))
def test_same_numbers(case, tmp_path):
    ours = silkie(case, tmp_path)
    if case.trl_crashes:  # then it must equal what TRL makes of the same rows in its own form
        with pytest.raises(Exception):  # noqa: B017
            trl(case, tmp_path)
        theirs = trl(Case(name="plain rows"), tmp_path)
    else:
        theirs = trl(case, tmp_path)
    assert largest_difference(theirs, ours) <= TOLERANCE


@pytest.mark.parametrize("case", of("different"))
def test_different_and_said(case, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="silkie"):
        ours = silkie(case, tmp_path)
    assert ours and case.why
    if case.trl_crashes:
        with pytest.raises(Exception):  # noqa: B017
            trl(case, tmp_path)
    else:
        assert largest_difference(trl(case, tmp_path), ours) > TOLERANCE
        assert "TRL" in caplog.text


@pytest.mark.parametrize("case", of("refused"))
def test_refused_with_what_to_do_instead(case, tmp_path):
    with pytest.raises((ValueError, TypeError, LaunchError), match=case.why):
        build(SilkieDPOTrainer, SilkieDPOConfig, case, tmp_path)


def test_the_page_is_what_the_cases_say():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.conformance.table"
