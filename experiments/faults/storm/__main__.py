"""``python -m experiments.faults.storm``."""

from __future__ import annotations

import sys

from experiments.faults.storm.run import run_command

if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:]))
