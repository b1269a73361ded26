"""What the launcher of `silkie train` starts in every process: `accelerate launch -m silkie.run ...`."""

import sys

from silkie.run.command import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
