"""One name for one thing: a function or class of the package is known by its name, in whatever room it is met."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import silkie

PACKAGE = Path(silkie.__file__).parent

# Names that several modules define on purpose: the same role in each of them.
ROLES = {
    "main": "a command",
    "make_parser": "the options of a command",
    "make_trainer": "a trainer, from options or from a recipe of the demo",
    "validate": "public checks: of data, of a selection of losses",
    "detect": "a data source knows its records",
    "aspects": "a data source names the ratings of a record",
    "load_questions": "a benchmark",
    "score_results": "a benchmark",
    "score_items": "a benchmark",
    "export_results": "a benchmark",
    "judge_prompt": "a benchmark that a judge grades",
    "attention": "a backend of attention",
    "forward": "an implementation of the log-probs",
    "backward": "an implementation of the log-probs",
}


def places(root: Path) -> dict[str, set[str]]:
    """Public functions and classes at the top of modules -> the modules that define them."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in root.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
                found[node.name].add(path.relative_to(root).as_posix())
    return found


def shared(root: Path) -> dict[str, list[str]]:
    return {name: sorted(files) for name, files in places(root).items() if len(files) > 1}


def test_a_name_means_one_thing():
    again = {name: files for name, files in shared(PACKAGE).items() if name not in ROLES}
    assert again == {}, "name what each of them does, or add the role that they share to ROLES"


def test_the_roles_are_those_that_exist():
    assert ROLES.keys() - shared(PACKAGE).keys() == set(), "defined once: delete them from ROLES"


def test_a_second_definition_is_found(tmp_path):
    for room in ("data", "batch"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "text.py").write_text("def describe(row): ...\n\n\ndef _row(): ...\n")
    assert shared(tmp_path) == {"describe": ["batch/text.py", "data/text.py"]}
