"""The site's pages are the repository's Markdown where it lies, so that one text serves GitHub and the site.

Files keep their paths. Scripts, figures and the licence that pages link to are copied; a link to a folder is left to
its text. One page is made here: the Python interface, from docstrings.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("*.md", "examples/**/*.md", "tests/benchmarks/*.md", "silkie/demo/*.md")
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
PYTHON = {
    "Train": ["silkie.SilkieDPOTrainer", "silkie.SilkieDPOConfig"],
    "Data": [
        "silkie.data.load_preferences",
        "silkie.data.mix",
        "silkie.data.split_groups",
        "silkie.data.register_source",
        "silkie.data.open_image",
    ],
    "Use": ["silkie.inference.load_policy", "silkie.inference.generate"],
    "Losses": ["silkie.losses.build_objective", "silkie.losses.options.LossOptions", "silkie.losses.pairwise"],
    "Log-probs": ["silkie.logprob"],
    "Feedback": ["silkie.feedback"],
    "Evaluation": ["silkie.evaluation"],
    "Reports": ["silkie.report"],
}


def on_files(files: Files, config: Any) -> Files:
    """Adds the repository's pages, what they link to, and the page of the Python interface."""
    pages = sorted({path for pattern in PAGES for path in ROOT.glob(pattern)})
    linked = {target for page in pages for target in _targets(page) if target.is_file()}
    for path in [*pages, *sorted(linked - set(pages))]:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    files.append(File.generated(config, "examples/reference/python.md", content=python_page()))
    return files


def _targets(page: Path) -> set[Path]:
    return {
        (page.parent / target).resolve()
        for _, target, _ in LINK.findall(page.read_text(encoding="utf-8"))
        if not target.startswith(("http", "/"))
    }


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """A link to a folder has no page here: its text stays."""
    here = ROOT / PurePosixPath(page.file.src_uri).parent

    def shown(match: re.Match[str]) -> str:
        text, target, _ = match.groups()
        return text if not target.startswith("http") and (here / target).is_dir() else match[0]

    return LINK.sub(shown, markdown)


def python_page() -> str:
    """mkdocstrings' directives for the public names."""
    parts = ["# The Python interface"]
    for title, names in PYTHON.items():
        parts += [f"## {title}", *(f"::: {name}" for name in names)]
    return "\n\n".join(parts) + "\n"
