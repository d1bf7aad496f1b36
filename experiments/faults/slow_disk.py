"""``dgs`` on a disk whose syncs take longer: to see what many workers gain by sharing one.

    python -m experiments.faults.slow_disk 4 server --listen 127.0.0.1:0 --state-dir DIR

The first argument is what each fdatasync takes more, in milliseconds.
"""

from __future__ import annotations

import os
import sys
import time

from dgs.cli.main import main

__all__ = ["slow_down"]


def slow_down(extra_s: float) -> None:
    """Let every fdatasync of this process take longer."""
    really = os.fdatasync

    def fdatasync(fd: int) -> None:
        time.sleep(extra_s)
        really(fd)

    os.fdatasync = fdatasync  # type: ignore[assignment]


if __name__ == "__main__":
    slow_down(float(sys.argv.pop(1)) / 1e3)
    sys.exit(main())
