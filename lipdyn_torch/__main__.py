"""``python -m lipdyn_torch`` is the `lipdyn` command."""

import sys

from lipdyn_torch.experiments.cli import command

if __name__ == "__main__":
    sys.exit(command())
