"""A benchmark is one file: what is in the folder is known by name, in the help of the command line, and in one
order."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from silkie.evaluation import BENCHMARKS, benchmarks
from silkie.evaluation.__main__ import main
from silkie.evaluation.options import layouts

NEW = """
from silkie.evaluation.benchmark import Benchmark

BENCHMARK = Benchmark(
    name="colours", title="Colours", load_questions=list, score_results=list, export_results=list, layout="one a line"
)
"""


def test_every_file_of_the_folder_is_a_benchmark_in_the_order_of_names():
    files = sorted(path.stem for path in Path(benchmarks.__file__).parent.glob("[!_]*.py"))
    assert list(BENCHMARKS) == files == ["amber", "chair", "mme", "mmhal", "mmvet", "pope", "redteam"]


def test_a_new_file_is_found_without_another_line(tmp_path, monkeypatch):
    (tmp_path / "colours.py").write_text(NEW)
    (tmp_path / "_part.py").write_text("raise RuntimeError('parts are not benchmarks')")
    monkeypatch.setattr(benchmarks, "__path__", [*benchmarks.__path__, str(tmp_path)])
    found = benchmarks._found()
    monkeypatch.delitem(sys.modules, "silkie.evaluation.benchmarks.colours")
    assert list(found) == sorted([*BENCHMARKS, "colours"]) and found["colours"].layout == "one a line"


def test_a_file_that_defines_none_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "empty_one.py").write_text("")
    monkeypatch.setattr(benchmarks, "__path__", [*benchmarks.__path__, str(tmp_path)])
    with pytest.raises(AttributeError, match="empty_one.* has no attribute 'BENCHMARK'"):
        benchmarks._found()
    monkeypatch.delitem(sys.modules, "silkie.evaluation.benchmarks.empty_one")


def test_the_help_tells_every_layout(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["score", "--help"])
    shown = capsys.readouterr().out
    assert layouts() in shown
    for benchmark in BENCHMARKS.values():
        assert benchmark.layout and all(line in shown for line in benchmark.layout.split("\n")), benchmark.name
