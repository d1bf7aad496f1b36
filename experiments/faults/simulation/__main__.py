"""``python -m experiments.faults.simulation --seeds N``."""

from __future__ import annotations

import sys

from experiments.faults.simulation import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
