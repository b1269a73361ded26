"""Tables of plain text."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["table"]


def table(rows: Iterable[Iterable[str]], *, indent: str = "") -> str:
    """Aligned columns: the first to the left, the others to the right. Short rows are filled with empty cells."""
    lines = [list(row) for row in rows]
    count = max(map(len, lines), default=0)
    if not count:
        return ""
    lines = [line + [""] * (count - len(line)) for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(f"{indent}{_aligned(line, widths)}".rstrip() for line in lines)


def _aligned(cells: list[str], widths: list[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])
