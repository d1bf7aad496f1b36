# ruff: noqa: T201 - a user's script prints
"""A worker without a model, for the launcher's tests: ``act.py RANK:ACTION ...``, others wait.

Actions: ``exit=CODE``, ``kill=SIGNAL`` (itself), ``signal=SIGNAL`` (the launcher),
``again=SIGNAL`` (the launcher, and once more when this process is interrupted), ``server`` (kills
the launcher's server), ``family`` (starts a child and tells both ids), ``tell`` (arguments and
environment), ``once=FILE`` (fails unless the file is there), ``talk`` (until nobody listens),
``ruin=FOLDER`` (empties the manifests there, and kills the launcher's server).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType


def wait() -> None:
    """Wait to be ended; bounded, in case nobody does."""
    threading.Event().wait(60.0)
    sys.exit("nobody ended this worker")


def tell() -> None:
    names = sorted(n for n in os.environ if n.startswith(("DGS_", "OMP_", "PYTHONUNB")))
    print(sys.argv[1:], *(f"{n}={os.environ[n]}" for n in names))


def find_server() -> int:
    """Return the id of the server that the launcher has started."""
    for listing in Path(f"/proc/{os.getppid()}/task").glob("*/children"):
        for pid in listing.read_text().split():
            if b"server\0--listen" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
    raise AssertionError("the launcher has no server")


def again(number: int) -> None:
    def interrupted(_: int, frame: FrameType | None) -> None:
        os.kill(os.getppid(), number)

    signal.signal(signal.SIGINT, interrupted)
    os.kill(os.getppid(), number)


def family() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print("family", os.getpid(), child.pid)


def talk() -> None:
    while True:
        print("talking")


def act(action: str, value: str) -> None:
    if action == "tell":
        tell()
        sys.exit(0)
    if action == "exit":
        sys.exit(int(value))
    if action == "once":
        passed = Path(value).exists()
        Path(value).touch()
        sys.exit(0 if passed else 4)
    if action == "kill":
        os.kill(os.getpid(), int(value))
    elif action == "signal":
        os.kill(os.getppid(), int(value))
    elif action == "again":
        again(int(value))
    elif action == "server":
        os.kill(find_server(), signal.SIGKILL)
    elif action == "ruin":
        for manifest in Path(value).glob("snapshot-*.json"):
            manifest.write_bytes(b"")
        os.kill(find_server(), signal.SIGKILL)
    elif action == "family":
        family()
    elif action == "talk":
        talk()
    wait()


def main() -> None:
    for argument in sys.argv[1:]:
        rank, _, what = argument.partition(":")
        if rank in (os.environ["DGS_RANK"], "all"):
            act(*what.partition("=")[::2])
    wait()


if __name__ == "__main__":
    main()
