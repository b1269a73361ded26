"""Two runs on one page, and the scorers' caveats beside their numbers."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from silkie.report.__main__ import main
from silkie.report.collect import collect
from silkie.report.render import render
from silkie.report.schema import BenchmarkRow, Report, System
from silkie.report.side_by_side import side_by_side


def answers(path, *, right: int, of: int = 10, unread: int = 0):
    """MME's layout: two questions per image, of which `right` images are answered rightly and `unread` not at all."""
    lines = []
    for i in range(of):
        for label in ("Yes", "No"):
            said = "Perhaps." if i >= of - unread else label if i < right else "Yes"
            lines.append(f"{i}.png\tIs it {label}? Please answer yes or no.\t{label}\t{said}\n")
    path.mkdir(parents=True)
    (path / "existence.txt").write_text("".join(lines))


@pytest.fixture
def runs(tmp_path):
    made = []
    for name, right, rate in (("first", 2, 1e-5), ("second", 9, 1e-6)):
        root = tmp_path / name
        answers(root / "base", right=0)
        answers(root / "trained", right=right, unread=1 if name == "second" else 0)
        report = {
            "configuration": {"Training": {"learning_rate": rate, "beta": 0.1}},
            "data": {"train": {"groups": 5}},
            "log_history": [{"step": s, "loss": 0.7 - right * s / 100, "rewards/margins": s} for s in (1, 2, 3)],
            "evaluations": [{"benchmark": "mme", "systems": {"base": "base", "trained": "trained"}}],
            "benchmarks": [
                {"name": "Exact", "systems": [{"name": "base", "value": 0.1}, {"name": "dpo", "value": right / 10}]}
            ],
        }
        (root / "report.json").write_text(json.dumps(report))
        made.append(root)
    return made


def test_trained_systems_are_compared_pair_by_pair(runs):
    report = side_by_side(*runs)
    assert report.names == ("first", "second") and report.title == "first and second"
    row = next(row for row in report.benchmarks if row.headline)
    first, second = row.systems
    assert (first.name, second.name) == ("first", "second")
    assert second.difference == second.value - first.value and second.difference_low is not None
    assert first.value == collect(runs[0]).benchmarks[0].systems[1].value, "the trained system's, not the base's"
    (given,) = (row for row in report.benchmarks if row.name == "Exact")
    assert [s.value for s in given.systems] == [0.2, 0.9] and given.systems[1].difference == pytest.approx(0.7)
    assert given.systems[1].difference_low is None
    flips = {card.flip for card in report.gallery}
    assert "fixed" in flips and report.gallery[0].base.answer != ""


def test_curves_share_panels_and_only_what_differs_stands_first(runs):
    report = side_by_side(*runs)
    loss = next(curve for curve in report.curves if curve.title == "Loss")
    assert list(loss.series) == ["first", "second"] and len(loss.series["first"]) == 3
    assert report.configuration["Configuration that differs"] == {
        "Training: learning_rate": "first 1e-05 | second 1e-06"
    }
    assert report.configuration["The same in both"] == {"Training: beta": 0.1}
    assert report.data == {"The same in both": {"train: groups": 5}}


def test_what_one_run_lacks_is_said(runs):
    described = json.loads((runs[1] / "report.json").read_text())
    (runs[1] / "report.json").write_text(json.dumps(described | {"evaluations": []}))
    report = side_by_side(*runs)
    assert "mme was answered by one of the runs only." in report.notes
    assert [row.name for row in report.benchmarks] == ["Exact"]


def test_the_command_writes_the_page(runs, tmp_path, capsys):
    assert main([str(runs[0]), str(runs[1])]) == 0
    page = runs[0] / "report_vs_second.html"
    assert str(page) in capsys.readouterr().out and "first and second" in page.read_text()
    shutil.rmtree(runs[1])
    assert main([str(runs[0]), str(runs[1])]) == 2
    assert "error:" in capsys.readouterr().err


def test_caveats_stand_beside_the_number(runs):
    report = collect(runs[1])
    headline = next(row for row in report.benchmarks if row.headline)
    base, trained = headline.systems
    assert any("subtask" in text for text in base.caveats), "MME without 13 subtasks is not the official number"
    assert any("unreadable" in text for text in trained.caveats) and not any("unread" in text for text in base.caveats)
    page = render(report)
    table = page[page.index('id="benchmarks"') :]
    caveats = re.findall(r'<p class="caveat">⚠ (.*?)</p>', table)
    assert any(text.startswith("trained: ") and "unreadable" in text for text in caveats)
    assert sum("subtask" in text for text in caveats) == 1, "what all systems' scorers say is said once"
    assert re.search(r'<td class="n[^>]*>[\d.]+ <span class="mark" title="[^"]*unreadable', table)


def test_a_caveat_is_escaped():
    system = System(name="a", value=1.0, caveats=("<script>alert(1)</script>",))
    row = BenchmarkRow(name="B", systems=(system, System(name="b", value=2.0)), headline=True)
    page = render(Report(title="t", benchmarks=[row]))
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
