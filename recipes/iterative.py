"""On-policy rounds as a script, `silkie loop` by another name: sample, rate, train on, evaluate; again.

    python recipes/iterative.py loop.yaml

examples/on_policy.md shows the file and what comes out. `python recipes/studies/iterative.py` runs rounds of the
embedded demo, whose judge is a function, and compares them with one large round."""

import sys

from silkie.run.rounds.command import main

if __name__ == "__main__":
    sys.exit(main(prog="iterative.py"))
