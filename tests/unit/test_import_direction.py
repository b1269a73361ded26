"""The rooms of silkie import in one direction: data <- batch <- model <- training <- trainer, and no circles."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import silkie

PACKAGE = Path(silkie.__file__).parent

GROUND = {"endpoint", "io", "stats"}  # what rooms beside each other share
FLOW = {"data", "batch", "model", "logprob", "losses", "training", "config", "trainer"}

# Room -> rooms that it may import, anywhere in its files: at the top, in functions, for types.
ALLOWED: dict[str, set[str]] = {
    "logprob": set(),
    "losses": set(),
    "io": set(),
    "stats": set(),
    "data": {"io", "stats"},
    "endpoint": {"data", "io"},  # media: images of the data to URLs
    "batch": {"data", "io"},  # workers: the cores that a job may use
    "model": {"data", "batch", "logprob"},
    "config": {"data", "batch", "model", "logprob", "losses"},
    "training": {"data", "batch", "model", "logprob", "losses", "config", "io"},
    "trainer": {"data", "batch", "model", "logprob", "losses", "config", "training"},
    "inference": {"data", "io", "model"},
    "feedback": {"data", "inference", *GROUND},
    "evaluation": {"data", "inference", *GROUND},
    "report": {"data", "evaluation", *GROUND},
    "plan": FLOW | {"io"},
    # silkie/run/rounds is the loop over what stands beside the flow
    "run": {"plan", "inference", "feedback", "evaluation", "report", *GROUND, *FLOW},
    "__init__": FLOW | {"io"},
    "__main__": {"io"},  # the console command names the modules of its commands and imports one when it is called
}
MAY_IMPORT_ALL = {"demo"}  # it shows the whole loop; nothing imports it

# Arrows against the direction that stay on purpose: (file, room) -> reason.
ON_PURPOSE = {
    ("data/__main__.py", "report"): "`python -m silkie.data inspect --html` writes a report page; only then imported",
    ("evaluation/__main__.py", "report"): "`compare --html` writes the report page",
    ("model/__main__.py", "io"): "`silkie check` has the parser of all commands",
    ("model/__main__.py", "plan"): "`check` and `sweep` run the whole flow on a model",
    ("trainer.py", "plan"): "gradient_checkpointing='auto' asks the planner's memory model when training starts",
    ("trainer.py", "evaluation"): "eval_benchmarks answers benchmarks while training; imported only where asked for",
}
TORCH_ONLY = {"logprob": {"torch", "triton"}, "losses": {"torch"}}
MOST_ENTRIES = 18


@dataclass(frozen=True)
class Import:
    file: str  # inside the package, with forward slashes
    line: int
    target: str  # dotted name; of `from a import b` it is a.b
    at_import: bool  # runs when the file is imported: not in a function, not for types only

    @property
    def room(self) -> str:
        return Path(self.file).parts[0].removesuffix(".py")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports_of(root: Path) -> Iterator[Import]:
    """Every import of every file of the package in `root`."""
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root).as_posix()
        package = [root.name, *path.relative_to(root).parent.parts]
        for node, at_import in walk(tree_of(path)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
                base = ".".join(part for part in (base, node.module) if part)
                names = [f"{base}.{alias.name}" for alias in node.names]
            yield from (Import(file, node.lineno, name, at_import) for name in names)


def walk(node: ast.AST, at_import: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_import
        types_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        later = types_only or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from walk(child, at_import and not later)


def wrong_arrows(root: Path, exceptions: set[tuple[str, str]]) -> tuple[list[str], set[tuple[str, str]]]:
    """Sentences about imports against the direction, and the exceptions that nothing uses any more."""
    found, unused = [], set(exceptions)
    for item in imports_of(root):
        parts = item.target.split(".")
        if parts[0] != root.name or len(parts) < 2 or item.room in MAY_IMPORT_ALL:
            continue
        target = parts[1]
        if not ((root / target).is_dir() or (root / f"{target}.py").exists()):
            continue  # a name that `silkie` itself exports
        if target == item.room or target in ALLOWED.get(item.room, set()):
            continue
        unused.discard((item.file, target))
        if (item.file, target) not in exceptions:
            allowed = ", ".join(sorted(ALLOWED.get(item.room, set()))) or "no other room"
            found.append(
                f"{item.file}:{item.line} imports {item.target}: {item.room} may import {allowed}. Move what it needs"
                f" down, or pass it in."
            )
    return found, unused


def foreign_imports(root: Path) -> list[str]:
    """Sentences about packages besides torch and triton that `logprob` and `losses` import."""
    return [
        f"{item.file}:{item.line} imports {item.target}: {item.room} may import {', '.join(sorted(known))} only."
        for item in imports_of(root)
        if (known := TORCH_ONLY.get(item.room))
        and (top := item.target.split(".")[0]) not in known
        and top not in sys.stdlib_module_names
        and top != root.name
    ]


def circle(root: Path) -> list[str]:
    """The modules of a circle of imports that run when a module is imported; empty where there is none."""
    graph: dict[str, set[str]] = {}
    for item in imports_of(root):
        if item.at_import and item.target.split(".")[0] == root.name:
            target = module_file(root, item.target)
            if target and target != item.file:
                graph.setdefault(item.file, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def module_file(root: Path, target: str) -> str | None:
    """The file that `import target` or `from package import name` loads."""
    parts = target.split(".")[1:]
    for names in (parts, parts[:-1]):
        if not names:
            continue
        path = root.joinpath(*names)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.exists():
                return file.relative_to(root).as_posix()
    return None


def untyped_trainers(root: Path) -> list[str]:
    """Parameters called `trainer` with no type, or with `Any`."""
    found = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.arg) and node.arg == "trainer":
                kind = ast.unparse(node.annotation) if node.annotation else "nothing"
                if kind in ("Any", "nothing"):
                    found.append(f"{path.relative_to(root)}:{node.lineno} takes a trainer annotated with {kind}")
    return found


def test_rooms_import_to_their_left_only():
    found, unused = wrong_arrows(PACKAGE, set(ON_PURPOSE))
    assert not found, "\n".join(found)
    assert not unused, f"these exceptions are used no longer, delete them: {sorted(unused)}"


def test_every_room_is_in_the_table_and_there_are_few_enough():
    entries = {
        p.name.removesuffix(".py") for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    rooms = entries - {"__init__", "__main__", "__pycache__"}
    assert rooms <= ALLOWED.keys() | MAY_IMPORT_ALL, rooms - ALLOWED.keys()
    assert len(rooms) <= MOST_ENTRIES, sorted(rooms)


def test_logprob_and_losses_need_torch_and_triton_only():
    assert not (found := foreign_imports(PACKAGE)), "\n".join(found)


def test_there_are_no_circles():
    assert not (found := circle(PACKAGE)), " -> ".join(found)


def test_no_function_takes_the_trainer_as_anything():
    assert not (found := untyped_trainers(PACKAGE)), "\n".join(found)


def test_evaluation_and_feedback_are_not_in_each_others_table():
    assert "feedback" not in ALLOWED["evaluation"] and "evaluation" not in ALLOWED["feedback"]
    assert not any("demo" in rooms for rooms in ALLOWED.values())


@pytest.mark.parametrize(
    ("file", "line", "sentence"),
    [
        ("batch/collator.py", "from silkie.model.families import PromptPositions", "batch may import data"),
        (
            "model/layout.py",
            "def f():\n    from silkie.training import guards",
            "model may import batch, data, logprob",
        ),
        ("losses/pairwise.py", "from ..model import forward", "losses may import no other room"),
        ("evaluation/run.py", "import silkie.feedback.items", "evaluation may import"),
        ("run.py", "if TYPE_CHECKING:\n    from silkie.demo.loop import DPO", "run may import"),
    ],
)
def test_a_forbidden_import_fails_with_a_sentence(tmp_path, file, line, sentence):
    root = a_tree(tmp_path, {file: line})
    (found,), _ = wrong_arrows(root, set())
    assert f"{file}:" in found and sentence in found


def test_a_circle_a_foreign_package_and_an_untyped_trainer_are_found(tmp_path):
    root = a_tree(
        tmp_path,
        {
            "data/a.py": "from silkie.data.b import x",
            "data/b.py": "from silkie.data import a",
            "losses/listwise.py": "import numpy as np",
            "training/model_card.py": "def write(trainer: Any): ...",
        },
    )
    assert set(circle(root)) == {"data/a.py", "data/b.py"}
    assert "losses may import torch only" in foreign_imports(root)[0]
    assert len(untyped_trainers(root)) == 1


def test_an_import_in_a_function_makes_no_circle(tmp_path):
    root = a_tree(
        tmp_path, {"data/a.py": "def f():\n    from silkie.data import b", "data/b.py": "import silkie.data.a"}
    )
    assert not circle(root)


def a_tree(folder: Path, files: dict[str, str]) -> Path:
    root = folder / "silkie"
    for room in (*FLOW, "feedback", "demo", "evaluation"):
        (root / room).mkdir(parents=True)
        (root / room / "__init__.py").touch()
    for file, text in files.items():
        (root / file).write_text(text + "\n")
    return root
