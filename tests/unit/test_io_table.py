"""Plain text tables."""

from silkie.io.table import table


def test_columns_are_aligned_and_short_rows_filled():
    rows = [("name", "n", "share"), ("a", "10"), ("longer", "9", "50 %")]
    assert table(rows) == "name     n  share\na       10\nlonger   9   50 %"
    assert table(rows, indent="  ").splitlines()[1] == "  a       10"
    assert table([]) == "" and table([[]]) == ""
