"""The protocol in virtual time: real cores, real bytes, a network and a disk that misbehave.

`World` is one history, drawn from a seed. What is real in it: the server's core with its log, its
snapshots and its recovery (`dgs.durable`), the worker's core, the client's way of joining, and all
frames and messages. What is not: time, the network, the disk, and who calls whom when.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """Run the command with a list of arguments; returns its exit status."""
    from experiments.faults.simulation.command import run_command  # imports torch

    return run_command(arguments)
