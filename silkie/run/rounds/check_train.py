"""`python -m silkie.run.rounds.check_train FILE.yaml`: can the options of a training run work? Nothing is loaded."""

import sys

from silkie.io.console import guarded
from silkie.run.command import check_command

if __name__ == "__main__":
    sys.exit(guarded(lambda: check_command(["--config", sys.argv[1]])))
