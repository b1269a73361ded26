"""The embedded demo: a world whose ground truth is exact, a small base model with declared flaws, an oracle judge, and
the whole preference loop."""
