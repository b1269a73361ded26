"""The notebook runs from its first cell to its last, in ten minutes on a CPU."""

from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples/quickstart.ipynb"


def test_it_is_stored_without_outputs():
    cells = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    assert len(cells) > 5 and not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.slow
def test_it_runs_and_training_orders_held_out_answers(monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, 4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(ROOT))
    text = "".join(o.get("text", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
    last = [line for line in text.splitlines() if line.startswith("epoch ")][-1]
    assert float(last.split("right order ")[1].split(",")[0]) > 0.7, last
    assert "base:" in text and "trained:" in text and "report.html" in text
